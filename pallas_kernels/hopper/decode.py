"""One decode step of attention on Hopper, one token a user: select and attend, in four kernels a flat tree.

A level is scored, and what exceeds its threshold is kept (two kernels a level): runs of what is read next, clusters of
the level below, or rows of the cache. One kernel then attends to the kept rows, the window and the user's own tokens
together, and one merges its parts. XLA computes nothing between them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels.hopper import sparse_decode
from squeezejax.pallas_kernels.hopper.centroid_scores import score_clusters
from squeezejax.pallas_kernels.hopper.keep_clusters import keep_clusters
from squeezejax.pallas_kernels.hopper.mosaic import GRANULE
from squeezejax.pallas_kernels.hopper.sparse_decode import InOrder, Listed
from squeezejax.pallas_kernels.hopper.step import Step
from squeezejax.pallas_kernels.hopper.work_list import Kept


class Cache(NamedTuple):
    """All that one decode step attends to, besides selecting it."""

    keys: jax.Array  # [L K R H], the fixed context
    values: jax.Array
    num_keys: int  # S, the first rows of each head; the rest is padding
    window_keys: jax.Array  # [L K W H]
    window_values: jax.Array
    own_keys: jax.Array  # [B T' K H], of one layer
    own_values: jax.Array


class Selected(NamedTuple):
    """What a step keeps of the fixed context, and what finding it took."""

    kept: Kept  # of the finest level
    num_kept: jax.Array  # i32[B K], keys
    num_read: tuple  # i32[lists] granules of 8 centroids read at each level, lists being K or B·K


def check(q, keys, *other_keys):
    """Raises NotImplementedError, with the reason, unless the kernels can take q [… N H] over keys [L K R H].

    other_keys, the window's and the users' own, need only be of the same dtype.
    """
    _, K, R, _ = keys.shape
    for cache in (keys, *other_keys):
        sparse_decode.check(q.dtype, cache.dtype, q.shape[-2] // K, q.shape[-1])
    if R % GRANULE:
        raise NotImplementedError(f"the kernels take caches of a multiple of {GRANULE} rows, got {R}")


def select(q, levels, step: Step, num_rows: int, *, may_skip=False) -> Selected:
    """What one token a user, q [B K G H], keeps of num_rows rows (docs/method.md, Selection).

    levels, coarse → fine, have the fields of the tree's `Level`. With may_skip, nothing is read or kept where every
    threshold is −∞.
    """
    B, K, G, _ = q.shape
    levels, step = _in_granules(levels, step)
    kept, num_read = None, []
    for depth, level in enumerate(levels):
        finest = depth == len(levels) - 1
        starts, lengths = (level.starts, level.counts) if finest else (level.child_starts, level.child_counts)
        below = num_rows if finest else levels[depth + 1].counts.shape[2]
        scores, lists = score_clusters(q, level, kept, step, may_skip)
        kept = keep_clusters(scores, lists, starts, lengths, below, step, depth, G, may_skip)
        C = level.counts.shape[2]
        num_read.append(jnp.full(K, -(-C // GRANULE)) if lists is None else lists.num_items[: B * K])
    return Selected(kept, kept.num_rows(B * K).reshape(B, K), tuple(num_read))


def attend_kept(q, cache: Cache, levels, step: Step):
    """Attention of one token a user, q [B K G H], to kept keys, window and own tokens (docs/method.md, Selection).

    levels as for `select`; thresholds None keep every key. Gives (out f32[B K G H], lse f32[B K G], kept i32[B] keys of
    all heads together).
    """
    B, K = q.shape[:2]
    R = cache.keys.shape[2]
    # Reading every row in order costs far less than listing them; it takes rows that all lie before the padding.
    can_read_all = R - cache.num_keys < GRANULE
    if step.thresholds is None:
        if can_read_all:
            return *attend_all(q, cache, step), jnp.full(B, K * cache.num_keys)
        step = step._replace(thresholds=jnp.full(len(levels), -jnp.inf))
    with jax.named_scope("select"):
        found = select(q, levels, step, R, may_skip=can_read_all)
    with jax.named_scope("attend"):
        everything = [InOrder(cache.keys, cache.values, cache.num_keys, if_all=True)] if can_read_all else []
        listed = Listed(cache.keys, cache.values, found.kept, may_skip=can_read_all)
        out, lse = sparse_decode.attend(q, (*everything, *_short(cache)), listed, step)
    num_kept = jnp.sum(found.num_kept, axis=1)
    if can_read_all:
        num_kept = jnp.where(jnp.all(step.thresholds == -jnp.inf), K * cache.num_keys, num_kept)
    return out, lse, num_kept


def attend_all(q, cache: Cache, step: Step):
    """Dense attention of one token a user, q [B K G H], to everything: (out f32[B K G H], lse f32[B K G]).

    The baseline: the same kernel, which then reads 64 rows a copy. Thresholds are ignored.
    """
    step = step._replace(thresholds=jnp.zeros(1))
    sources = (InOrder(cache.keys, cache.values, cache.num_keys), *_short(cache))
    return sparse_decode.attend(q, sources, None, step)


def _short(cache: Cache):
    """Window and own tokens, as far as there are any."""
    W = cache.window_keys.shape[2]
    if W:
        yield InOrder(cache.window_keys, cache.window_values, W)
    yield InOrder(cache.own_keys, cache.own_values, None)


def _in_granules(levels, step: Step):
    """(levels, step) of which each has a whole number of granules of clusters: all that TMA can read where it lies.

    Layers, heads and clusters multiply to one unless heads are few and odd; then the layer at hand is copied.
    """
    if all(level.counts.size % GRANULE == 0 for level in levels):
        return levels, step

    def one_layer(x):
        widths = [(0, 0), (0, 0), (0, -x.shape[2] % GRANULE)] + [(0, 0)] * (x.ndim - 3)  # clusters of no key
        return jnp.pad(jax.lax.dynamic_index_in_dim(x, step.layer[0], 0), widths)

    return [jax.tree.map(one_layer, level) for level in levels], step._replace(layer=jnp.zeros(1, jnp.int32))
