"""Attention of user tokens through a tree: kept keys, window and the users' own tokens, merged by log-sum-exp.

What each part attends to is decided here; the arithmetic is in `partial.py` and, over the tree, in `pallas_kernels`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.mesh import sharding
from squeezejax.online import cudnn
from squeezejax.online import estimate as estimates
from squeezejax.online.estimate import Estimate
from squeezejax.online.partial import merge, merge_shards, partial_attention
from squeezejax.online.select import check_queries, select_lanes, split_heads
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.xla import attend as reference
from squeezejax.tree import Tree


def attend_context(tree: Tree, q, layer):
    """Attention of q [B T N H] to the whole fixed context, window included -> (out f32[B T K G H], lse)."""
    mesh = sharding.mesh_of(tree)

    def attend_here(tree, q, layer):
        groups = split_heads(q, tree.num_kv_heads)
        return merge(*_attend_fixed(tree, groups, None, layer, None, "xla", sharding.context_axis(mesh))[0])

    if mesh is None:
        return attend_here(tree, q, layer)
    heads, whole = sharding.spec(mesh, "btK"), sharding.spec(mesh, "")
    call = sharding.map_shards(attend_here, mesh, (sharding.specs(mesh, tree), heads, whole), heads)
    return call(tree, q, jnp.asarray(layer, jnp.int32))


class Attended(NamedTuple):
    """One layer's attention, and how much of the fixed context it read."""

    out: jax.Array  # f32[B T N H]
    lse: jax.Array  # f32[B T N]
    kept: jax.Array  # f32[B], kept clustered keys / S, averaged over key/value heads and valid query tokens
    missed: jax.Array | None = None  # f32[B], estimated missed mass, averaged likewise; None where nothing is estimated


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
    tail: bool = False,
    min_mass=None,
    implementation: str | None = None,
):
    """Attention of user tokens over kept keys ∪ window ∪ user tokens so far (spec.md, Online 6; paper section 3.2).

    q [B T N H] are consecutive user tokens of layer `layer` (may be traced), after RoPE; k, v [B T' K H] the cache of
    user tokens, possibly with unused room; q's first token lies in row `start` i32[B] of it (default T' − T), and rows
    from `lengths` i32[B] on (default T') are padding: they are neither attended nor counted in any mean. Every
    `tree.config.query_block` tokens, counted from q's first, share one selection. `sparsity` (default the tree's) or
    `log_thresholds` f32[levels] may be traced. Where no implementation is named, a sparsity at which selecting cannot
    pay keeps every key (fallback.py). `min_mass`, which may be traced, chooses by mass in place of thresholds, and
    `tail` adds what the centroids tell of the keys not kept (estimate.py); both run as plain XLA.

    Gives (out f32[B T N H], lse f32[B T N]), lse being the log of the softmax's denominator, the tail's part included.
    Raises ValueError for shapes that do not fit, NotImplementedError for an implementation that cannot run here.
    """
    check_queries(tree, q, "B T N H")
    B, T, _, H = q.shape
    if k.shape != v.shape or k.ndim != 4 or k.shape[0] != B or k.shape[2:] != (tree.num_kv_heads, H) or k.shape[1] < T:
        raise ValueError(
            f"k and v must both be [B={B} T'≥{T} K={tree.num_kv_heads} H={H}], got {k.shape} and {v.shape}"
        )
    start = jnp.full(B, k.shape[1] - T, jnp.int32) if start is None else _per_user(start, B, "start")
    lengths = jnp.full(B, k.shape[1], jnp.int32) if lengths is None else _per_user(lengths, B, "lengths")
    log_T, estimate = estimates.resolve(
        tree,
        tail=tail,
        min_mass=min_mass,
        sparsity=sparsity,
        log_thresholds=log_thresholds,
        implementation=implementation,
    )
    sharding.check_users(tree, B)
    implementation = registry.resolve(implementation)
    attended = _attend_user(tree, q, k, v, layer, start, lengths, log_T, estimate, implementation=implementation)
    return attended.out, attended.lse


# Without jit every call would compile its loops again: their bodies are new functions each time.
@functools.partial(jax.jit, static_argnames="implementation")
def _attend_user(tree: Tree, *args, implementation: str) -> Attended:
    *args, estimate = args
    return attend_user(sharding.local_numbers(tree), *args, implementation, estimate)


def attend_user(
    tree: Tree, q, k, v, layer, start, lengths, log_T, implementation: str, estimate: Estimate | None = None
) -> Attended:
    """`attend` with every argument resolved, for a tree with `local_numbers`.

    log_T None attends to every fixed key (dense attention), unless `estimate` chooses them by mass.
    """
    mesh = sharding.mesh_of(tree)
    if mesh is None:
        return _attend_tokens(tree, q, k, v, layer, start, lengths, log_T, implementation, estimate=estimate)
    context = sharding.context_axis(mesh)
    if estimate is not None and context:
        raise NotImplementedError("tail, min_mass and missed_mass need the whole context on every device of the mesh")

    def attend_shard(*args):
        *args, estimate = args
        out, lse, *shares = _attend_tokens(*args, implementation, context=context, estimate=estimate)
        mean = lambda share: jax.lax.pmean(share, "model") if "model" in mesh.shape else share
        return Attended(out, lse, *jax.tree.map(mean, shares))

    # All query heads of a group go where its keys are, also where several devices share them: one selection needs all.
    heads, user, whole = sharding.spec(mesh, "BTK"), sharding.spec(mesh, "B"), sharding.spec(mesh, "")
    in_specs = (sharding.specs(mesh, tree), heads, heads, heads, whole, user, user, whole, whole)
    call = sharding.map_shards(attend_shard, mesh, in_specs, Attended(heads, heads, user, user))
    return call(tree, q, k, v, jnp.asarray(layer, jnp.int32), start, lengths, log_T, estimate)


def _attend_tokens(
    tree: Tree,
    q,
    k,
    v,
    layer,
    start,
    lengths,
    log_T,
    implementation: str,
    context: str | None = None,
    estimate: Estimate | None = None,
) -> Attended:
    """`attend_user` on one device; `context` is the axis of an enclosing shard_map that splits the context."""
    B, T, N, H = q.shape
    if T == 1 and estimate is None:
        kernels = registry.decode_kernels(implementation, q, tree.keys, tree.window_keys, k, split=context is not None)
        if kernels is not None:
            return _decode_fixed(kernels, tree, q, k, v, layer, start, lengths, log_T)
    block = min(tree.config.query_block or T, T)
    num_blocks = -(-T // block)
    groups = split_heads(q, tree.num_kv_heads)
    groups = jnp.pad(groups, ((0, 0), (0, num_blocks * block - T), (0, 0), (0, 0), (0, 0)))

    kernels = None
    if T > 1 and estimate is None:
        kernels = registry.prefill_kernels(implementation, q, tree.keys, split=context is not None)
    to_blocks = lambda x: jnp.swapaxes(x.reshape(B, num_blocks, block, *x.shape[2:]), 0, 1)
    fused = None
    if kernels is not None and cudnn.usable(q, k):
        with jax.named_scope("attend_user_tokens"):
            fused = jax.tree.map(to_blocks, cudnn.attend_own(groups.reshape(B, -1, N, H), k, v, start))

    def read_block(index):  # -> (its queries, which tokens take part, attention to the user's own tokens)
        first = index * block
        token = first + jnp.arange(block)[None, :]
        row = start[:, None] + token
        valid = (row < lengths[:, None]) & (token < T)
        part = jax.lax.dynamic_slice_in_dim(groups, first, block, axis=1)
        if fused is not None:
            return part, valid, jax.tree.map(lambda x: x[index], fused)
        with jax.named_scope("attend_user_tokens"):
            column = jnp.arange(k.shape[1])[None, None, :]
            mask = (column <= row[:, :, None]) & (column < lengths[:, None, None])
            return part, valid, partial_attention(part, k, v, mask)

    def attend_block(index):
        part, valid, own = read_block(index)
        if estimate is not None:
            found = _attend_estimated(tree, part, valid, layer, log_T, estimate, own)
        else:
            fixed, kept = _attend_fixed(tree, part, valid, layer, log_T, implementation, context)
            found = Attended(*merge(*fixed, own), kept)
        return found, jnp.sum(valid.astype(jnp.float32), axis=1)

    if num_blocks == 1 and kernels is None:
        (out, lse, *shares), _ = attend_block(0)
    elif kernels is not None:
        attended, tokens = _prefill_fixed(kernels, tree, to_blocks(groups), read_block, layer, log_T)
    else:
        attended, tokens = jax.lax.map(attend_block, jnp.arange(num_blocks))
    if num_blocks > 1 or kernels is not None:
        out, lse, *shares = attended
        out, lse = (jnp.moveaxis(x, 0, 1).reshape(B, num_blocks * block, *x.shape[3:]) for x in (out, lse))
        mean = lambda share: jnp.sum(share * tokens, axis=0) / jnp.maximum(jnp.sum(tokens, axis=0), 1.0)
        shares = jax.tree.map(mean, shares)
    return Attended(out[:, :T].reshape(B, T, N, H), lse[:, :T].reshape(B, T, N), *shares)


def _prefill_fixed(kernels, tree: Tree, q, read_block, layer, log_T):
    """By the prefill kernels: q [blocks B T K G H], one selection a block and user -> (`Attended` a block, its tokens).

    All blocks select and attend to what they keep in a few launches; what needs no selection goes block by block.
    """
    n, B, T, K, G, H = q.shape
    to_rows = lambda x: jnp.swapaxes(x, -4, -3).reshape(*x.shape[:-4], K, T * G, H)
    back = lambda x: jnp.swapaxes(x.reshape(-1, B, K, T, G, *x.shape[2:]), 2, 3)
    finest = tree.levels[-1]

    def visit(index):
        part, valid, attended = read_block(index)
        if tree.window_keys.shape[2]:
            window = _attend_window(tree, to_rows(part), layer)
            attended = merge(attended, tuple(back(x.reshape(B * K, *x.shape[2:]))[0] for x in window))
        return attended, valid

    attended, valid = jax.lax.map(visit, jnp.arange(n))
    rows = to_rows(q).reshape(n * B * K, T * G, H)
    if log_T is None:
        kept = jnp.ones((n * B * K, finest.counts.shape[2]), bool)
    else:
        kept = kernels.select(rows, jnp.repeat(valid.reshape(n * B, T), G, axis=1), tree.levels, layer, log_T)
    with jax.named_scope("attend_kept_keys"):
        found = kernels.attend_kept(
            rows, tree.keys, tree.values, kept, finest.starts[layer], finest.counts[layer], layer
        )  # fmt: skip
    share = jnp.mean(found.num_kept.reshape(n, B, K).astype(jnp.float32), axis=2) / tree.num_keys
    tokens = jnp.sum(valid.astype(jnp.float32), axis=2)
    return Attended(*merge(attended, (back(found.out), back(found.lse))), share), tokens


def _attend_fixed(tree: Tree, q, valid, layer, log_T, implementation: str, context: str | None = None):
    """q [B T K G H], one selection a user, over the fixed context -> ([(out, lse), …], kept fraction f32[B])."""
    B, T, K, G, H = q.shape
    rows = q.transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)

    def every_key():
        with jax.named_scope("attend_every_key"):
            out = reference.attend_all(rows, tree.keys, tree.values, tree.order[layer] >= 0, layer)
            return *out, jnp.ones(B, jnp.float32)

    def kept_keys():
        runs = select_lanes(tree, q, valid, layer, log_T, context).runs
        num_rows = jnp.mean(runs.num_rows.astype(jnp.float32), axis=1)
        kept = (jax.lax.psum(num_rows, context) if context else num_rows) / tree.num_keys
        return *_attend_runs(tree, rows, runs, layer), kept

    if log_T is None:
        out, lse, kept = every_key()
    else:
        # A threshold of −∞ keeps every key, and reading them in order costs half of reading them by list.
        out, lse, kept = jax.lax.cond(jnp.all(log_T == -jnp.inf), every_key, kept_keys)
    # Merged here, before the window, which every device holds.
    partials = [merge_shards(out, lse, context) if context else (out, lse)]
    if tree.window_keys.shape[2]:
        partials.append(_attend_window(tree, rows, layer))
    back = lambda x: x.reshape(B, K, T, G, *x.shape[3:]).swapaxes(1, 2)
    return [(back(out), back(lse)) for out, lse in partials], kept


def _attend_runs(tree: Tree, rows, runs, layer):
    """rows [B K M H] over the kept rows of every user and head -> (out f32[B K M H], lse f32[B K M])."""
    B, K = rows.shape[:2]
    with jax.named_scope("attend_kept_keys"):
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        head = jnp.tile(layer * K + jnp.arange(K), B)
        out, lse = reference.attend_runs(flat(rows), flat(tree.keys), flat(tree.values), jax.tree.map(flat, runs), head)
    return out.reshape(rows.shape), lse.reshape(rows.shape[:-1])


def _attend_window(tree: Tree, rows, layer):
    """rows [B K M H] over the observation window -> (out f32[B K M H], lse f32[B K M])."""
    with jax.named_scope("attend_window"):
        everything = jnp.ones((rows.shape[1], tree.window_keys.shape[2]), bool)
        return reference.attend_all(rows, tree.window_keys, tree.window_values, everything, layer)


def _attend_estimated(tree: Tree, q, valid, layer, log_T, estimate: Estimate, own) -> Attended:
    """q [B T K G H], one selection a user, over the fixed context and, as `own` has it, the user's tokens."""
    B, T, K, G, _ = q.shape
    to_rows = lambda x: x.swapaxes(1, 2).reshape(B, K, T * G, *x.shape[4:])
    back = lambda x: x.reshape(B, K, T, G, *x.shape[3:]).swapaxes(1, 2)
    rows, row_valid = to_rows(q), jnp.repeat(valid, G, axis=1)
    attended = tuple(to_rows(x) for x in own)
    if tree.window_keys.shape[2]:
        attended = merge(attended, _attend_window(tree, rows, layer))
    runs, rest = estimates.choose(tree, rows, row_valid, layer, log_T, estimate)
    attended = merge(attended, _attend_runs(tree, rows, runs, layer))
    left = functools.reduce(jnp.logaddexp, [lse for _, lse in rest])
    missed = jnp.where(row_valid[:, None], jax.nn.sigmoid(left - attended[1]), 0.0)
    missed = jnp.sum(missed, axis=(1, 2)) / (K * jnp.maximum(jnp.sum(row_valid.astype(jnp.float32), axis=1), 1.0))
    if estimate.tail:
        attended = merge(attended, *rest)
    kept = jnp.mean(runs.num_rows.astype(jnp.float32), axis=1) / tree.num_keys
    return Attended(*(back(x) for x in attended), kept, missed)


def _decode_fixed(kernels, tree: Tree, q, k, v, layer, start, lengths, log_T) -> Attended:
    """`attend_user` for one token a user, q [B 1 N H], by the decode kernels: fixed context, window and own tokens."""
    B, _, N, H = q.shape
    cache = kernels.Cache(tree.keys, tree.values, tree.num_keys, tree.window_keys, tree.window_values, k, v)
    step = kernels.Step(jnp.reshape(jnp.asarray(layer, jnp.int32), 1), log_T, start, lengths)
    groups = split_heads(q, tree.num_kv_heads)[:, 0]
    out, lse, num_kept = kernels.attend_kept(groups, cache, tree.levels, step)
    kept = num_kept.astype(jnp.float32) / (tree.num_kv_heads * tree.num_keys)
    return Attended(out.reshape(B, 1, N, H), lse.reshape(B, 1, N), kept)


def _per_user(value, B: int, name: str):
    value = jnp.asarray(value, jnp.int32)
    if value.shape not in ((), (B,)):
        raise ValueError(f"{name} must be i32[B={B}], got shape {value.shape}")
    return jnp.broadcast_to(value, (B,))
