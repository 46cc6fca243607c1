# `make demo` and `make test` do all the set-up themselves.
.PHONY: setup demo test lint bench clean qemus svm

PY := .venv/bin/python

setup:
	@tools/setup.sh

demo: setup
	@.venv/bin/qmp-memlistener demo

# side-by-side QEMU versions in the user's cache; the tests run on what is there
qemus: setup
	@$(PY) tools/side_by_side.py || echo "some QEMU versions are not available here; tests use the rest" >&2

# Linux in which KVM is AMD's, for the lab's tests; kept in the user's cache
svm: setup
	@$(PY) vm-images/svm/build.py 6.1 6.12 || echo "no SVM guest here; its tests say so" >&2

test: setup qemus svm
	@$(PY) -m pytest

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/mypy vm-images/svm

bench: setup
	@$(PY) tools/bench/run.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis vm-images/pulse/build vm-images/lab/build
