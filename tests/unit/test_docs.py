"""What the pages claim exists: links, files, verbs, options, layers, strategies, kinds of stall."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from qmp_memlistener.cli.main import VERBS, cli
from qmp_memlistener.cli.steer import STRATEGIES as STEERED
from qmp_memlistener.kvmlab.strategies import STRATEGIES
from qmp_memlistener.memslots import PlanStrategy
from qmp_memlistener.probes import StallKind
from qmp_memlistener.probes.registry import PROBES
from qmp_memlistener.reports.lengths import kind_text
from qmp_memlistener.updates.model import Strategy

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TOP = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES = [*TOP, *sorted(DOCS.glob("*.md"))]
GLOSSARY = (DOCS / "glossary.md").read_text()
ARCHITECTURE = (DOCS / "architecture.md").read_text()


def name_of(page: Path) -> str:
    return page.name


def code_blocks(text: str) -> list[str]:
    """Indented blocks, lines that end in a backslash joined with the next one."""
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, re.MULTILINE)
    return [re.sub(r"\\\n\s*", " ", block) for block in blocks]


def command_lines(text: str) -> Iterator[list[str]]:
    """The words behind each `qmp-memlistener` in blocks and in `code`."""
    lines = [line for block in code_blocks(text) for line in block.splitlines()]
    lines += re.findall(r"`(qmp-memlistener [^`]+)`", text)
    for line in lines:
        found = re.match(r"\s*(?:\$ )?qmp-memlistener (?P<words>[a-z-].*)", line)
        if found:
            yield found["words"].split("#")[0].split()


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_verbs_and_options_exist(page: Path) -> None:
    for words in command_lines(page.read_text()):
        command: click.Command = cli
        context = click.Context(cli, **cli.context_settings)
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(context, words[0])
            assert found is not None, words
            command, words = found, words[1:]
        if "--" in words:  # what follows is another program's
            words = words[: words.index("--")]
        known = {name for p in command.get_params(context) for name in (*p.opts, *p.secondary_opts)}
        wanted = {word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z].*", word)}
        assert wanted <= known | {"--help", "-h"}, (command.name, words)


def test_every_option_that_a_page_names_exists() -> None:
    ours: set[str] = set()
    groups: list[click.Command] = [cli]
    while groups:
        command = groups.pop()
        context = click.Context(command, **command.context_settings)
        ours |= {name for param in command.get_params(context) for name in param.opts}
        if isinstance(command, click.Group):
            names = command.list_commands(context)
            groups += [found for n in names if (found := command.get_command(context, n))]
    scripts = {"--version", "--list", "--only", "--slot-sizes", "--rounds"}  # of tools/
    for page in PAGES:
        named = set(re.findall(r"`(--[a-z][a-z-]+)", page.read_text()))
        assert named <= ours | scripts, (page.name, named - ours - scripts)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    package = ROOT / "qmp_memlistener"
    qemu = {"system/memory.c", "accel/kvm/kvm-all.c", "util/log.c"}
    named = r"`((?:[\w.-]+/)+(?:[\w-]+\.(?:py|toml|sh|md|c|s))?)`"
    for path in re.findall(named, page.read_text()):
        assert path in qemu or (package / path).exists() or (ROOT / path).exists(), path


def test_every_verb_is_in_the_readme() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", PAGES[0].read_text(), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row)} == set(VERBS)


def test_the_layers_are_those_that_lint_checks() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contract = next(c for c in config["contracts"] if c["type"] == "layers")
    checked = [set(layer.split(" | ")) for layer in contract["layers"]]
    rows = re.findall(r"^\| (`.+?`) \|", ARCHITECTURE, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == checked


def test_every_strategy_is_in_the_glossary() -> None:
    names = {*Strategy, *PlanStrategy, *STEERED, *(s.name for s in STRATEGIES)}
    names -= {"control", "off"}
    for name in names:
        shown = "presplit-SIZE" if name.startswith("presplit-") else str(name)
        assert f"`{shown}`" in GLOSSARY, name


def test_every_kind_of_stall_and_probe_is_in_the_glossary_and_in_measuring() -> None:
    measuring = (DOCS / "measuring.md").read_text()
    for kind in StallKind:
        assert f"| `{kind}` | {kind_text(kind)} |" in GLOSSARY
        assert f"| `{kind}` |" in measuring
    for probe in PROBES:
        assert f"`{probe}`" in GLOSSARY
        assert f"| `{probe}` |" in measuring
