"""A whole `generate` compiled for an H200 without one; single steps are part of `benchmarks.gpu.compile_kernels`."""

import importlib.util
import json

import jax
import pytest
from processes import run_python

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)
if importlib.util.find_spec("jax_plugins.xla_cuda13") is None and importlib.util.find_spec("jax_plugins") is None:
    pytest.skip("compiling for an H200 needs jax[cuda13]", allow_module_level=True)

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
