"""OpenMetrics text: accepted by prometheus' own parser, and the numbers are the recording's."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from qmp_memlistener.exports import Format, export
from tests.unit.exports.export_support import documents, odd_recording

PREFIX = "qmp_memlistener_recording_"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(source: Path, tmp_path: Path) -> Samples:
    """By name and labels."""
    parser = pytest.importorskip(
        "prometheus_client.openmetrics.parser", reason="needs pip install prometheus-client"
    )
    target = tmp_path / "m.txt"
    export(str(source), Format.OPENMETRICS, str(target))
    found: Samples = {}
    for family in parser.text_string_to_metric_families(target.read_text()):
        for sample in family.samples:
            key = (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def test_counters_are_those_of_the_records(source: Path, tmp_path: Path) -> None:
    found = read(source, tmp_path)
    docs = documents(source).values()
    for tag, count in Counter(d["type"] for d in docs).items():
        assert found["records_total", (("type", tag),)] == count
    causes = Counter((d["cause"]["type"], d["detail"]) for d in docs if d["type"] == "transition")
    for (cause, detail), count in causes.items():
        assert found["transitions_total", (("cause", cause), ("detail", detail))] == count
    for tag, name in (("lost", "losses"), ("guest_reset", "guest_resets")):
        assert found[f"{name}_total", ()] == sum(d["type"] == tag for d in docs)


def test_histograms_are_those_of_the_stalls(source: Path, tmp_path: Path) -> None:
    found = read(source, tmp_path)
    stalls = [d for d in documents(source).values() if d["type"] == "stall"]
    for bound in ("at_most", "at_least"):
        name = f"stall_{bound}_seconds"
        for kind in {s["kind"] for s in stalls}:
            lengths = [s[f"{bound}_ns"] for s in stalls if s["kind"] == kind]
            assert found[f"{name}_count", (("kind", kind),)] == len(lengths)
            assert found[f"{name}_sum", (("kind", kind),)] == pytest.approx(sum(lengths) / 1e9)
            buckets = {
                float(dict(labels)["le"]): value
                for (sample, labels), value in found.items()
                if sample == f"{name}_bucket" and dict(labels)["kind"] == kind
            }
            assert len(buckets) > 20
            for le, value in buckets.items():
                assert value == sum(length <= round(le * 1e9, 3) for length in lengths), le


def test_a_kind_that_no_probe_measured_has_no_series(source: Path, tmp_path: Path) -> None:
    found = read(source, tmp_path)
    docs = documents(source).values()
    active = [p for d in docs if d["type"] == "probes" for p in d["probes"] if p["active"]]
    kinds = {kind for p in active for kind in p["measures"]}
    kinds |= {d["kind"] for d in docs if d["type"] == "stall"}
    shown = {
        dict(labels)["kind"] for name, labels in found if name == "stall_at_most_seconds_count"
    }
    assert shown == kinds


def test_words_of_a_later_version_make_no_new_series(tmp_path: Path) -> None:
    found = read(odd_recording(tmp_path / "odd.jsonl"), tmp_path)
    ops = {labels for name, labels in found if name == "slot_operations_total"}
    assert ops == {
        (("op", "add"), ("predicted", "other")),
        (("op", "other"), ("predicted", "true")),
    }
    assert ("slots", ()) not in found  # no map told


def test_promtool_takes_it(source: Path, tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool: apt-get install prometheus")
    export(str(source), Format.OPENMETRICS, str(tmp_path / "m.txt"))
    done = subprocess.run(
        [
            promtool,
            "tsdb",
            "create-blocks-from",
            "openmetrics",
            tmp_path / "m.txt",
            tmp_path / "db",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
