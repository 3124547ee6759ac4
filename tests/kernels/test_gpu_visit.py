"""The visit to a GPU, rehearsed on the CPU with tiny shapes: it runs, says so, and goes on where it stopped."""

import json

import jax
import pytest
from processes import run_python

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

# One of each kind; the others differ in shapes.
KINDS = ("check attention", "ceilings", "time SDPA of PyTorch", "time 32/8, 128K, 0.10", "model 8B, 32K")


def visit(out, *options):
    return run_python("-m", "benchmarks.gpu_visit", "--dry-run", "--out", out, *options)


def test_dry_run_passes_and_resumes(tmp_path):
    first = visit(tmp_path, "--suites", *KINDS, "--minutes", "60")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    results = json.loads((tmp_path / "gpu_visit_dry_run.json").read_text())
    assert {name: found["status"] for name, found in results["suites"].items()} == dict.fromkeys(KINDS, "passed")
    assert "mean nothing" in results["dry run"]
    assert 0 < results["suites"]["time 32/8, 128K, 0.10"]["kept fraction"] < 1
    text = (tmp_path / "gpu_visit_dry_run.md").read_text()
    assert "times over best dense" in text
    assert "of the byte limit" in text

    second = visit(tmp_path, "--minutes", "0")  # no time: what passed stays, the rest is named
    assert second.returncode == 1
    results = json.loads((tmp_path / "gpu_visit_dry_run.json").read_text())
    assert results["suites"]["check attention"]["status"] == "passed"
    assert results["suites"]["check step"]["status"] == "not reached"


def test_an_unknown_suite_is_refused(tmp_path):
    run = visit(tmp_path, "--suites", "time everything")
    assert run.returncode == 2
    assert "no suite is called time everything" in run.stderr
