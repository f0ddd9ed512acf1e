"""Every kernel compiles for GPUs that are not here, as its public function launches it.

Fails on a compile error, too much shared memory, a 16-bit product off the tensor cores, a float32
product in tf32, a spill, rows read by less than 16 bytes at the LLaDA shape; and on a
scan that has grown beyond what its comment argues with.  See aot.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
LIMITS = {"_decide_kernel": 230, "_nll_kernel": 180}  # instructions for 16 elements of bf16


def start(out, *options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/aot.py", *options, "--json", str(out)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def finish(process, out):
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return json.loads(out.read_text())["rows"]


def check_scans(rows):
    """The scan's loop is as its comment says."""
    rows = [row for row in rows if row["constexprs"].get("GROUP") == 8]  # bf16, 16-byte loads
    assert {row["kernel"] for row in rows} == {*LIMITS}
    for row in rows:
        assert row["instructions"] <= LIMITS[row["kernel"]] and row["registers"] <= 64, row
        assert row["load_bits"] == "2x128", row


def test_every_kernel_compiles_for_real_gpus(tmp_path):
    names = [name for name in dir(kernels) if name.endswith("_kernel")]
    targets = "sm_80", "sm_90", "sm_100"
    outs = [tmp_path / target for target in targets]
    runs = [start(out, "--brief", "--targets", out.name) for out in outs]
    for run, out in zip(runs, outs):
        rows = finish(run, out)
        assert {row["kernel"] for row in rows} == {*names}, out.name
        if out.name == "sm_90":
            check_scans(rows)
