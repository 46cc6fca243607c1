"""Mutation sample: one small change at a time in the package's pure parts; do the tests see it?

    tools/mutants.py --count 200 --seed 1 [FILE OR DIRECTORY OF THE PACKAGE]...

Works in a copy of the checkout.  Each mutant runs against the unit tests of its package, which end
at the first failure.  Prints a line a mutant and the share that was killed; a mutant that runs into
the time limit is killed too.  Survivors are to be read: some change nothing that can be seen.
"""

from __future__ import annotations

import argparse
import ast
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLED = ("topology", "memslots", "tracking", "updates/pause")
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """The change number `number` of a file; `line` and `text` are for people."""

    file: Path
    number: int
    line: int
    text: str


def changes(tree: ast.AST) -> Iterator[tuple[int, str, ast.AST, str, object]]:
    """Every change there is: line, words, and what to set in which field of which node."""
    unseen = {  # annotations, and slots=True and such in decorators: they change no behaviour
        id(part)
        for node in ast.walk(tree)
        for name in ("annotation", "returns", "decorator_list")
        for found in as_list(getattr(node, name, None))
        for part in ast.walk(found)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        line = getattr(node, "lineno", 0)
        for name in ("op", "ops"):
            found = getattr(node, name, None)
            if isinstance(found, list):
                for i, op in enumerate(found):
                    if swap := SWAPS.get(type(op)):
                        text = f"{type(op).__name__} -> {swap.__name__}"
                        yield line, text, node, name, [*found[:i], swap(), *found[i + 1 :]]
            elif isinstance(found, ast.AST) and (swap := SWAPS.get(type(found))):
                yield line, f"{type(found).__name__} -> {swap.__name__}", node, name, swap()
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            yield line, "condition negated", node, "test", ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int):
            changed = not node.value if isinstance(node.value, bool) else node.value + 1
            yield line, f"{node.value} -> {changed}", node, "value", changed
        elif isinstance(node, ast.Return) and node.value and not is_none(node.value):
            yield line, "return None", node, "value", ast.Constant(None)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            for i, statement in enumerate(block if isinstance(block, list) else ()):
                if block and is_work(statement):
                    without = [*block[:i], ast.Pass(), *block[i + 1 :]]
                    yield statement.lineno, "statement removed", node, name, without


def as_list(found: object) -> list[ast.AST]:
    return [n for n in (found if isinstance(found, list) else [found]) if isinstance(n, ast.AST)]


def is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def is_work(statement: ast.stmt) -> bool:
    """Calls, assignments to attributes and items, raises: what can go without a NameError."""
    if isinstance(statement, ast.Assign):
        return not isinstance(statement.targets[0], ast.Name | ast.Tuple)
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.AugAssign | ast.Raise | ast.Delete)


def mutants_of(file: Path) -> list[Mutant]:
    tree = ast.parse(file.read_text())
    return [Mutant(file, n, c[0], c[1]) for n, c in enumerate(changes(tree))]


def mutated(mutant: Mutant) -> str:
    tree = ast.parse(mutant.file.read_text())
    _, _, node, name, value = list(changes(tree))[mutant.number]
    setattr(node, name, value)
    return ast.unparse(ast.fix_missing_locations(tree))


def passes(copy: Path, package: str, seconds: float) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        ran = subprocess.run(
            [*command, f"tests/unit/{package}"],
            cwd=copy,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return False
    return ran.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", default=SAMPLED)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "copy"
        skipped = shutil.ignore_patterns(".*", "build", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=skipped, symlinks=True)
        package = copy / "qmp_memlistener"
        paths = [package / p for p in options.paths]
        files = [f for p in paths for f in ([p] if p.is_file() else sorted(p.rglob("*.py")))]
        found = [m for file in files for m in mutants_of(file)]
        sample = random.Random(options.seed).sample(found, min(options.count, len(found)))
        patience = {}
        for tested in {m.file.relative_to(package).parts[0] for m in sample}:
            start = time.monotonic()
            if not passes(copy, tested, 3600):
                sys.exit(f"the tests of {tested} fail without any change")
            patience[tested] = 60 + 5 * (time.monotonic() - start)
        killed = 0
        for mutant in sample:
            tested = mutant.file.relative_to(package).parts[0]
            original = mutant.file.read_text()
            mutant.file.write_text(mutated(mutant))
            survived = passes(copy, tested, patience[tested])
            mutant.file.write_text(original)
            killed += not survived
            where = f"{mutant.file.relative_to(copy)}:{mutant.line}"
            print(f"{'survived' if survived else 'killed':<9}{where}: {mutant.text}", flush=True)
    share = f"{killed / len(sample):.0%}"
    print(f"{killed} of {len(sample)} killed ({share}); {len(found)} are possible")


if __name__ == "__main__":
    main()
