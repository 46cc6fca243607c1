# `make demo` and `make test` do all the set-up themselves.
.PHONY: setup demo test test-full lint bench clean qemus svm

PY := .venv/bin/python
# each of the hundreds of verbs that the tests start would compile what it imports
export PYTHONDONTWRITEBYTECODE :=
PURE := tests/unit tests/conformance tests/fuzz
REAL := tests/kvm tests/live

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

# each behaviour once, on the newest QEMU here; two guests at a time, but for tests marked `alone`
test: setup qemus svm
	@failed=0; $(PY) -m pytest -n 2 -m "not full and not alone" $(PURE) $(REAL) || failed=1; \
	$(PY) -m pytest -m "not full and alone" $(REAL) || failed=1; exit $$failed

# on every QEMU here, with boots, soaks and the tests of the tests' own guests
test-full: setup qemus svm
	@failed=0; $(PY) -m pytest -n 2 -m "not alone" $(PURE) $(REAL) || failed=1; \
	$(PY) -m pytest -m alone $(REAL) || failed=1; exit $$failed

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/mypy vm-images/svm
	@.venv/bin/lint-imports --no-logo --no-cache

bench: setup
	@$(PY) tools/bench/run.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis vm-images/pulse/build vm-images/lab/build
