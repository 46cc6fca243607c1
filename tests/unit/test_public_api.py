"""The public face: quick to import, complete, and honest about what it does not have."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest

import qmp_memlistener

HEAVY = ("asyncio", "rich", "rich_click", "click", "qemu", "qemu.qmp", "msgspec", "logging")
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(qmp_memlistener.__path__, "qmp_memlistener.")
    if not m.name.endswith("__main__")
)
# packages that know nothing of sockets, clocks or processes
PURE = ("topology", "memslots")
IMPURE = ("asyncio", "socket", "subprocess", "selectors", "multiprocessing")


def loaded_by(statement: str, names: tuple[str, ...]) -> set[str]:
    """Which of `names` a fresh interpreter has loaded after the statement, and not before."""
    script = (
        f"import sys\nbefore = set(sys.modules)\n{statement}\n"
        f"print(*[n for n in {names!r} if n in sys.modules and n not in before])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_next_to_nothing() -> None:
    assert loaded_by("import qmp_memlistener", HEAVY) == set()


def test_the_version_is_there_without_loading_more() -> None:
    assert loaded_by("import qmp_memlistener; qmp_memlistener.__version__", HEAVY) == set()


def test_names_load_what_they_need() -> None:
    assert "asyncio" in loaded_by("from qmp_memlistener import attach", HEAVY)
    assert "qemu.qmp" not in loaded_by("from qmp_memlistener import MemoryListener", HEAVY)
    assert "asyncio" not in loaded_by("from qmp_memlistener import MemListenerError", HEAVY)


@pytest.mark.parametrize("package", PURE)
def test_the_pure_packages_are(package: str) -> None:
    assert loaded_by(f"import qmp_memlistener.{package}", IMPURE) == set()


def test_races_need_msgspec_alone() -> None:
    """They run in guests where nothing else is installed."""
    names = ("qemu", "qemu.qmp", "rich", "rich_click", "click", "elftools")
    assert loaded_by("import qmp_memlistener.kvmlab.__main__", names) == set()


def test_the_library_never_loads_the_command_line() -> None:
    names = ("rich", "rich_click", "click", "qmp_memlistener.cli", "qmp_memlistener.reports")
    assert loaded_by("from qmp_memlistener import Agent, attach, MemoryListener", names) == set()


def test_a_verb_loads_what_it_needs_when_it_runs() -> None:
    """So that `--help` is quick."""
    statement = (
        "import pkgutil, importlib, qmp_memlistener.cli as cli\n"
        "for m in pkgutil.iter_modules(cli.__path__, 'qmp_memlistener.cli.'):\n"
        "    importlib.import_module(m.name)"
    )
    packages = ("agent", "kvmlab", "mirror", "qmp", "reports", "updates")
    names = ("qemu.qmp", *(f"qmp_memlistener.{package}" for package in packages))
    assert loaded_by(statement, names) == set()


@pytest.mark.parametrize("name", qmp_memlistener.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(qmp_memlistener, name)
    assert value is getattr(qmp_memlistener, name)
    if name != "__version__":
        assert value.__doc__


def test_star_import_brings_them_all() -> None:
    namespace: dict[str, object] = {}
    exec("from qmp_memlistener import *", namespace)
    assert namespace.keys() >= set(qmp_memlistener.__all__)


def test_dir_shows_them() -> None:
    assert set(dir(qmp_memlistener)) >= set(qmp_memlistener.__all__)


@pytest.mark.parametrize("name", ["nonsense", "agents", "_Agent", "__nonsense__"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(qmp_memlistener, name)
    assert not hasattr(qmp_memlistener, name)
    with pytest.raises(ImportError):
        exec(f"from qmp_memlistener import {name}", {})


def test_submodules_can_be_imported_by_name() -> None:
    from qmp_memlistener import errors, listener

    assert isinstance(errors, ModuleType)
    assert isinstance(listener, ModuleType)


@pytest.mark.parametrize("name", MODULES)
def test_what_a_module_exports_exists(name: str) -> None:
    module = import_module(name)
    assert module.__doc__, "the docstring says what the module holds"
    exported = getattr(module, "__all__", ())
    assert len(exported) == len(set(exported))
    for item in exported:
        assert hasattr(module, item), item


def test_no_two_public_classes_have_one_name() -> None:
    homes: dict[str, set[str]] = {}
    for module in map(import_module, MODULES):
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                homes.setdefault(value.__name__, set()).add(module.__name__)
    public = {name: found for name, found in homes.items() if not name.startswith("_")}
    assert {name: found for name, found in public.items() if len(found) > 1} == {}


def test_every_error_has_an_exit_code_of_the_contract() -> None:
    errors = import_module("qmp_memlistener.errors")
    expected = {
        "MemListenerError": 1, "OperationFailed": 1, "CommandFailed": 1,
        "CommandNotAllowed": 1, "GuestFrozen": 1, "GuestMigrating": 1,
        "InputError": 2, "MtreeError": 2, "RecordingError": 2,
        "TargetError": 3, "TargetUnreachable": 3, "MonitorBusy": 3, "TargetLost": 3,
        "WrongGuest": 3,
        "DeadlineExceeded": 3, "ProtocolViolation": 3,
        "MissingPrerequisite": 4, "TraceUnavailable": 4,
    }  # fmt: skip
    found = {
        name: getattr(errors, name).exit_code
        for name in errors.__all__
        if issubclass(getattr(errors, name), errors.MemListenerError)
    }
    assert found == expected


def test_the_lab_runs_on_a_python_without_compression() -> None:
    """As the one in the guests whose KVM is AMD's."""
    missing = "import sys; sys.modules.update(dict.fromkeys(('_bz2', '_lzma')))"
    code = f"{missing}; import qmp_memlistener.kvmlab.backend, qmp_memlistener.records"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
