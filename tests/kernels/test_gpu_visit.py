"""The visit to a GPU, rehearsed on the CPU with tiny shapes: it runs, says so, and goes on where it stopped."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

ROOT = pathlib.Path(__file__).parents[2]


def visit(out, *options):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_visit", "--dry-run", "--out", out, *options],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def test_dry_run_passes_and_resumes(tmp_path):
    first = visit(tmp_path, "--suites", "check attention", "time dry flat")
    assert first.returncode == 0, first.stderr[-3000:]
    results = json.loads((tmp_path / "gpu_visit_dry_run.json").read_text())
    assert {name: found["status"] for name, found in results["suites"].items()} == {
        "check attention": "passed",
        "time dry flat": "passed",
    }
    assert "mean nothing" in results["dry run"]
    second = visit(tmp_path, "--minutes", "0")  # no time: what passed stays, the rest is named
    assert second.returncode == 1
    results = json.loads((tmp_path / "gpu_visit_dry_run.json").read_text())
    assert results["suites"]["check attention"]["status"] == "passed"
    assert results["suites"]["check step"]["status"] == "not reached"
    assert (tmp_path / "gpu_visit_dry_run.md").read_text()
