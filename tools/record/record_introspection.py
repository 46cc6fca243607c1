#!/usr/bin/env python3
"""Record which device types `device-list-properties` may be asked about without harm.

    $ python tools/side_by_side.py                 # once, for the versions beside the installed one
    $ python tools/record/record_introspection.py --version 10.0

Writes `tests/conformance/introspection/<version>.json`, the evidence for
`qmp_memlistener/qmp/allowed.py`.  The command makes an instance of the type and drops it, so it
runs the device's own code.  Every type that each QEMU has is asked for on throw-away guests of
several machines; a guest that does not live through it is replaced.  The names come from a guest
of their own: `qom-list-types` loads all of QEMU's modules, and would hide what a missing one does.
For the same reason all are asked for again with each module of devices as the only one:
distributors put modules into packages of their own, and a type whose parts are in another module
may be there alone.

Exit codes: 0 all recorded, 1 a QEMU could not be started.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.record._guest import (
    SAMPLES,
    Guest,
    GuestError,
    Qemu,
    die_by_sigterm,
    kvm_usable,
    parse_arguments,
    say,
)

MACHINES = {
    "q35": ("-M", "q35", "-accel", "tcg"),
    "pc": ("-M", "pc", "-accel", "tcg"),
    "microvm": ("-M", "microvm,pcie=on", "-accel", "tcg"),
    "q35-kvm": ("-M", "q35", "-accel", "kvm"),
}
_ALIVE = "query-status"


def main(argv: list[str] | None = None) -> int:
    """Record every QEMU that was asked for."""
    args, qemus = parse_arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    if args.list:
        for name in MACHINES:
            say(name)
        return 0
    die_by_sigterm()
    try:
        for qemu in qemus:
            record(qemu)
    except GuestError as error:
        say(str(error))
        return 1
    return 0


def record(qemu: Qemu) -> None:
    """Ask one QEMU for every device type it has, and write what became of it."""
    names = _device_types(qemu)
    aborted: dict[str, str] = {}
    refused: set[str] = set()
    machines = [m for m in MACHINES if "kvm" not in m or kvm_usable()]
    for machine in machines:
        for name, why in _ask_all(qemu, machine, names, refused).items():
            aborted.setdefault(name, f"{machine}: {why}")
    modules = _modules(qemu)
    for module in modules:
        with _alone(qemu, module) as poorer:
            for name, why in _ask_all(poorer, "q35", names, set()).items():
                aborted.setdefault(name, f"with {module.name} as the only module of devices: {why}")
    document = {
        "version": qemu.version,
        "machines": machines,
        "modules": [module.name for module in modules],
        "answered": sorted(set(names) - set(aborted) - refused),
        "refused": sorted(refused - set(aborted)),
        "aborted": dict(sorted(aborted.items())),
    }
    path = SAMPLES / "introspection" / f"{qemu.label}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    say(f"{qemu.label}: {len(names)} types, {len(refused)} refused, aborted: {sorted(aborted)}")


def _device_types(qemu: Qemu) -> list[str]:
    with Guest(qemu, MACHINES["q35"]) as guest:
        found = guest.execute("qom-list-types", implements="device", abstract=True)
    assert isinstance(found, list)
    return sorted(entry["name"] for entry in found)


def _ask_all(qemu: Qemu, machine: str, names: list[str], refused: set[str]) -> dict[str, str]:
    """QEMU's last words for each type that it did not live through."""
    aborted = {}
    left = list(names)
    while left:
        with Guest(qemu, MACHINES[machine]) as guest:
            while left:
                name = left.pop(0)
                try:
                    guest.execute("device-list-properties", typename=name)
                except GuestError as error:
                    if _lives(guest):
                        refused.add(name)
                        continue
                    aborted[name] = _last_words(guest) or str(error)
                    break
    return aborted


def _modules(qemu: Qemu) -> list[Path]:
    """Those of devices; what QEMU's accelerator needs is always there."""
    return sorted(_module_directory(qemu).glob("hw-*.so"))


def _module_directory(qemu: Qemu) -> Path:
    named = (qemu.env or {}).get("QEMU_MODULE_DIR")
    if named:
        return Path(named)
    return next(Path("/usr/lib").glob("*/qemu"), Path("/usr/lib/qemu"))


@contextmanager
def _alone(qemu: Qemu, module: Path) -> Iterator[Qemu]:
    """The same QEMU with this module and no other of devices."""
    with tempfile.TemporaryDirectory(prefix="qmpml-modules.") as directory:
        for path in (module, *module.parent.glob("accel-*.so")):
            os.symlink(path, Path(directory, path.name))
        yield replace(qemu, env={**(qemu.env or {}), "QEMU_MODULE_DIR": directory})


def _lives(guest: Guest) -> bool:
    try:
        guest.execute(_ALIVE)
    except GuestError:
        return False
    return True


def _last_words(guest: Guest) -> str:
    lines = (guest.tmp / "stderr").read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "").strip()


if __name__ == "__main__":
    raise SystemExit(main())
