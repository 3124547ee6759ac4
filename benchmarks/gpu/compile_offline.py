"""The offline half and prefill compiled for an H200 without one: part of `python -m benchmarks.gpu.compile_kernels`."""

import dataclasses

from benchmarks.gpu import deviceless  # before JAX: it sets its environment

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip

import squeezejax  # isort: skip
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.hopper import block_scores, kmeans_assign

from squeezejax.pallas_kernels.hopper import sparse_prefill  # isort: skip
from squeezejax.pallas_kernels.hopper.centroid_tiles import Read  # isort: skip
from squeezejax.pallas_kernels.hopper.mosaic import HEAD_DIMS  # isort: skip


def cases():
    """(what, how to compile it) of every kernel configuration in use."""
    for head_dim in HEAD_DIMS:
        for with_second in (False, True):
            name = f"nearest {'two' if with_second else 'one'} of 6,553 centres, 8 x 131,072 keys of {head_dim}"
            yield name, lambda H=head_dim, second=with_second: compile_assignment(H, second)
    for head_dim, config in sparse_prefill.CONFIGS.items():
        for in_registers in (False, True):
            form = dataclasses.replace(config, in_registers=in_registers)
            where = "registers" if in_registers else "shared memory"
            name = f"8 blocks of 512 rows, 8 heads of {head_dim}, probabilities in {where}"
            yield name, lambda H=head_dim, form=form: compile_prefill(H, form)
    for head_dim in block_scores.CONFIGS:
        for listed in (False, True) if head_dim == 128 else (True,):
            name = f"scores of 32 blocks of 512 rows, 8 heads of {head_dim}, {'listed' if listed else 'all'} of 6,553"
            yield name, lambda H=head_dim, listed=listed: compile_scores(H, listed)


def compile_assignment(head_dim: int, with_second: bool) -> deviceless.Program:
    """One assignment of all heads of a layer."""
    rows = lambda number: jax.ShapeDtypeStruct((8, number, head_dim), jnp.bfloat16)

    def assign(x, centres):
        found = kmeans_assign.nearest(x, centres, with_second=with_second)
        return [a for a in found if a is not None]

    return deviceless.compile_program(assign, *deviceless.on_device((rows(131_072), rows(6553))))


def compile_prefill(head_dim: int, config: sparse_prefill.Config) -> deviceless.Program:
    """Attention of 8 blocks of 128 tokens and 4 query heads a key/value head over listed rows of 131,072."""
    shape = jax.ShapeDtypeStruct
    q, cache = shape((64, 512, head_dim), jnp.bfloat16), shape((2, 8, 131_072, head_dim), jnp.bfloat16)
    lists = shape((64, 16_384), jnp.int32), shape((64,), jnp.int32), shape((), jnp.int32)
    attend = lambda *arguments: sparse_prefill.attend_items(*arguments, config=config)
    return deviceless.compile_program(attend, *deviceless.on_device((q, cache, cache, *lists)))


def compile_scores(head_dim: int, listed: bool) -> deviceless.Program:
    """Both passes of scoring 32 blocks of 128 tokens and 4 query heads a key/value head."""
    shape, C = jax.ShapeDtypeStruct, 6656
    lanes, rows = (256, 512) if listed else (8, 32 * 512)
    part = shape((8, C, head_dim), jnp.bfloat16)
    lists = (shape((256, C // 8), jnp.int32), shape((256,), jnp.int32)) if listed else ()
    read = Read(part, part, shape((lanes, C), jnp.float32), *lists)
    arguments = shape((lanes, rows, head_dim), jnp.bfloat16), shape((lanes, rows), bool), read, shape((), jnp.float32)
    return deviceless.compile_program(block_scores.sum_scores, *deviceless.on_device(arguments))


def compile_kmeans(heads: int = 8, num_keys: int = 131_072, head_dim: int = 128) -> deviceless.Program:
    """The whole K-means of one level, all heads of a layer."""
    keys = jax.ShapeDtypeStruct((heads, num_keys, head_dim), jnp.bfloat16)
    seeds = jax.ShapeDtypeStruct((heads, 2), jnp.uint32)

    def cluster(keys, seeds):
        one = lambda x, seed: squeezejax.kmeans(
            x, num_keys // 20, key=jax.random.wrap_key_data(seed), implementation="mosaic"
        )
        return jax.vmap(one)(keys, seeds)

    with registry.force_mosaic():
        return deviceless.compile_program(cluster, *deviceless.on_device((keys, seeds)))
