"""The measurement of refits on GPUs runs once, tiny, so that it cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu" / "refit.py"


def test_the_measurement_of_refits_on_gpus_runs(tmp_path):
    out = tmp_path / "figures.json"
    options = ("--model", "tiny", "--repetitions", "1", "--small-cycles", "20")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    body = json.loads(out.read_text())
    assert body["failures"] == []
    found = {(figure["target"], figure["quantity"]) for figure in body["figures"]}
    expected = {
        ("T7", "cast / plain read without fingerprints"),
        ("T8", "with fingerprints / without"),
        ("T11", "wrong tiles at the end"),
        ("T14", "snapshot, copy"),
        ("T14", "shadow, commit / device copy"),
        ("host", "one cudaMemcpyAsync, pinned memory"),
        ("host", "warm refit with fingerprints, total / copy engine"),
        ("host", "publish, copy / copy engine"),
        ("T2", "warm refit without fingerprints, all but the transfer"),
    }
    assert expected <= found
    assert {
        "host to host",
        "tiny, 2 layers, host to host",
        "tiny, 2 layers, mapped host to host",
        "tiny, 2 layers, other host to host",
        "tiny, 2 layers, snapshots in the host",
    } <= {figure["workload"] for figure in body["figures"] if figure["target"] == "host"}
    assert all(figure["median"] >= 0 for figure in body["figures"])
