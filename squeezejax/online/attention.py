"""Attention of user tokens through a tree: lay out, shard, call a backend, and give back.

What is read, and how, is the backend's (`squeezejax.pallas_kernels`), by the `Reading` that it is handed.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax import buckets
from squeezejax.mesh import sharding
from squeezejax.online.reading import EVERY_KEY, Estimate, check_reading, reading_of
from squeezejax.online.select import check_queries
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.interface import Attended, Own, Reading
from squeezejax.pallas_kernels.layout import split_heads
from squeezejax.pallas_kernels.wide.select import clusters_of_rows
from squeezejax.tree import Tree


def attend(
    tree: Tree,
    q,
    k,
    v,
    *,
    layer,
    start=None,
    lengths=None,
    sparsity=None,
    log_thresholds=None,
    estimate: Estimate | None = None,
    implementation: str | None = None,
):
    """Attention of user tokens over kept keys ∪ sinks ∪ window ∪ user tokens so far (paper section 3.2).

    Reverse-mode gradients reach q, k and v: which keys are kept is piecewise constant, and the tree is taken for one.
    They are those of plain XLA on one device, and not of `Estimate(tail=True)`, where JAX refuses them.

    Args:
      tree: a calibrated tree, unless thresholds are given.
      q: [B T N H], consecutive user tokens of one layer, after RoPE. Every `tree.config.query_block` of them, counted
        from the first, share one selection.
      k, v: [B T' K H], the cache of user tokens, possibly with unused room.
      layer: i32[], may be traced.
      start: i32[B], the row of k and v in which q's first token lies (default T' − T).
      lengths: i32[B], rows in use (default T'); later ones are padding, neither attended nor counted in any mean.
      sparsity: f32[], or f32[B], may be traced; default the tree's. ≤ 0 keeps every key, ≥ 1 only what is always read.
      log_thresholds: f32[levels], or f32[B levels], may be traced, in place of a sparsity.
      estimate: what centroids are to tell of the keys that are not read.
      implementation: None (the best; a sparsity at which selecting cannot pay then keeps every key), or a name.

    Returns:
      (out f32[B T N H], lse f32[B T N]), lse being the log of the softmax's denominator, the tail's part included.

    Raises:
      ValueError: shapes that do not fit, options that exclude each other, a tree that lacks what they need.
      NotImplementedError: an implementation that cannot run here.
    """
    check_queries(tree, q, "B T N H")
    B, T, _, H = q.shape
    if k.shape != v.shape or k.ndim != 4 or k.shape[0] != B or k.shape[2:] != (tree.num_kv_heads, H) or k.shape[1] < T:
        raise ValueError(
            f"k and v must both be [B={B} T'≥{T} K={tree.num_kv_heads} H={H}], got {k.shape} and {v.shape}"
        )
    start = jnp.full(B, k.shape[1] - T, jnp.int32) if start is None else _per_user(start, B, "start")
    lengths = jnp.full(B, k.shape[1], jnp.int32) if lengths is None else _per_user(lengths, B, "lengths")
    reading = reading_of(
        tree, sparsity=sparsity, log_thresholds=log_thresholds, estimate=estimate, implementation=implementation
    )
    check_reading(reading, B)
    sharding.check_users(tree, B)
    attended = _attend(buckets.in_room(tree, reading.implementation), q, Own(k, v, start, lengths), layer, reading)
    return attended.out, attended.lse


# Without jit every call would compile its loops again: their bodies are new functions each time.
@jax.jit
def _attend(tree: Tree, q, own: Own, layer, reading: Reading) -> "LayerOutput":
    return attend_user(sharding.local_numbers(tree), q, own, layer, reading)


def prepared(tree: Tree, reading: Reading) -> Tree:
    """The tree as programs of many layers and steps read it: with `local_numbers`, and what would be derived each time.

    That is `Tree.row_clusters`, where the backend that selects by masks may run.
    """
    tree = sharding.local_numbers(tree)
    if reading.log_T is None or not registry.may_run("wide", reading.implementation):
        return tree
    mesh = sharding.mesh_of(tree)
    if mesh is None:
        return dataclasses.replace(tree, row_clusters=clusters_of_rows(tree))
    letters = sharding.spec(mesh, "LKR")
    found = sharding.map_shards(clusters_of_rows, mesh, (sharding.specs(mesh, tree),), letters)(tree)
    return dataclasses.replace(tree, row_clusters=found)


class LayerOutput(NamedTuple):
    """One layer's attention, and how much of the fixed context it read."""

    out: jax.Array  # f32[B T N H]
    lse: jax.Array  # f32[B T N]
    kept: jax.Array  # f32[B], kept clustered keys / S, averaged over key/value heads and valid query tokens
    missed: jax.Array | None  # f32[B], estimated missed mass, averaged likewise; None where nothing is estimated


def attend_user(tree: Tree, q, own: Own, layer, reading: Reading) -> LayerOutput:
    """`attend` with every argument resolved, q [B T N H], for a tree with `local_numbers`."""
    tree, reading = jax.lax.stop_gradient((tree, reading))
    mesh, layer = sharding.mesh_of(tree), jnp.asarray(layer, jnp.int32)
    if mesh is None:
        return _attend_here(tree, q, own, layer, reading)
    context = sharding.context_axis(mesh)

    def attend_shard(*args):
        out, lse, *shares = _attend_here(*args, context=context)
        mean = lambda share: jax.lax.pmean(share, "model") if "model" in mesh.shape else share
        return LayerOutput(out, lse, *jax.tree.map(mean, shares))

    # All query heads of a group go where its keys are, also where several devices share them: one selection needs all.
    heads, user, whole = sharding.spec(mesh, "BTK"), sharding.spec(mesh, "B"), sharding.spec(mesh, "")
    of_reading = jax.tree.map(lambda leaf: user if leaf.ndim == 2 else whole, reading)
    in_specs = (sharding.specs(mesh, tree), heads, Own(heads, heads, user, user), whole, of_reading)
    call = sharding.map_shards(attend_shard, mesh, in_specs, LayerOutput(heads, heads, user, user))
    return call(tree, q, own, layer, reading)


def _attend_here(tree: Tree, q, own: Own, layer, reading: Reading, context: str | None = None) -> LayerOutput:
    """`attend_user` on one device; `context` is the axis of an enclosing shard_map that splits the context."""
    groups = split_heads(q, tree.num_kv_heads)
    task = "decode" if q.shape[1] == 1 else "prefill"
    backend = registry.choose(reading.implementation, task, tree, groups, own, reading, context)
    found: Attended = getattr(backend, task)(tree, groups, own, layer, reading, context)
    return LayerOutput(found.out.reshape(q.shape), found.lse.reshape(q.shape[:-1]), found.kept, found.missed)


def attend_context(tree: Tree, q, layer):
    """Attention of q [B T N H] to the whole fixed context, all that is always read included -> (out, lse) by groups.

    Gives (out f32[B T K G H], lse f32[B T K G]).
    """
    mesh = sharding.mesh_of(tree)

    def attend_here(tree, q, layer):
        B, _, _, H = q.shape
        K = tree.num_kv_heads
        nothing, zeros = jnp.zeros((B, 1, K, H), q.dtype), jnp.zeros(B, jnp.int32)
        backend = registry.choose("xla", "prefill", tree, q, None, EVERY_KEY, None)
        own = Own(nothing, nothing, zeros, zeros)  # no row is in use: the fixed context alone is attended to
        found = backend.prefill(tree, split_heads(q, K), own, layer, EVERY_KEY, sharding.context_axis(mesh))
        return found.out, found.lse

    if mesh is None:
        return attend_here(tree, q, layer)
    heads, whole = sharding.spec(mesh, "btK"), sharding.spec(mesh, "")
    call = sharding.map_shards(attend_here, mesh, (sharding.specs(mesh, tree), heads, whole), (heads, heads))
    return call(sharding.local_numbers(tree), q, jnp.asarray(layer, jnp.int32))


def _per_user(value, B: int, name: str):
    value = jnp.asarray(value, jnp.int32)
    if value.shape not in ((), (B,)):
        raise ValueError(f"{name} must be i32[B={B}], got shape {value.shape}")
    return jnp.broadcast_to(value, (B,))
