#!/usr/bin/env python3
"""Record the KVM memory slot operations of throw-away guests, step by step.

    $ python tools/side_by_side.py                 # once, for the versions beside the installed one
    $ python tools/record/record_slots.py --list
    $ python tools/record/record_slots.py --only 'q35-*' --version 10.0

Writes `tests/conformance/slots/<version>/<machine>-<name>.json.gz`; the README there tells the
format.  QEMU's own trace event `kvm_set_user_memory` (accel/kvm/trace-events) is the source; the
log is flushed after every line (`qemu_log_unlock`, util/log.c), so all lines of an update are in
the file when QMP answers.  A guest stays stopped unless its steps say otherwise: config registers
are written over qtest, no guest code runs, and a step is one write or one command.

Exit codes: 0 all recorded, 1 a scenario was not recorded, 4 no usable /dev/kvm.
"""

from __future__ import annotations

import mmap
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.record._guest import (
    SAMPLES,
    Action,
    Guest,
    GuestError,
    Qemu,
    die_by_sigterm,
    kvm_usable,
    parse_arguments,
    say,
    write_sample,
)
from tools.record.slot_scenarios import Scenario, nothing, scenarios

__all__ = ["Recorder", "Scenario", "main", "scenarios"]

QUIET_S = 0.05
TREE = "info mtree -o -D"
# 7.2 has the address space in the upper half of the slot; >= 9.1 prints it by itself.
SLOT_OP = re.compile(
    r"^kvm_set_user_memory (?:AddrSpace#(?P<as_id>\d+) )?Slot#(?P<slot>\d+)"
    r" flags=(?P<flags>0x[0-9a-f]+) gpa=(?P<gpa>0x[0-9a-f]+) size=(?P<size>0x[0-9a-f]+)"
    r" ua=(?P<ua>0x[0-9a-f]+) .*?ret=(?P<ret>-?\d+)$"
)

NEW_VIEW = re.compile(r"^flatview_new 0x[0-9a-f]+ \(root (?P<root>0x[0-9a-f]+|\(nil\))\)$")

Op = dict[str, int | str]


def parse_log(lines: Sequence[str]) -> tuple[list[Op], int]:
    """The slot operations in trace lines, and how many topology commits the lines show.

    A commit makes the new FlatViews first, one for each root (`flatviews_reset`), and calls the
    listeners then; so a new one begins where a root comes again or a view follows an operation.
    """
    ops: list[Op] = []
    commits, roots = 0, set[str]()
    for line in lines:
        if view := NEW_VIEW.search(line):
            if not roots or view["root"] in roots:
                commits, roots = commits + 1, set()
            roots.add(view["root"])
        elif m := SLOT_OP.search(line):
            slot, as_id = int(m["slot"]), m["as_id"]
            op: Op = {"as_id": int(as_id) if as_id else slot >> 16, "slot": slot & 0xFFFF}
            op |= {name: int(m[name], 16) for name in ("flags", "gpa", "size", "ua")}
            roots.clear()
            ops.append(op | {"ret": int(m["ret"]), "commit": max(commits - 1, 0), "raw": line})
        elif line:
            raise GuestError(f"a trace line of another form: {line}")
    return ops, commits


@dataclass(slots=True)
class Recorder:
    """The steps of one guest: tree before and after, operations between, the table so far."""

    guest: Guest
    steps: list[dict[str, object]] = field(default_factory=list)
    _offset: int = 0
    _tree: str = ""
    _table: dict[tuple[int, int], Op] = field(default_factory=dict)

    def step(self, name: str, action: Action) -> None:
        """Do `action` and record what it led to."""
        if self.steps and (stray := self._new_lines()):
            raise GuestError(f"{len(stray)} trace lines between steps, before {name}")
        table = [op for _, op in sorted(self._table.items())]
        before = self._tree
        action(self.guest)
        self._tree = self.guest.hmp(TREE)
        lines = self._new_lines()
        while more := self._late_lines():
            lines += more
        if self.guest.hmp(TREE) != self._tree:
            raise GuestError(f"the map still changes after {name}")
        ops, commits = parse_log(lines)
        for op in ops:
            self._apply(op)
        self.steps.append(
            {
                "name": name,
                "mtree_before": before,
                "mtree_after": self._tree,
                "ops": ops,
                "commits": commits,
                "log": lines,
                "table_before": table,
            }
        )

    def _apply(self, op: Op) -> None:
        key = (int(op["as_id"]), int(op["slot"]))
        if op["ret"] != 0:
            return
        if op["size"] == 0:
            self._table.pop(key, None)
        else:
            self._table[key] = {n: op[n] for n in ("as_id", "slot", "gpa", "size", "flags", "ua")}

    def _new_lines(self) -> list[str]:
        with (self.guest.tmp / "trace").open("rb") as log:
            log.seek(self._offset)
            data = log.read()
        self._offset += len(data)
        return data.decode().splitlines()

    def _late_lines(self) -> list[str]:
        """Lines that come after QMP has answered: bottom halves, other threads."""
        time.sleep(QUIET_S)
        self.guest.execute("query-status")
        return self._new_lines()


# What a step does.


def record(qemu: Qemu, scenario: Scenario) -> int:
    """Record one guest; the size of the sample.  Raises GuestError."""
    argv = scenario.argv()
    with Guest(qemu, argv) as g:
        recorder = Recorder(g)
        for name, action in (("start", nothing), *scenario.steps):
            try:
                recorder.step(name, action)
            except GuestError as exc:
                raise GuestError(f"step {name}: {exc}") from exc
        document = {
            "name": scenario.sample,
            "version": qemu.version,
            "machine": scenario.machine,
            "accel": "kvm",
            "args": argv,
            "page_size": mmap.PAGESIZE,
            "steps": recorder.steps,
            "flat_end": g.hmp("info mtree -f -o"),
        }
    size = write_sample(SAMPLES / "slots" / qemu.label / f"{scenario.sample}.json.gz", document)
    ops = sum(len(ops) for s in recorder.steps if isinstance(ops := s["ops"], list))
    say(f"{qemu.label}  {scenario.sample}  {len(recorder.steps)} steps, {ops} ops, {size} bytes")
    return size


def main(argv: Sequence[str] | None = None) -> int:
    args, qemus = parse_arguments("Record KVM slot operations, step by step.", argv)
    die_by_sigterm()
    if not kvm_usable() and not args.list:
        say("/dev/kvm is not usable by this user; there are no slots without it")
        return 4

    total, failures = 0, 0
    for qemu in qemus:
        for scenario in scenarios():
            if not fnmatch(scenario.sample, args.only):
                continue
            if args.list:
                say(f"{qemu.label}  {scenario.sample}: {', '.join(n for n, _ in scenario.steps)}")
                continue
            try:
                total += record(qemu, scenario)
            except GuestError as exc:
                failures += 1
                say(f"{qemu.label}  {scenario.sample} NOT RECORDED: {exc}")
    say(f"{total} bytes written, {failures} guests failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
