#!/usr/bin/env python3
"""Record what `lab replay` reads: recordings of ours, and raw QEMU logs, of throw-away guests.

    $ python tools/side_by_side.py                 # once, for the versions beside the installed one
    $ python tools/record/record_replay.py --list
    $ python tools/record/record_replay.py --only 'q35-*' --version 10.0

Writes `tests/conformance/replay/<version>/<machine>-<how>.gz`; the README there tells what is in
them.  A guest boots with SeaBIOS, is reset, and reshapes its memory: PAM, SMRAM, memory and
devices that are plugged and unplugged, a migration.  Each way to watch it gets a guest of its own.

Exit codes: 0 all recorded, 1 one was not, 4 no usable /dev/kvm.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.record._guest import (
    SAMPLES,
    Guest,
    GuestError,
    Qemu,
    Step,
    config,
    die_by_sigterm,
    kvm_usable,
    parse_arguments,
    say,
    seabios,
    steady,
)
from tools.record.slot_scenarios import (
    dimm_steps,
    eject,
    ivshmem_steps,
    migration,
    qmp,
    reset,
    then,
)

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Way:
    """A way to watch a guest: arguments of QEMU, or of `qmp-memlistener record`.

    `pause_s` is between steps, so that the recorder sees each alone.  `late`: QEMU's trace is
    switched on when the guest has booted.
    """

    name: str
    accel: str = "kvm"
    trace: str = ""
    record: tuple[str, ...] | None = None
    pause_s: float = 0.0
    late: bool = False

    @property
    def suffix(self) -> str:
        return "log" if self.record is None else "jsonl"


ONE_EVENT = "-D {tmp}/trace -trace kvm_set_user_memory"
WAYS = (
    Way("plain", trace=ONE_EVENT),
    Way("stamped", trace=f"{ONE_EVENT} -msg timestamp=on"),
    Way("late", trace="-D {tmp}/trace", late=True),
    Way("marked", trace=f"{ONE_EVENT} -trace flatview_new -trace pci_update_mappings*"),
    Way("traced", record=()),
    Way("paced", record=(), pause_s=0.15),
    Way("polled", record=("--no-trace",), pause_s=0.3),
    Way("tcg", accel="tcg", record=()),
)


def steps(machine: str) -> tuple[Step, ...]:
    """A guest's life: every kind of change that moves slots, in one process."""
    pam, smram = {"pc": (0x59, 0x72), "q35": (0x90, 0x9D)}[machine]
    pams = [(f"pam-{v:#x}-{i}", config(0, (pam, v))) for i in range(4) for v in (0x30, 0x10, 0)]
    slow = qmp("migrate-set-parameters", **{"max-bandwidth": 4096})
    active = migration("active")
    smrams = [(f"smram-{v:#x}", config(0, (smram, v))) for v in (0x4A, 0x0A, 0x02)]
    return (
        ("boot", seabios),
        ("reset", reset),
        ("boot-again", seabios),
        *pams,
        *smrams,
        *dimm_steps(),
        ("backend-del1", qmp("object-del", id="m1")),
        *ivshmem_steps(machine),
        *virtio_steps(machine),
        ("dirty-log-on", then(slow, qmp("migrate", uri="exec:cat >/dev/null"), active)),
        ("pam-while-logged", config(0, (pam, 0x30))),
        ("dirty-log-off", then(qmp("migrate_cancel"), migration("cancelled", "failed"))),
        ("cont", qmp("cont")),
        ("reset-at-last", reset),
    )


def virtio_steps(machine: str) -> tuple[Step, ...]:
    """A virtio device with an option ROM: plugged, its ROM mapped and unmapped, unplugged."""
    plug_to, slot, bus, base = {
        "pc": ({"addr": "10"}, 0x10, 0, 0xAE00),
        "q35": ({"bus": "rp"}, 0, 1, 0xCC0),
    }[machine]
    device = {"driver": "virtio-rng-pci", "id": "rng", "romfile": "{tmp}/rom8k.bin"}

    def plug(g: Guest) -> None:
        device["romfile"] = str(g.tmp / "rom8k.bin")
        g.execute("device_add", **device, **plug_to)

    return (
        ("plug-rng", plug),
        ("rom-map", config(slot, (0x30, 0xE0000001), (4, 2), width=4, bus=bus)),
        ("rom-unmap", config(slot, (0x30, 0xE0000000), width=4, bus=bus)),
        ("rom-map-again", config(slot, (0x30, 0xE0010001), width=4, bus=bus)),
        ("ask-unplug-rng", qmp("device_del", id="rng")),
        (
            "eject-rng",
            eject("rng", f"outl {base + 0x10:#x} 0", f"outl {base + 8:#x} {1 << slot:#x}"),
        ),
    )


def arguments(machine: str, way: Way) -> list[str]:
    port = "-device pcie-root-port,id=rp,bus=pcie.0,addr=4,chassis=1" if machine == "q35" else ""
    disk = (
        "-drive if=none,id=boot,format=raw,file={tmp}/boot.img"
        " -device ide-hd,drive=boot,bootindex=0 -device VGA"
    )
    watched = "-qmp unix:{tmp}/watched,server=on,wait=off" if way.record is not None else ""
    memory = "-m 128,slots=4,maxmem=4G"
    parts = f"-machine {machine} -accel {way.accel} {memory} {disk} {port} {watched} {way.trace}"
    return parts.split()


@contextmanager
def recorder(g: Guest, way: Way) -> Iterator[None]:
    """`qmp-memlistener record` on the guest; its socket is named by a relative path."""
    if way.record is None:
        yield
        return
    argv = [sys.executable, "-m", "qmp_memlistener", "record", "watched", "-o", "out"]
    argv += ["--probes", "none", *way.record]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(argv, cwd=g.tmp, env=env, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: b'"type":"map"' in read(g.tmp / "out"), process)
        yield
        steady(lambda: str(len(read(g.tmp / "out"))))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    if process.returncode not in (0, 130):
        raise GuestError(f"the recorder failed: {said.strip()}")


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not done():
        if process.poll() is not None or time.monotonic() > end:
            raise GuestError(f"the recorder did not begin: {process.poll()}")
        time.sleep(0.05)


def read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def record(qemu: Qemu, machine: str, way: Way) -> int:
    """Record one guest; the size of the sample.  Raises GuestError."""
    with Guest(qemu, arguments(machine, way)) as g:
        with recorder(g, way):
            for name, action in steps(machine):
                try:
                    action(g)
                except GuestError as exc:
                    raise GuestError(f"step {name}: {exc}") from exc
                if way.late and name == "boot-again":
                    g.hmp("log trace:kvm_set_user_memory")
                time.sleep(way.pause_s)
        data = read(g.tmp / ("out" if way.record is not None else "trace"))
    # which kernel a host has to the last digit is nobody's business
    data = re.sub(rb'("host_kernel":"\d+\.\d+)[^"]*', rb"\1", data, count=1)
    raw = io.BytesIO()
    with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=9, mtime=0, filename="") as z:
        z.write(data)
    path = SAMPLES / "replay" / qemu.label / f"{machine}-{way.name}.{way.suffix}.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw.getvalue())
    say(f"{qemu.label}  {path.name}  {data.count(b'kvm_set_user') or data.count(b'slot_op')} ops, "
        f"{len(raw.getvalue())} bytes")  # fmt: skip
    return len(raw.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    args, qemus = parse_arguments("Record what `lab replay` reads.", argv)
    die_by_sigterm()
    if not kvm_usable() and not args.list:
        say("/dev/kvm is not usable by this user; there are no slots without it")
        return 4
    total, failures = 0, 0
    for qemu in qemus:
        for machine, way in product(("pc", "q35"), WAYS):
            sample = f"{machine}-{way.name}"
            if not fnmatch(sample, args.only):
                continue
            if args.list:
                say(f"{qemu.label}  {sample}: {', '.join(name for name, _ in steps(machine))}")
                continue
            try:
                total += record(qemu, machine, way)
            except GuestError as exc:
                failures += 1
                say(f"{qemu.label}  {sample} NOT RECORDED: {exc}")
    say(f"{total} bytes written, {failures} guests failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
