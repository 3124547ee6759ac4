"""Compiles `generate` and its kernels for eight H200s, without one: `python -m benchmarks.gpu.compile_sharded`.

Two layers with the heads of a 70B model (64 / 8 of 128) over 128,000 keys. Fails on a kernel that spills or is missing,
and on a collective that could carry a layer's keys. Says nothing about speed.
"""

import math
import re
import sys

from benchmarks.gpu import deviceless  # before JAX: it sets its environment

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from jax.sharding import NamedSharding, PartitionSpec  # isort: skip

import squeezejax  # isort: skip
from squeezejax.models.config import LlamaConfig  # isort: skip
from squeezejax.models.llama import Llama  # isort: skip
from squeezejax.pallas_kernels import registry  # isort: skip
from squeezejax.plan import tree_shapes  # isort: skip

HEADS = {"num_heads": 64, "num_kv_heads": 8, "head_dim": 128}
MODEL = LlamaConfig(vocab_size=1024, model_dim=1024, mlp_dim=2048, num_layers=2, **HEADS)
CONFIG = squeezejax.SqueezeConfig.paper()
NUM_KEYS, USERS = 128_000, 2
MESHES = ({"model": 8}, {"data": 2, "model": 4})
KERNELS = {"centroid_scores", "keep_clusters", "list_items", "sparse_decode", "merge_shares"}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
WIDTHS = {"pred": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}


def compile_generate(axes: dict[str, int]) -> deviceless.Program:
    """`generate` on a mesh with these axes."""
    mesh = deviceless.mesh(axes)
    params = jax.eval_shape(lambda: Llama(MODEL, key=jax.random.key(0), dtype=jnp.bfloat16))
    tree = tree_shapes(params, NUM_KEYS + CONFIG.observation_window, CONFIG)
    placed = [deviceless.on_devices(x, squeezejax.shardings(mesh, x)) for x in (params, tree)]

    def generate(params, tree, tokens):
        return squeezejax.generate(params, tree, tokens, max_new_tokens=16, implementation="mosaic")

    with registry.force_mosaic():
        tokens = jax.ShapeDtypeStruct((USERS, 8), jnp.int32)
        return deviceless.compile_program(generate, *placed, tokens, out_shardings=NamedSharding(mesh, PartitionSpec()))


def largest_collective(program: deviceless.Program) -> int:
    """Bytes of the largest result that devices get from one another."""
    results = re.findall(rf" = (.*?) (?:{COLLECTIVES})(?:-start)?\(", program.text)
    return max(sum(map(_bytes, re.findall(r"(\w+)\[([\d,]*)\]", result))) for result in results)


def _bytes(array: tuple[str, str]) -> int:
    dtype, axes = array
    return WIDTHS[dtype] * math.prod(int(size) for size in axes.split(",") if size)


def faults(axes: dict[str, int], program: deviceless.Program):
    """What is wrong with the program, in sentences."""
    heads = MODEL.num_kv_heads // axes["model"]
    keys = NUM_KEYS * heads * MODEL.head_dim * 2  # of a layer, on one device
    for kernel in program.kernels:
        if kernel.spilled:
            yield f"{kernel.name} spills {kernel.spilled} bytes"
    for name in sorted(KERNELS - {kernel.name for kernel in program.kernels}):
        yield f"the kernel {name} is missing"
    if largest_collective(program) > keys // 50:
        yield f"a collective has {largest_collective(program)} bytes, keys of a layer {keys}"
    if program.temporaries > keys:
        yield f"temporaries take {program.temporaries} bytes, keys of a layer {keys}"


def main():
    """Compiles for every mesh, and exits with 1 if anything is wrong."""
    wrong = []
    for axes in MESHES:
        program = compile_generate(axes)
        found = list(faults(axes, program))
        print(
            f"{axes}: {len(program.kernels)} kernels, temporaries {program.temporaries / 1e6:.1f} MB, largest "
            f"collective {largest_collective(program) / 1e3:.1f} kB; {'; '.join(found) or 'nothing wrong'}",
            flush=True,
        )
        wrong += found
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
