"""Offline: a fixed context's tokens become a calibrated tree, layer by layer (docs/method.md, Offline).

Each layer in turn reads the hidden states of the whole context in chunks of tokens (dense causal attention over the
keys so far), then its keys are clustered and written into the tree. Beside the tree and the hidden states only one
layer's keys and values are alive, and scores of one chunk.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from squeezejax import buckets
from squeezejax.arguments import check_context, on_device
from squeezejax.config import FALLBACK_QUERIES, SqueezeConfig
from squeezejax.mesh import sharding
from squeezejax.mesh.parts import split_layer
from squeezejax.offline.build import (
    build_layer,
    check_context_length,
    check_finite,
    clustering_of,
    dimension_weights,
    room_for,
)
from squeezejax.offline.calibrate import calibrate
from squeezejax.offline.kmeans import Clustering
from squeezejax.offline.progress import Progress, Reporter
from squeezejax.offline.unfinished import Unfinished
from squeezejax.online.attention import attend_context
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.layout import split_heads
from squeezejax.plan import check_build_fits, dtype_of
from squeezejax.tree import Tree, TreeLayer, layer_fields, stack_layers

CHUNK = 512  # context tokens in one forward step


def squeeze(
    params,
    tokens,
    config: SqueezeConfig = SqueezeConfig(),  # noqa: B008 - frozen
    *,
    key=None,
    progress: Callable[[Progress], None] | bool | None = None,
    checkpoint=None,
    finished: Callable[[Tree], None] | None = None,
    implementation: str | None = None,
) -> Tree:
    """Prefills, clusters and calibrates a fixed context once, for any number of questions (paper section 3.1).

    tokens i32[sinks+S+W], the context from its first token on. `key` seeds K-means (default `jax.random.key(0)`): the
    same key gives the same tree. `progress`: True draws a bar on standard error, a function receives `Progress`.
    `checkpoint` names a folder that keeps every finished layer: after an interruption, the same call goes on from
    there to the same tree, bit for bit. It is removed when the tree is complete, takes as much room as the tree and
    the hidden states of the context together, and must not belong to another build. `finished` receives the complete
    tree before the checkpoint is removed: save the tree there, and no kill can lose it. `implementation` of the
    clustering, as for `kmeans`.

    Raises ValueError for token ids out of range, a context no longer than the observation window, a model whose keys
    are not finite, a checkpoint of another build, a damaged one or one that a running build uses, and a build that
    surely does not fit in memory; NotImplementedError for a checkpoint on several hosts.
    """
    tokens = check_context(tokens, params.config.vocab_size)
    length = tokens.shape[1]
    check_context_length(length, config)
    check_build_fits(params, length, config)
    L = params.config.num_layers
    seeds = jax.random.split(jax.random.key(0) if key is None else key, L)
    num_queries = config.observation_window or min(FALLBACK_QUERIES, length)
    digest = hash_tokens(tokens)
    report = Reporter(L, layer_work(params.config, length, config), progress)

    saved = None if checkpoint is None else Unfinished(checkpoint, params, digest, config, seeds)
    with saved or contextlib.nullcontext():
        tree, queries = _build(params, tokens, config, seeds, num_queries, saved, report, implementation)
        tree = dataclasses.replace(tree, fingerprint=params.config.fingerprint, context_hash=digest)
        tree = finish(tree, queries, report)
        if finished is not None:
            finished(tree)
        if saved is not None:
            saved.remove()
    return tree


def _build(params, tokens, config, seeds, num_queries: int, saved: Unfinished | None, report, implementation):
    """All layers -> (an uncalibrated tree, a list with the last queries [N W H] of every layer)."""
    L, length = params.config.num_layers, tokens.shape[1]
    num_keys = length - config.always_read
    clustering = clustering_for(params, config, length)
    num_rows, real = room_for(length, config, clustering, dtype_of(params))
    x = embed_chunked(params, tokens, config.always_read + num_rows)
    tree, queries = None, []
    if saved is not None and saved.num_layers:
        for i in range(saved.num_layers):
            layer = dataclasses.replace(_beside(x, saved.layer(i)), num_keys=num_rows)
            tree = write_layer(tree, layer, i, L)
        queries, x = saved.state(x)
        report.skip(saved.num_layers)
    for i in range(len(queries), L):
        x, keys, values, q = prefill_layer(params, i, x, length, num_queries, report)
        with report.spend("clustering"):
            options = {"implementation": implementation, "num_rows": num_rows, "real": real}
            layer = cluster_layer(keys, values, i, config, seeds[i], clustering, **options)
            del keys, values  # as large as the layer, and not needed while the next one is read
        tree = write_layer(tree, layer, i, L)
        queries.append(q)
        report.layer(i, layer_work(params.config, length, config), tree)
        if saved is not None:
            with report.spend("checkpoints"):
                saved.write(i, dataclasses.replace(layer, num_keys=num_keys), queries, x)
        del layer
    return dataclasses.replace(tree, num_keys=num_keys), queries


def _beside(x, layer: TreeLayer) -> TreeLayer:
    """A layer that was loaded, whole on every device of the mesh on which x lies."""
    mesh = sharding.mesh_of(x)
    return layer if mesh is None else jax.device_put(layer, NamedSharding(x.sharding.mesh, PartitionSpec()))


def clustering_for(params, config: SqueezeConfig, num_tokens: int) -> Clustering:
    """How keys of a context of num_tokens tokens are clustered; a model may say how fast RoPE turns its dimensions."""
    frequencies = getattr(params, "key_frequencies", None)
    # Rounded as the rows are: one program for all of these.
    rounded = config.always_read + buckets.round_up_rows(num_tokens - config.always_read)
    return clustering_of(config, frequencies and dimension_weights(frequencies(), rounded))


def cluster_layer(keys, values, index: int, *args, **options) -> TreeLayer:
    """`build_layer`, waited for, of layer `index`'s keys and values [K T' H], if they are numbers."""
    check_finite(keys, values, index)
    return jax.block_until_ready(build_layer(keys, values, *args, **options))


def finish(tree: Tree, queries: list, report: Reporter) -> Tree:
    """The tree calibrated by one [N W H] of queries a layer, and the end of the report."""
    report.tell("calibrating")
    with report.spend("calibration"):
        tree = calibrate(tree, jnp.stack(queries))
        tree = jax.block_until_ready(sharding.place(tree, tree))
    report.tell("done")
    return tree


def hash_tokens(tokens, before=None) -> jax.Array:
    """SHA-256 u8[32] of token ids; of tokens appended to a context with hash `before`: of that hash and the ids."""
    start = b"" if before is None else np.asarray(before).tobytes()
    return jnp.asarray(np.frombuffer(hashlib.sha256(start + np.asarray(tokens).tobytes()).digest(), np.uint8))


def embed_chunked(params, tokens, room: int = 0):
    """x [1 T' D] of tokens i32[1 T], padded to `room`, and so that chunks divide it.

    Causality keeps padding from mattering; what lies behind the last chunk that has tokens is never read.
    """
    room = max(room, tokens.shape[1])
    return _embed(params, buckets.pad_columns(tokens, room + -room % min(CHUNK, room), fill=0))


@jax.jit
def _embed(params, tokens):
    return sharding.constrain(params, params.embed(tokens), "BTE")


def prefill_layer(params, index: int, x, length: int, num_queries: int, report: Reporter, before: Tree | None = None):
    """One layer over the first `length` tokens of x [1 T' D] -> (x, keys, values [K T' H], last queries [N W H]).

    The tokens follow the context of the tree `before`, if there is one, and attend to all of it.
    """
    config = params.config
    layer = params.layer(index)
    chunk = min(CHUNK, x.shape[1])
    cache = _empty_cache(params, (2, 1, x.shape[1], config.num_kv_heads, config.head_dim), x.dtype)
    in_room = None if before is None else buckets.in_room(before, "xla")
    queries = []
    with report.spend("prefill"):
        for start in range(0, length, chunk):
            x, cache, q = _prefill_chunk(params, layer, x, cache, start, in_room, index, chunk)
            if start + chunk > length - num_queries:
                queries.append(q)
            report.layer(index, _prefill_work(config, min(start + chunk, length), before), cache)
        keys, values, q = _taken(cache, queries, num_queries, on_device(-length % chunk, jnp.int32))
        jax.block_until_ready((x, keys, values))
    return x, keys, values, q


@functools.partial(jax.jit, static_argnames="num_queries")
def _taken(cache, queries: list, num_queries: int, spare):
    """(keys, values [K T' H], queries [N W H]) of cache [2 1 T' K H] and of the last chunks of queries [chunk N H].

    W = num_queries, followed by `spare` i32[] that no token belongs to.
    """
    q = jnp.concatenate(queries, axis=0)
    q = jax.lax.dynamic_slice_in_dim(q, len(q) - spare - num_queries, num_queries)
    return *cache[:, 0].swapaxes(1, 2), q.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames="chunk", donate_argnames=("x", "cache"))
def _prefill_chunk(params, layer, x, cache, start, before: Tree | None, index, chunk: int):
    """Tokens [start, start + chunk) of one layer -> (x with them updated, cache with them written, q [chunk N H])."""

    def attend(q, k, v):
        q = sharding.constrain(params, q, "BXNH")
        new = jnp.stack([k, v])
        written = jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis=2)
        written = sharding.constrain(params, written, "2BTKH")
        context = None if before is None else attend_context(before, q, index)
        return (written, q[0]), _attend_chunk(params, q, written, start, context)

    first = 0 if before is None else before.context_length
    part = jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
    for layout in ("BTE", "BTD", "BXD"):  # cut out where it lies, then sent: GSPMD by itself would send all of x
        part = sharding.constrain(params, part, layout)
    positions = (first + start + jnp.arange(chunk))[None, :]
    part, (cache, q) = params.apply_layer(layer, part, positions, attend)
    x = jax.lax.dynamic_update_slice_in_dim(x, sharding.constrain(params, part, "BTE"), start, axis=1)
    return sharding.constrain(params, x, "BTE"), cache, q


def _attend_chunk(params, q, cache, start, before):
    """Dense causal attention of q [1 T N H] from position `start` on over a cache [2 1 T' K H] -> f32[1 T N H].

    `before`, (out [1 T K G H], lse), is the attention to a context that comes before. On a mesh every device takes its
    heads and its share of the tokens.
    """
    backend = registry.choose(registry.resolve(None), "attend_chunk", q, cache[0])
    mesh = sharding.mesh_of(params)
    if mesh is None:
        return backend.attend_chunk(q, cache[0], cache[1], start, before)
    by_token = sharding.spec(mesh, "BXNH", q.shape)
    splits = by_token[1] or ()
    splits = (splits,) if isinstance(splits, str) else splits
    if before is not None:  # by query heads, which several devices of a group share
        before = before[0].reshape(q.shape), before[1].reshape(q.shape[:-1])

    def attend_here(q, cache, start, before):
        K = cache.shape[3]
        if before is not None:
            before = split_heads(before[0], K), before[1].reshape(*q.shape[:2], K, -1)
        start += jax.lax.axis_index(splits) * q.shape[1] if splits else 0
        return backend.attend_chunk(q, cache[0], cache[1], start, before)

    whole, of_cache = sharding.spec(mesh, ""), sharding.spec(mesh, "2BTKH", cache.shape)
    of_before = None if before is None else (by_token, sharding.spec(mesh, "BXN", q.shape[:-1]))
    call = sharding.map_shards(attend_here, mesh, (by_token, of_cache, whole, of_before), by_token)
    return call(q, cache, jnp.asarray(start, jnp.int32), before)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"), keep_unused=True)
def _empty_cache(params, shape, dtype):
    return sharding.constrain(params, jnp.zeros(shape, dtype), "2BTKH")


def write_layer(tree: Tree | None, layer: TreeLayer, index: int, L: int) -> Tree:
    """The tree of L layers with one of them written in place; None is a tree of zeros.

    On a mesh that splits the context, the layer comes whole and is laid out in parts here.
    """
    parts = sharding.size_of(sharding.mesh_of(layer), "context")
    if parts > layer.parts:
        tree, layer = split_layer(tree, layer, parts)
    if tree is None:
        shape = lambda leaves: jax.ShapeDtypeStruct((L, *leaves[0].shape), leaves[0].dtype)
        tree = sharding.place(layer, stack_layers([layer], shape))
    return _write_layer(tree, layer, index)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(tree: Tree, layer: TreeLayer, index) -> Tree:
    write = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, index, 0)
    written = jax.tree.map(write, TreeLayer(**layer_fields(tree)), layer)
    return sharding.constrain(tree, dataclasses.replace(tree, **layer_fields(written)))


def layer_work(model, length: int, config: SqueezeConfig, before: Tree | None = None) -> float:
    """Estimated operations of one layer: reading `length` tokens, and clustering their keys."""
    clusters = config.num_clusters(length)[-1]
    cluster = 2 * config.kmeans_iterations * length * clusters * model.num_kv_heads * model.head_dim
    return _prefill_work(model, length, before) + cluster


def _prefill_work(model, tokens: int, before: Tree | None) -> float:
    D, H, K, N = model.model_dim, model.head_dim, model.num_kv_heads, model.num_heads
    per_token = 2 * D * (2 * N * H + 2 * K * H + 3 * model.mlp_dim)
    keys = tokens / 2 + (0 if before is None else before.context_length)  # causal: half the pairs
    return tokens * (per_token + 4 * N * H * keys)
