"""What is added to the SVM guest's image: our package, compiled where that helps, and a command."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import svm_files
from tests.support.cpio import unpacked

OTHER = b"\0\0\r\n"  # no Python's compiled files begin like this


def files(magic: bytes, *arguments: str) -> dict[str, bytes]:
    archive = svm_files.added_files(arguments, magic)
    return {e.name: e.data for e in unpacked(archive) if e.mode == 0o100644}


def run(site: Path, program: str) -> str:
    """What a program prints that finds packages in `site`, and no others beside the standard ones.

    Python compiles nothing that it does not find compiled.
    """
    argv = [sys.executable, "-B", "-S", "-c", f"import sys; sys.path.insert(0, {str(site)!r})"]
    argv[-1] += f"\n{program}"
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in a checkout of its own, in place of ours."""
    top = tmp_path / "checkout" / "pack"
    (top / "sub" / "__pycache__").mkdir(parents=True)
    (top / "__init__.py").write_text("WHO = 'pack'\n")
    (top / "sub" / "__init__.py").write_text("WHERE = __file__\n")
    (top / "sub" / "__pycache__" / "stale.pyc").touch()
    (top / "sub" / "data.h").write_text("#define X 1\n")
    (top / "broken.py").write_text("def f(:\n")
    (top.parent / "vm-images" / "lab").mkdir(parents=True)
    (top.parent / "vm-images" / "lab" / "probe.img").write_bytes(b"\xf4")
    monkeypatch.setattr(svm_files, "_PACKAGE", top)
    return top


def test_the_package_and_the_images_of_the_checkout_are_in_it(package: Path) -> None:
    assert package.name == "pack"
    found = files(OTHER)
    assert {n: d for n, d in found.items() if n != "command"} == {
        "site/pack/__init__.py": b"WHO = 'pack'\n",
        "site/pack/sub/__init__.py": b"WHERE = __file__\n",
        "site/pack/sub/data.h": b"#define X 1\n",
        "site/pack/broken.py": b"def f(:\n",
        "site/pack/_images/probe.img": b"\xf4",
    }


def test_what_is_compiled_is_taken_as_it_is(package: Path, tmp_path: Path) -> None:
    assert package.name == "pack"
    for name, data in files(importlib.util.MAGIC_NUMBER).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    # Source that cannot be run shows that nobody looks at it.
    for source in (tmp_path / "site" / "pack").rglob("*.py"):
        source.write_text("raise RuntimeError\n")
    said = run(tmp_path / "site", "import pack.sub; print(pack.WHO, pack.sub.WHERE)")
    assert said == f"pack {tmp_path}/site/pack/sub/__init__.py\n"


def test_broken_source_is_left_for_the_guest_to_complain_about(package: Path) -> None:
    assert package.name == "pack"
    found = files(importlib.util.MAGIC_NUMBER)
    assert [n for n in found if "broken" in n] == ["site/pack/broken.py"]
    assert sum(n.endswith(".pyc") for n in found) == 2


def test_a_shell_takes_the_command_apart_as_it_was() -> None:
    arguments = ("-c", "print('a  b', \"$HOME\", `x`)\n#", "", "--json", "*")
    command = files(OTHER, *arguments)["command"].decode()
    assert shlex.split(command) == ["exec", "python3", *arguments]


def test_ours_needs_nothing_that_is_not_there(tmp_path: Path) -> None:
    """The pure packages with the standard library and msgspec alone, from the archive's files."""
    for name, data in files(importlib.util.MAGIC_NUMBER).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    found = importlib.util.find_spec("msgspec")
    assert found is not None
    assert found.origin is not None
    (tmp_path / "site" / "msgspec").symlink_to(Path(found.origin).parent)
    program = "import qmp_memlistener.memslots as m, qmp_memlistener.topology; print(m.__file__)"
    where = f"{tmp_path}/site/qmp_memlistener/memslots/__init__.py\n"
    assert run(tmp_path / "site", program) == where
