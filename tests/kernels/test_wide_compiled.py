"""Decode steps of the backend "wide", compiled for three generations of GPUs without one: launches, loops, copies."""

import importlib.util
import json

import jax
import pytest
from processes import run_python

if jax.__version_info__ < (0, 11):
    pytest.skip("compiling for a GPU is done with JAX 0.11 or later", allow_module_level=True)
if importlib.util.find_spec("jax_plugins.xla_cuda13") is None and importlib.util.find_spec("jax_plugins") is None:
    pytest.skip("compiling for a GPU needs jax[cuda13]", allow_module_level=True)

pytestmark = pytest.mark.xdist_group("compiled")

STEP = """
import json, sys
from benchmarks.gpu import compile_wide, program_text
from squeezejax.pallas_kernels.wide.backend import step_bytes
case = compile_wide.Case(**json.loads(sys.argv[2]))
program = compile_wide.compile_step(case, sys.argv[1])
counted = {name: len(program_text.launches(program.text, taken)) for name, taken in compile_wide.paths().items()}
moved = {name: compile_wide.count(case, program, taken).bytes for name, taken in compile_wide.paths().items()}
cache = 2 * case.kv_heads * case.num_keys * case.head_dim * 2
planned = step_bytes(compile_wide.tree_shapes(case), case.group, case.users)
loops, faults = program_text.loops(program.text), list(compile_wide.faults(case, program))
print(json.dumps([counted, moved, cache, program.temporaries / planned, loops, faults]))
"""
CODES = {"head_dim": 128, "group": 4, "bits": (4, 2)}


@pytest.mark.parametrize(
    ("capability", "case", "most"),
    [
        ("8.0", CODES, {"every key": 20, "room": 46}),
        ("9.0", CODES, {"every key": 20, "room": 46}),
        ("10.0", CODES, {"every key": 20, "room": 46}),
        ("9.0", {"head_dim": 128, "group": 4}, {"every key": 20, "room": 40}),
    ],
    ids=["sm_80", "sm_90", "sm_100", "the paper's rule"],
)
def test_a_step_is_a_fixed_number_of_launches(capability, case, most):
    """No loop at all; keys and values are read once where all are, and in a room as many as it holds."""
    run = run_python("-c", STEP, capability, json.dumps(case))
    assert run.returncode == 0, run.stderr[-3000:]
    launches, moved, cache, temporaries, loops, faults = json.loads(run.stdout.splitlines()[-1])
    assert launches.pop("every key") <= most["every key"]
    assert max(launches.values()) <= most["room"]
    assert loops == []
    assert 0.5 < temporaries < 1  # of what is planned for
    assert faults == []
    assert cache < moved["every key"] < 1.6 * cache
    assert moved["room of 1/16"] < 0.5 * cache
    assert moved["room of 1/4"] - moved["room of 1/8"] < 0.22 * cache  # an eighth, and what is written besides


TOKEN = """
import json
from benchmarks.gpu import compile_wide, program_text
program = compile_wide.compile_token(compile_wide.Case(128, 4, num_keys=32768, layers=4, bits=(4, 2)))
loops = program_text.loops(program.text)
[layer] = [body for known, body in loops if known]
launches = [len(program_text.launches(program.text, taken, layer)) for taken in compile_wide.paths().values()]
print(json.dumps([[known for known, _ in loops], launches]))
"""


def test_a_generated_token():
    """Of loops there are those over tokens, whose end depends on what is said, and over layers, of known length."""
    run = run_python("-c", TOKEN)
    assert run.returncode == 0, run.stderr[-3000:]
    loops, launches = json.loads(run.stdout.splitlines()[-1])
    assert sorted(loops) == [False, True]
    assert max(launches) <= 75  # attention's and the model's: products, norms, writes to the users' cache
