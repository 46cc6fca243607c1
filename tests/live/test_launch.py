"""Launching QEMU and finding those that are here: what is left, what is said when it fails."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import pytest

from qmp_memlistener.errors import (
    InputError,
    MissingPrerequisite,
    OperationFailed,
    TargetLost,
    TargetUnreachable,
)
from qmp_memlistener.guests import (
    GuestSpec,
    LaunchedGuest,
    QemuBuild,
    boot_args,
    find_qemus,
    kvm_usable,
    launch,
)
from tests.support.live import builds
from tests.support.qtest import QTest

pytestmark = [pytest.mark.qemu, pytest.mark.full]


def gone(guest: LaunchedGuest) -> bool:
    assert guest.ram is not None
    return not guest.running and not guest.directory.exists() and not guest.ram.exists()


@builds()
@pytest.mark.asyncio
async def test_launch_cleans_up_after_an_exception_and_a_cancellation(build: QemuBuild) -> None:
    spec = GuestSpec(accel="tcg", memory=16 << 20, args=boot_args(), monitors=3).on(build)
    started: asyncio.Queue[LaunchedGuest] = asyncio.Queue()

    async def fail() -> None:
        async with launch(spec) as failing:
            started.put_nowait(failing)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    guest = started.get_nowait()
    assert len(guest.monitors) == 3
    assert gone(guest)

    async def hold() -> None:
        async with launch(spec) as held:
            started.put_nowait(held)
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    async with asyncio.timeout(10):
        guest = await started.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(guest)


@builds()
@pytest.mark.asyncio
async def test_launch_notices_a_guest_that_was_killed(build: QemuBuild) -> None:
    async with launch(GuestSpec(accel="tcg", args=boot_args()).on(build)) as guest:
        guest.process.kill()
        await guest.process.wait()
        assert not guest.running
    assert gone(guest)


@builds()
@pytest.mark.asyncio
async def test_launch_tells_why_qemu_did_not_start(
    build: QemuBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    mkstemp = tempfile.mkstemp

    def remember(prefix: str, suffix: str, dir: Path) -> tuple[int, str]:  # noqa: A002 (mkstemp's)
        handle, name = mkstemp(prefix=prefix, suffix=suffix, dir=dir)
        made.append(Path(name))
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", remember)
    with pytest.raises(OperationFailed, match="no-such-device"):
        async with launch(GuestSpec(accel="tcg", args=("-device", "no-such-device")).on(build)):
            pass
    assert len(made) == 1
    assert not os.path.exists(made[0])  # noqa: ASYNC240 (a look at tmpfs)


@builds()
@pytest.mark.asyncio
async def test_launch_without_shared_memory_or_monitors(build: QemuBuild) -> None:
    spec = GuestSpec(accel="tcg", monitors=0, shared_memory=False, args=boot_args())
    async with launch(spec.on(build)) as guest:
        assert guest.ram is None
        assert guest.monitors == ()
        assert guest.running


@builds()
@pytest.mark.asyncio
async def test_qtest_notices_that_qemu_is_gone(build: QemuBuild) -> None:
    async with launch(GuestSpec(accel="tcg", qtest=True, args=boot_args()).on(build)) as guest:
        assert guest.qtest is not None
        async with await QTest.connect(guest.qtest) as qtest:
            assert await qtest.inw(0xCFC) >= 0
            guest.process.kill()
            await guest.process.wait()
            with pytest.raises(TargetLost):
                await qtest.inb(0x80)
            with pytest.raises(TargetLost):
                await qtest.inb(0x80)
        with pytest.raises(TargetUnreachable):
            await QTest.connect(guest.qtest)


@pytest.mark.asyncio
async def test_a_missing_binary_is_a_missing_prerequisite() -> None:
    with pytest.raises(MissingPrerequisite, match="qemu-system-none") as caught:
        async with launch(GuestSpec(binary="qemu-system-none")):
            pass
    assert caught.value.remedy
    assert kvm_usable("qemu-system-none").reason == "qemu-system-none is not installed"


def test_side_by_side_qemus_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMP_MEMLISTENER_QEMUS", str(tmp_path))
    installed = find_qemus()
    for version, binary in (("99.0", "/bin/true"), ("98.1", "/no/such/binary")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "qemu.json").write_text(
            f'{{"version": "{version}.1", "binary": "{binary}", "aarch64": null,'
            ' "args": ["-L", "/x"], "env": {"QEMU_MODULE_DIR": "/y"}, "packages": []}'
        )
    (tmp_path / "unfinished").mkdir()
    assert find_qemus() == [
        *installed,
        QemuBuild("99.0.1", "/bin/true", None, ("-L", "/x"), {"QEMU_MODULE_DIR": "/y"}),
    ]
    (tmp_path / "unfinished" / "qemu.json").write_text("{")
    with pytest.raises(InputError, match="unfinished"):
        find_qemus()
