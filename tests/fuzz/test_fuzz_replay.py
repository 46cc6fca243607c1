"""Damaged logs and recordings: what is read can be replayed, or one of our errors says why not."""

from __future__ import annotations

import functools
import gzip
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_memlistener.errors import MemListenerError
from qmp_memlistener.kvmlab.replay.read import read_replay
from tests.fuzz.test_fuzz_recording import mutated as damaged
from tests.unit.kvmlab.replay_rendering import check

REPLAY = Path(__file__).parents[1] / "conformance" / "replay"
LOGS = ("7.2/pc-plain.log", "7.2/q35-stamped.log", "10.0/pc-marked.log", "11.1/pc-stamped.log")
RECORDINGS = ("7.2/q35-traced.jsonl", "10.0/pc-paced.jsonl", "10.0/pc-tcg.jsonl")
NUMBERS = (b"0x0", b"0x1", b"0xfff", b"0x1000", b"0xffffffffffffffff", b"0xfffffffffffff000", b"3",
           b"0x1000000000000", b"-1", b"65535", b"65536", b"99999", b"2147483647")  # fmt: skip


@functools.cache
def sample(name: str) -> bytes:
    return gzip.decompress((REPLAY / f"{name}.gz").read_bytes())


def with_accidents(rng: random.Random, data: bytes) -> bytes:
    """Lines of a log that are gone, doubled, swapped, cut, or have another number in them."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 2, 4, 30))):
        at = rng.randrange(len(lines))
        match rng.randrange(7):
            case 0:
                del lines[at : at + rng.choice((1, 1, 2, 9))]
                lines = lines or [b""]
            case 1:
                lines[at:at] = lines[at : at + rng.randrange(4)]
            case 2:
                other = rng.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
            case 4:
                lines[at : at + 2] = [b"".join(lines[at : at + 2])]
            case _:
                words = lines[at].split(b" ")
                i = rng.randrange(len(words))
                name, sep, _ = words[i].rpartition(b"=" if b"=" in words[i] else b"#")
                words[i] = name + sep + rng.choice(NUMBERS)
                lines[at] = b" ".join(words)
    return b"\n".join(lines)


def read(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        path.write_bytes(data)
        refused: MemListenerError | None = None
        try:
            found = read_replay(str(path))
        except MemListenerError as exc:
            refused = exc
    if refused is None:
        check(found)
    else:
        assert refused.exit_code == 2
        assert refused.remedy


@pytest.mark.parametrize("name", LOGS)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=25, deadline=None)
def test_damaged_logs(name: str, seed: int) -> None:
    rng = random.Random(seed)
    data = sample(name)
    lines = data.split(b"\n")
    first = rng.randrange(len(lines))
    data = b"\n".join(lines[first : first + rng.randrange(2, 60)])
    read(with_accidents(rng, data))


@pytest.mark.parametrize("name", RECORDINGS)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=25, deadline=None)
def test_damaged_recordings(name: str, seed: int) -> None:
    rng = random.Random(seed)
    lines = sample(name).split(b"\n")
    read(damaged(rng, b"\n".join(lines[: rng.randrange(2, 120)])))


@given(st.binary(max_size=3000))
@settings(max_examples=50, deadline=None)
def test_random_bytes(data: bytes) -> None:
    read(data)


def test_operations_at_random() -> None:
    """No guest did these; every one says that KVM took it."""
    for seed in range(40):
        rng = random.Random(seed)
        flags = (0, 0, 0, 1, 2, 3, 4, 8)
        text = [
            f"kvm_set_user_memory AddrSpace#{rng.randrange(2)} Slot#{rng.randrange(6)}"
            f" flags={rng.choice(flags):#x} gpa={rng.randrange(12) << 12:#x}"
            f" size={rng.randrange(5) << 12:#x} ua={0x7F0000000000 + (rng.randrange(40) << 12):#x}"
            f" guest_memfd=-1 guest_memfd_offset=0x0 ret={rng.choice((0, 0, 0, 0, -17))}"
            for _ in range(30)
        ]
        read("\n".join(text).encode() + b"\n")
