"""Every check of the programs `interpreted_*.py`, each in a process of its own: a kernel that hangs ends by timeout."""

import pathlib

import jax
import pytest
from processes import run_checks

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

HERE = pathlib.Path(__file__).parent
CHECKS = {
    "interpreted_attention": (
        "head_sizes", "groups", "uneven_lanes", "extremes", "windows", "in_order_only", "deep", "drawn",
    ),
    "interpreted_selection": ("flat", "two_levels", "three_levels", "deep", "no_survivor", "many_clusters", "drawn",
                              "codes_flat", "codes_levels", "codes_deep"),
    "interpreted_step": (
        "attend_flat", "attend_hierarchical", "attend_default", "same_keys", "equal_keys", "padded_in_the_middle",
        "self_checked",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("program", "check"), [(program, check) for program in CHECKS for check in CHECKS[program]])
def test_interpreted(program, check):
    run_checks(HERE / f"{program}.py", check)
