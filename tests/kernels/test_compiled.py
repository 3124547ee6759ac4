"""A decode step compiled for an H200 without one: launches, no copy of keys or values, no spill."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)
if importlib.util.find_spec("jax_plugins.xla_cuda13") is None and importlib.util.find_spec("jax_plugins") is None:
    pytest.skip("compiling for an H200 needs jax[cuda13]", allow_module_level=True)

ROOT = pathlib.Path(__file__).parents[2]
# Kernels: scores and marks of each level, list, attention, merge. The rest is XLA's, most of it window and user tokens.
CASES = {
    "flat": ({"head_dim": 128, "group": 4}, 5, 21),
    "two levels": ({"head_dim": 128, "group": 4, "fractions": (0.01, 0.05)}, 7, 27),
    "users": ({"head_dim": 64, "group": 2, "users": 4}, 5, 26),
}
PROGRAM = """
import json, sys
from benchmarks.compile_kernels import Case, compile_step, launches
found = []
for options in json.loads(sys.argv[1]):
    case = Case(**options)
    program = compile_step(case)
    cache = 2 * case.kv_heads * case.num_keys * case.head_dim * 2
    found.append([len(program.kernels), len(launches(program)), program.temporaries / cache,
                  sum(kernel.spilled for kernel in program.kernels)])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    """What each case compiled to. In a process of its own: compiling for a device sets the environment of JAX."""
    options = json.dumps([case for case, *_ in CASES.values()])
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, options],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(zip(CASES, json.loads(run.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_launches_of_a_decode_step(compiled, case):
    kernels, launches, _, _ = compiled[case]
    assert (kernels, launches) == CASES[case][1:]


@pytest.mark.parametrize("case", CASES)
def test_keys_and_values_are_not_copied(compiled, case):
    """Temporaries are a few percent of one layer's keys and values."""
    assert compiled[case][2] < 0.05


@pytest.mark.parametrize("case", CASES)
def test_nothing_spills(compiled, case):
    assert compiled[case][3] == 0
