"""`plan` with bad input: slots, maps and options that make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.cli_support import run, tree
from tests.unit.cli.plan_support import slots_file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "memslots"),
        ("{", "memslots"),
        ("null", "memslots"),
        ('{"slot":0}', "memslots"),
        ('[{"slot":0,"gpa":0}]', "memslots"),
        ('[{"slot":"0","gpa":0,"size":4096}]', "memslots"),
        ('[{"slot":0.5,"gpa":0,"size":4096}]', "memslots"),
        ('[{"slot":0,"gpa":-4096,"size":4096}]', "memslot"),
        ('[{"slot":-1,"gpa":0,"size":4096}]', "memslot"),
        ('[{"slot":0,"gpa":0,"size":0}]', "memslot"),
        ('[{"slot":0,"gpa":0,"size":-4096}]', "memslot"),
        ('[{"slot":0,"gpa":0,"size":4096,"flags":-1}]', "memslot"),
        ('[{"slot":0,"gpa":99999999999999999999999,"size":4096}]', "memslot"),
        ('[{"slot":0,"gpa":18446744073709551615,"size":4096}]', "memslot"),
        ('[{"slot":70000,"as_id":0,"gpa":0,"size":4096}]', "memslot"),
        ('[{"slot":0,"gpa":0,"size":4096},{"slot":0,"gpa":8192,"size":4096}]', "same id"),
        ('[{"slot":0,"gpa":0,"size":8192},{"slot":1,"gpa":4096,"size":8192}]', "overlaps"),
    ],
)  # fmt: skip
def test_bad_slots(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pair: tuple[Path, Path],
    text: str,
    words: str,
) -> None:
    path = tmp_path / "slots.json"
    path.write_text(text)
    err = run(capsys, "plan", "--before", pair[0], "--after", pair[1], "--slots", path).refused()
    assert words in err


def test_slots_of_another_moment(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    """What the slots added would overlap is not in the map before."""
    path = slots_file(tmp_path / "slots.json", [{"slot": 0, "gpa": 4096, "size": 16 << 20}])
    err = run(capsys, "plan", "--before", pair[0], "--after", pair[1], "--slots", path).refused()
    assert "overlaps" in err


@pytest.mark.parametrize("which", ["--before", "--after", "--slots"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\0", b"hello"])
def test_bad_files(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pair: tuple[Path, Path],
    which: str,
    content: bytes | None,
) -> None:
    bad = tmp_path / "bad"
    if content is not None:
        bad.write_bytes(content)
    files = {"--before": pair[0], "--after": pair[1], which: bad}
    run(capsys, "plan", *(word for item in files.items() for word in item)).refused()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--before", "B"],
        ["--after", "A"],
        ["R", "--before", "B"],
        ["R", "--slots", "B"],
        ["--before", "B", "--after", "A", "--rules", "new"],
        ["--before", "B", "--after", "A", "--rules", ""],
        ["--before", "B", "--after", "A", "--log-start", "all", "--log-stop", "all"],
        ["--before", "B", "--after", "A", "--strategy", "nonsense"],
        ["--before", "B", "--after", "A", "--transition", "1"],
        ["/nonexistent/recording"],
        ["/"],
        ["B"],
        ["/dev/null"],
    ],
    ids=" ".join,
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path], argv: list[str]
) -> None:
    files = {"B": str(pair[0]), "A": str(pair[1]), "R": "/nonexistent/recording"}
    run(capsys, "plan", *(files.get(word, word) for word in argv)).refused()


def test_a_map_without_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    other = tmp_path / "io.txt"
    other.write_text(tree("0000000000000000-0000000000000fff (prio 0, i/o): x", space="I/O"))
    err = run(capsys, "plan", "--before", other, "--after", pair[1]).refused()
    assert "memory" in err


def test_a_slot_above_kvms_page_limit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """KVM_MEM_MAX_NR_PAGES: one page more than 2**31 - 1 is refused, as in a replay."""
    for size, refused in (((1 << 31) << 12, True), (((1 << 31) - 1) << 12, False)):
        path = tmp_path / "m.txt"
        path.write_text(tree(f"{0:016x}-{size - 1:016x} (prio 0, ram): big"))
        ran = run(capsys, "plan", "--before", path, "--after", path)
        if refused:
            assert "more than 2147483647 pages" in ran.refused()
        else:
            assert ran.code == 0
