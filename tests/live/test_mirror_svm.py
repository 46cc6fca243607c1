"""A mirror's backend on the KVM of AMD hardware, in a guest whose CPU is emulated.

There a hole in a host mapping makes KVM_RUN fail with EFAULT and names no reason, and stores to a
READONLY slot and to a mapping that is not writable end in different ways.
"""

from __future__ import annotations

import json

import pytest

from qmp_memlistener.errors import MissingPrerequisite
from tests.support.live import NO_QEMU, QEMUS
from tests.support.svm import SvmImage, run_python_in_svm

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.asyncio, pytest.mark.timeout(400)]

LOOKED_AT = """
import json
from msgspec.structs import replace
from qmp_memlistener.kvmlab.backend import KvmBackend
from qmp_memlistener.kvmlab.vm import Kvm
from qmp_memlistener.kvmlab.vm import SlotRefused
from qmp_memlistener.memslots import Slot

MIB, GIB = 1 << 20, 1 << 30
MAIN = Slot(0, 0, 0, 64 * MIB, 1, "pc.ram", None, 0, ((0xC0000, 0xE0000),))
SHADOW = Slot(0, 1, 0xC0000, 0x20000, 2, "pc.rom", None, 0)
ALONE = Slot(0, 4, GIB, MIB, 2, "rom", None, 0)

def errno_of(call, *slot):
    try:
        call(*slot)
    except SlotRefused as exc:
        return exc.errno

with Kvm() as kvm, KvmBackend(kvm, vcpus=1) as lab:
    for slot in (SHADOW, MAIN, ALONE):
        lab.add_slot(slot)
    told = {"good": [lab.verify().good]}
    told["stores"] = [lab.write(at, b"mirrored") for at in (MIB, 0xC0000, GIB, 80 * MIB)]
    told["kept"] = lab.read(MIB) == b"mirrored"
    before = lab.kvm_slots()
    lab.begin()
    lab.set_hole(MAIN, 2 * MIB, 3 * MIB)
    lab.add_slot(Slot(0, 7, 2 * MIB, 4096, 2, "x", None, 0))
    lab.end()
    told["same slots"] = lab.kvm_slots() == before
    told["in the hole"] = [lab.read(3 * MIB - 4096), lab.write(3 * MIB - 4096, b"mirrored")]
    told["good"].append(lab.verify().good)
    lab.clear_hole(MAIN, 2 * MIB + 4096, 3 * MIB)
    told["filled"] = lab.write(3 * MIB - 4096, b"mirrored")
    told["dirty"] = {MIB, 3 * MIB - 4096} <= lab.dirty_pages()
    told["errno"] = [
        errno_of(lab.add_slot, Slot(0, 5, MIB, MIB, 0, "y", None, 0)),
        errno_of(lab.add_slot, Slot(0, 5, GIB - 1, MIB, 0, "y", None, 0)),
        errno_of(lab.set_flags, replace(ALONE, flags=0)),
    ]
    lab.add_slot(Slot(0, 8, lab.private()[0], MIB, 0, "bar", None, 0))
    told["good"].append(lab.verify().good)
    told["counts"] = [lab.facts().grown, lab.facts().moved, lab.facts().holds.count]
print(json.dumps(told))
"""


@pytest.mark.parametrize("label", ["6.1", "6.12"])
async def test_slots_show_what_they_should_on_hardware(label: str) -> None:
    if not QEMUS:
        pytest.skip(NO_QEMU)
    try:
        image = SvmImage.find(label)
    except MissingPrerequisite as exc:
        pytest.skip(f"{exc.message}; {exc.remedy}")
    result = await run_python_in_svm(image, ("-c", LOOKED_AT), QEMUS[0])
    assert (result.exit_code, result.stderr, result.console) == (0, "", "")
    assert json.loads(result.stdout) == {
        "good": [True, True, True],
        "stores": [True, False, False, False],
        "kept": True,
        "same slots": True,
        "in the hole": [None, False],
        "filled": True,
        "dirty": True,
        "errno": [17, 22, 22],
        "counts": [1, 1, 2],
    }
