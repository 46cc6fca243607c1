"""A guest that reshapes its map as fast as it can: is every transition written, and does it end?

    python -m tools.soak_toggle [--seconds 60] [--qemu 10.0] [--verb record] [--probes ping,uprobes]

The pulse guest opens and closes RAM at 0xf0000 under KVM, without a pause between two writes, while
`record` or `watch --json` follows it as a process of its own.  Then the guest is told to stop, and
the process gets SIGTERM.  Each transition must be written (the guest counts its writes), the
process must end within two seconds of the signal, and its memory must not grow with the burst.
With `--signal-first` it gets the signal in the middle of the burst: then all transitions up to the
last one written must be there.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    GuestSpec,
    Pulse,
    QemuBuild,
    boot_args,
    find_qemus,
    launch,
)

__all__ = ["Burst", "burst"]

END_S = 2.0
_GIVE_UP_S = 60.0
_ENDLESS = 1 << 31


@dataclass(frozen=True, slots=True)
class Burst:
    """`writes` of the guest, transitions `written` and told to be `lost`, the greatest `seq`.

    `cut_short`: at the end there was more than could be read in time.  `rss` is the resident
    memory of the process, once a second, in bytes.
    """

    writes: int
    seconds: float
    written: int
    seq: int
    lost: int
    cut_short: bool
    end_s: float
    code: int | None
    rss: list[int]
    err: str
    signal_first: bool

    def faults(self, end_s: float = END_S) -> list[str]:
        """What is wrong; nothing when all is well."""
        found = []
        missing = self.seq - self.written if self.signal_first else self.writes - self.written
        if self.written < self.seq or (missing > 1 and not self.cut_short):
            found.append(f"{self.writes} writes, {self.written} transitions, last #{self.seq}")
        if self.cut_short and not self.signal_first:
            found.append("the log was not read to its end in time")
        if self.end_s > end_s:
            found.append(f"it ended {self.end_s:.1f} s after the signal")
        if self.code != 0:
            found.append(f"exit code {self.code}: {self.err[-300:]}")
        return found


async def burst(
    build: QemuBuild,
    seconds: float,
    *,
    verb: str = "record",
    options: tuple[str, ...] = (),
    signal_first: bool = False,
) -> Burst:
    """One run."""
    spec = GuestSpec(machine="pc", accel="kvm", args=boot_args())
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "r.jsonl"
        async with launch(spec.on(build)) as guest:
            assert guest.ram is not None
            with Pulse(guest.ram) as pulse:
                await pulse.wait_ready()
                target = f"unix:{guest.monitors[0]}"
                out = ["-o", str(file)] if verb == "record" else ["--json"]
                stdout_to = file if verb == "watch" else Path(os.devnull)
                with stdout_to.open("wb") as stdout:
                    process = await asyncio.create_subprocess_exec(
                        *(sys.executable, "-m", "qmp_memlistener", verb, target, *out, *options),
                        stdout=stdout,
                        stderr=asyncio.subprocess.PIPE,
                    )
                try:
                    async with asyncio.timeout(60):
                        while not _attached(file):  # noqa: ASYNC110 (it does not tell us)
                            await asyncio.sleep(0.05)
                    return await _run(pulse, process, file, seconds, signal_first)
                finally:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()


async def _run(
    pulse: Pulse,
    process: asyncio.subprocess.Process,
    file: Path,
    seconds: float,
    signal_first: bool,
) -> Burst:
    rss: list[int] = []
    start = time.monotonic()
    toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), _ENDLESS)
    while time.monotonic() - start < seconds:
        await asyncio.sleep(min(1.0, seconds))
        rss.append(_rss(process.pid))
    writes = 0 if signal_first else await toggle.stop()
    took = time.monotonic() - start
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ending = asyncio.create_task(process.communicate())
    done, _ = await asyncio.wait([ending], timeout=_GIVE_UP_S)
    end_s = time.monotonic() - sent
    if not done:
        process.kill()
    _, err = await ending
    if signal_first:
        writes = await toggle.stop()
    return Burst(
        writes,
        took,
        *_counted(file),
        end_s,
        process.returncode,
        rss,
        err.decode(errors="replace"),
        signal_first,
    )


def _attached(file: Path) -> bool:
    return file.exists() and b'"type":"probes"' in file.read_bytes()


def _counted(file: Path) -> tuple[int, int, int, bool]:
    """Transitions in a recording, the last one's number, losses, and one at the very end."""
    import msgspec

    from qmp_memlistener.records import Lost, TransitionRecord

    kinds = TransitionRecord | Lost
    decode = msgspec.json.Decoder(kinds).decode
    written = seq = lost = 0
    cut_short = False
    with file.open("rb") as lines:
        for line in lines:
            if b'"type":"transition"' in line[:64]:
                record = decode(line)
                assert isinstance(record, TransitionRecord)
                written += record.merged
                seq = record.seq
            elif b'"type":"lost"' in line[:64]:
                lost += 1
                cut_short |= b"not read to its end" in line
    return written, seq, lost, cut_short


def _rss(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--qemu", help="only this version")
    parser.add_argument("--verb", choices=["record", "watch"], default="record")
    parser.add_argument("--probes", help="as of the verb")
    parser.add_argument("--signal-first", action="store_true")
    options = parser.parse_args()
    more = ("--probes", options.probes) if options.probes else ()
    bad = 0
    for build in find_qemus():
        if options.qemu is not None and not build.version.startswith(options.qemu):
            continue
        found = asyncio.run(
            burst(
                build,
                options.seconds,
                verb=options.verb,
                options=more,
                signal_first=options.signal_first,
            )
        )
        rss = [r >> 20 for r in found.rss]
        faults = found.faults()
        bad += bool(faults)
        print(
            f"QEMU {build.version}: {found.writes} writes in {found.seconds:.1f} s, "
            f"{found.written} transitions written (last #{found.seq}), {found.lost} losses told, "
            f"ended {found.end_s:.2f} s after SIGTERM with code {found.code}; "
            f"RSS MiB {rss[:1]}..{max(rss, default=0)}..{rss[-1:]}"
            + "".join(f"\n    WRONG: {fault}" for fault in faults),
            flush=True,
        )
        if found.err:
            print("    stderr: " + found.err[-500:])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
