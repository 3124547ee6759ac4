"""A decode step compiled for an H200 without one: launches, no copy, no spill, no scratch that warpgroups share."""

import importlib.util
import json

import jax
import pytest
from processes import run_python

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)
if importlib.util.find_spec("jax_plugins.xla_cuda13") is None and importlib.util.find_spec("jax_plugins") is None:
    pytest.skip("compiling for an H200 needs jax[cuda13]", allow_module_level=True)

# Kernels: scores, marks and lists of each level; scores and lists of keys; attention; merge. Launches: also what XLA
# sums up between them, and for codes the queries' parts and terms.
CASES = {
    "flat": ({"head_dim": 128, "group": 4}, 5, 10),
    "two levels": ({"head_dim": 128, "group": 4, "fractions": (0.01, 0.05)}, 8, 18),
    "codes": ({"head_dim": 128, "group": 4, "users": 2, "ours": True}, 7, 30),
}
PROGRAM = """
import json, sys
from benchmarks.gpu.compile_kernels import Case, compile_step, launches
found = []
for options in json.loads(sys.argv[1]):
    case = Case(**options)
    program = compile_step(case)
    cache = 2 * case.kv_heads * case.num_keys * case.head_dim * 2
    found.append([len(program.kernels), len(launches(program)), program.temporaries / cache,
                  sum(kernel.spilled for kernel in program.kernels),
                  [wrong for kernel in program.kernels for wrong in kernel.wrong]])
print(json.dumps(found))
"""


GENERATE = """
import glob, json, os, re, tempfile
dump = tempfile.mkdtemp()
os.environ["XLA_FLAGS"] = "--xla_dump_to=" + dump
from benchmarks.gpu.compile_kernels import Case, compile_generate, launches
case = Case(64, 4, kv_heads=2, num_keys=32768, layers=4)
program = compile_generate(case)
cache = 2 * case.kv_heads * case.num_keys * case.head_dim * 2
copies = [line for line in program.text.splitlines() if re.search(r" = bf16\\[[0-9,]*32768", line)
          and (" copy(" in line or " dynamic-slice(" in line)]
names = [kernel.name for kernel in program.kernels]
[plan] = glob.glob(dump + "/*jit_run.thunk_sequence_after_thunk_passes.txt")
graphs = []
for line in open(plan):
    depth = len(line) - len(line.lstrip())
    graphs = [graph for graph in graphs if graph < depth]
    if "kCommandBuffer" in line:
        graphs.append(depth)
    if "kCustomCall " in line:
        names.append(len(graphs) > 0)
print(json.dumps([names, len(launches(program, "sparse_decode")), program.temporaries / cache, copies]))
"""
DECODE = ("centroid_scores", "keep_clusters", "list_items", "sparse_decode", "merge_shares")


def test_a_whole_generate_holds_the_kernels_once_in_graphs_and_no_copy():
    """In the loop over layers in the loop over steps the kernels are there once, and XLA launches them as part of CUDA
    graphs, by default, as on a machine whose driver is that of h200.textproto. Temporaries are under one layer's keys
    and values, a quarter of them the prefill's partial results, 32 KB for each of 132 CTAs."""
    run = run_python("-c", GENERATE)
    assert run.returncode == 0, run.stderr[-3000:]
    names, launches, temporaries, copies = json.loads(run.stdout.splitlines()[-1])
    assert [names.count(name) for name in DECODE] == [1] * 5
    assert names[-5:] == [True] * 5  # calls in a graph; decoding comes last in the program
    assert (
        launches <= 30
    )  # of a layer: products, norms, writes to the users' cache, these five and what XLA computes for them
    assert temporaries < 0.6
    assert not copies


@pytest.fixture(scope="module")
def compiled():
    """What each case compiled to. In a process of its own: compiling for a device sets the environment of JAX."""
    options = json.dumps([case for case, *_ in CASES.values()])
    run = run_python("-c", PROGRAM, options)
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(zip(CASES, json.loads(run.stdout.splitlines()[-1]), strict=True))


# All on one worker, so that what they share is compiled once.
pytestmark = pytest.mark.xdist_group("compiled")


@pytest.mark.parametrize("case", CASES)
def test_launches_of_a_decode_step(compiled, case):
    kernels, launches, *_ = compiled[case]
    assert kernels == CASES[case][1]
    assert launches <= CASES[case][2]


@pytest.mark.parametrize("case", CASES)
def test_keys_and_values_are_not_copied(compiled, case):
    """Temporaries are a few percent of one layer's keys and values."""
    assert compiled[case][2] < 0.05


@pytest.mark.parametrize("case", CASES)
def test_nothing_spills(compiled, case):
    assert compiled[case][3] == 0


@pytest.mark.parametrize("case", CASES)
def test_warpgroups_reduce_apart(compiled, case):
    assert compiled[case][4] == []
