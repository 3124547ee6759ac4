"""Every check of the programs `interpreted_*.py`, each in a process of its own: a kernel that hangs ends by timeout."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

HERE = pathlib.Path(__file__).parent
# NPROC is the size of XLA's thread pool: with two threads, on a small machine, the interpreter's warpgroups, which wait
# for one another there, sometimes wait for ever.
OPTIONS = {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
CHECKS = {
    "interpreted_attention": (
        "head_sizes", "groups", "uneven_lanes", "extremes", "windows", "in_order_only", "drawn",
    ),
    "interpreted_selection": ("flat", "two_levels", "three_levels", "no_survivor", "many_clusters", "drawn"),
    "interpreted_step": (
        "attend_flat", "attend_hierarchical", "equal_keys", "padded_in_the_middle", "self_checked",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("program", "check"), [(program, check) for program in CHECKS for check in CHECKS[program]])
def test_interpreted(program, check):
    run = subprocess.run(
        [sys.executable, HERE / f"{program}.py", check],
        env=os.environ | OPTIONS, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
