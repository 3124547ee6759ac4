"""The plan for a mesh against the compiled program: what lies on each device, and what devices tell each other."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import squeezejax
from squeezejax.models.config import LlamaConfig
from squeezejax.models.llama import Llama
from squeezejax.plan import plan, tree_shapes

SIZES = {"vocab_size": 512, "model_dim": 256, "mlp_dim": 512, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4}
KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
LANES = 4  # two users and two key/value heads on each device of the mesh below


def place(mesh, x):
    describe = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.tree.map(describe, x, squeezejax.shardings(mesh, x))


def payload(line: str) -> int:
    """Bytes that a line of HLO sends in one decode step, all repetitions together; 0 for other lines."""
    found = re.search(rf"= (.*?) (?:{KINDS})(?:-start)?\(", line)
    if not found or "decode/" not in line or "branch_1_fun/reduce" in line:  # sampling, beside the greedy choice
        return 0
    widths = {"f32": 4, "s32": 4, "pred": 1}
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
    once = sum(widths[dtype] * math.prod(int(n) for n in axes.split(",") if n) for dtype, axes in arrays)
    layers = SIZES["num_layers"] if "closed_call" in line else 1
    return once * layers * (LANES if re.search(r"branch_0_fun/while/body/closed_call/p(max|sum)", line) else 1)


def test_generate():
    """2 × 2 × 2 devices: arguments to the byte, temporaries within 30 %, every byte that is sent."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "model", "context"))
    params = jax.eval_shape(lambda: Llama(LlamaConfig(**SIZES, head_dim=32), key=jax.random.key(0)))
    config = squeezejax.SqueezeConfig.paper(cluster_fractions=(0.05,))
    tree = tree_shapes(params, 8192, config, parts=2)

    def generate(params, tree, tokens, lengths):
        return squeezejax.generate(params, tree, tokens, lengths=lengths, max_new_tokens=500, implementation="xla")

    inputs = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 8), (4,))]
    compiled = jax.jit(generate, keep_unused=True).lower(place(mesh, params), place(mesh, tree), *inputs).compile()
    made = plan(params, 8192, config, mesh=mesh, users=4, room=508)
    used = compiled.memory_analysis()
    assert used.argument_size_in_bytes == made.memory.weights + made.memory.tree + 4 * (2 * 8 + 2)  # two users here
    assert used.temp_size_in_bytes == pytest.approx(made.memory.state + made.memory.temporaries, rel=0.3)
    sent = sum(map(payload, compiled.as_text().splitlines()))
    assert sent == sum(collective.bytes for collective in made.collectives)
