#!/usr/bin/env python3
"""Record the memory tree and QEMU's own flat view of every machine of every target that starts.

    $ python tools/record/record_machines.py --version 7.2 --only 'sparc/*' --check
    $ python tools/record/record_machines.py --version 7.2      # some minutes; writes the file

Writes `tests/conformance/mtree/machines/<version>.json.xz`; the README there tells the format.  The
targets are the `qemu-system-*` beside the version's x86-64 binary.  `--check` writes nothing and
compares with what is recorded, but for the order of address spaces and flat views.

Exit codes: 0 recorded, or equal; 1 something differs.
"""

from __future__ import annotations

import json
import lzma
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.record._guest import (
    SAMPLES,
    Guest,
    GuestError,
    Qemu,
    die_by_sigterm,
    parse_arguments,
    say,
)

MACHINES = SAMPLES / "mtree" / "machines"
FLASH = ("-drive", "if=pflash,format=raw,file={tmp}/flash32.img")
# what a machine may need to start without a disk or a firmware; the first that works is recorded
FURTHER = ((), ("-m", "1G"), ("-m", "256"), ("-bios", "none"), ("-cpu", "max"), FLASH, FLASH * 2)
ACCELERATORS = ("tcg", "qtest")
# those of one family differ in nothing that the tree shows
VERSIONED = re.compile(r"(pc-i440fx|pc-q35|virt|pseries|s390-ccw-virtio)-[\w.-]*\d.*")
LEFT_OUT = re.compile(r"none|xen.*")

Machine = dict[str, object]


def targets(qemu: Qemu) -> Iterator[tuple[str, Qemu]]:
    """Each target's name, and the same version with that binary."""
    prefix = "qemu-system-"
    for path in sorted(Path(qemu.x86).parent.glob(f"{prefix}*")):
        arch = path.name.removeprefix(prefix)
        # qemu-system-x86_64-microvm is another build of the same, -ppc64le a name of -ppc64
        if "-" not in arch and arch != "ppc64le":
            yield arch, replace(qemu, x86=str(path))


def machines(qemu: Qemu) -> list[str]:
    """The machines of a target, without aliases: pc, q35 and virt are in `record_mtree`."""
    try:
        lines = qemu.help("machine").splitlines()[1:]
    except subprocess.CalledProcessError:
        return []
    names = [line.split()[0] for line in lines if line.split() and "(alias of" not in line]
    return [n for n in names if not VERSIONED.fullmatch(n) and not LEFT_OUT.fullmatch(n)]


def record(qemu: Qemu, arch: str, machine: str) -> Machine | None:
    """The machine as it starts, None when it does not."""
    for further, accelerator in product(FURTHER, ACCELERATORS):
        args = ("-accel", accelerator, *further)
        try:
            with Guest(qemu, ("-machine", machine, *args)) as guest:
                tree = guest.hmp("info mtree -o -D")
                flat = guest.hmp("info mtree -f -o")
        except GuestError:
            continue
        return {"arch": arch, "machine": machine, "args": list(args), "tree": tree, "flat": flat}
    return None


def parts(text: object) -> list[str]:
    """Address spaces or flat views, whose order and numbers are those of a hash table."""
    blocks = re.sub(r"^FlatView #\d+$", "FlatView", str(text), flags=re.MULTILINE).split("\n\n")
    return sorted(block.strip("\n") for block in blocks)


def is_same(one: Machine, other: Machine) -> bool:
    return all(parts(one[text]) == parts(other[text]) for text in ("tree", "flat"))


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    checking = "--check" in given
    options, qemus = parse_arguments(
        "Machines of all targets; --check compares with what is recorded.",
        [a for a in given if a != "--check"],
    )
    die_by_sigterm()
    wrong = 0
    for qemu in qemus:
        path = MACHINES / f"{qemu.label}.json.xz"
        known: dict[tuple[object, object], Machine] = {
            (m["arch"], m["machine"]): m for m in json.loads(lzma.decompress(path.read_bytes()))
        }
        found: list[Machine] = []
        for arch, target in targets(qemu):
            for machine in machines(target):
                name = f"{arch}/{machine}"
                if not fnmatch(name, options.only):
                    continue
                if options.list:
                    say(f"{qemu.label} {name}")
                    continue
                now = record(target, arch, machine)
                before = known.pop((arch, machine), None)
                if now is None:
                    wrong += before is not None
                    say(f"{qemu.label} {name}: does not start" + (", did" if before else ""))
                    continue
                found.append(now)
                same = before is not None and is_same(now, before)
                wrong += not same
                told = "equal" if same else "differs" if before else "not recorded before"
                say(f"{qemu.label} {name}: {told}")
        if options.list or checking:
            continue
        # those that were not requested stay as they are
        kept = [
            m for m in known.values() if not fnmatch(f"{m['arch']}/{m['machine']}", options.only)
        ]
        whole = sorted((*kept, *found), key=lambda m: (str(m["arch"]), str(m["machine"])))
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        path.write_bytes(lzma.compress(text.encode(), preset=9))
        say(f"{path.name}: {len(whole)} machines")
    return 1 if checking and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
