"""Every check of `interpreted.py`, each in a process of its own: a kernel that hangs ends with its timeout."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

HERE = pathlib.Path(__file__).parent
CHECKS = (
    "attention_of_head_sizes",
    "attention_of_groups",
    "attention_of_uneven_lanes",
    "attention_of_extremes",
    "attention_of_layers",
    "attention_dense",
    "selection",
    "selection_of_many_clusters",
    "attend_flat",
    "attend_hierarchical",
    "attend_of_equal_keys",
    "inactive_users",
    "drawn",
)


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(check):
    run = subprocess.run(
        [sys.executable, HERE / "interpreted.py", check],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
