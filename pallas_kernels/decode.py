"""One decode step of attention on Hopper, one token a user: select, list and attend, in five kernels a flat tree.

A level is scored, what exceeds its threshold is kept, and the kept runs become the list of what is read next: clusters
of the level below, or rows of the cache (three kernels a level). One kernel then attends to the listed rows, the window
and the user's own tokens together, and one merges its parts. Between them XLA computes a few numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import sparse_decode
from squeezejax.pallas_kernels.centroid_scores import score_clusters
from squeezejax.pallas_kernels.keep_clusters import keep_clusters
from squeezejax.pallas_kernels.mosaic import GRANULE
from squeezejax.pallas_kernels.sparse_decode import InOrder, Listed
from squeezejax.pallas_kernels.work_list import Lists, list_items


class Cache(NamedTuple):
    """All that one decode step attends to, besides selecting it."""

    keys: jax.Array  # [L K R H], the fixed context
    values: jax.Array
    num_keys: int  # S, the first rows of each head; the rest is padding
    window_keys: jax.Array  # [L K W H]
    window_values: jax.Array
    own_keys: jax.Array  # [B T' K H], of one layer
    own_values: jax.Array
    own_rows: jax.Array  # i32[B], of them attended


class Selected(NamedTuple):
    """The fixed context's rows that a step keeps, and what finding them took."""

    lists: Lists  # of granules of rows, lanes B·K
    num_kept: jax.Array  # i32[B·K], keys
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


def select(q, levels, active, layer, log_T, num_rows: int, *, skip=False) -> Selected:
    """What one token a user, q [B K G H], keeps of num_rows rows (spec.md, Online 5).

    levels, coarse → fine, have the fields of the tree's `Level`; active bool[B], users whose token takes part (others
    keep nothing); layer i32[], may be traced; log_T f32[levels]. With skip bool[] nothing is read or listed.
    """
    B, K, G, _ = q.shape
    thresholds = jnp.where(active, log_T[:, None], jnp.inf)  # [levels B]
    levels, layer = _in_granules(levels, layer)
    C = levels[0].counts.shape[2]
    read, lists = (Lists.in_order(C, lanes, skip) for lanes in (K, B * K))
    num_read = []
    for depth, level in enumerate(levels):
        C = level.counts.shape[2]
        scores = score_clusters(q, level, read, layer)
        num_read.append(read.num_items)
        finest = depth == len(levels) - 1
        starts, lengths = (level.starts, level.counts) if finest else (level.child_starts, level.child_counts)
        below = num_rows if finest else levels[depth + 1].counts.shape[2]
        kept = keep_clusters(scores, lists, starts, lengths, below, thresholds[depth], layer, G)
        offsets = lists.offsets
        lists = read = list_items(kept.runs, kept.tile_items, offsets, below, C)
    has = jnp.arange(kept.tile_rows.shape[1])[None, :] < jnp.diff(offsets)[:, None]
    return Selected(lists, jnp.sum(jnp.where(has, kept.tile_rows, 0), axis=1, dtype=jnp.int32), tuple(num_read))


def attend_kept(q, cache: Cache, levels, active, layer, log_T):
    """Attention of one token a user, q [B K G H], to kept keys, window and own tokens (spec.md, Online 5 and 6).

    Arguments as for `select`; log_T None keeps every key. Gives (out f32[B K G H], lse f32[B K G], kept i32[B K] keys).
    """
    B, K = q.shape[:2]
    R = cache.keys.shape[2]
    # Reading every row in order costs far less than listing them; it takes rows that all lie before the padding.
    can_read_all = R - cache.num_keys < GRANULE
    if log_T is None:
        if can_read_all:
            return *attend_all(q, cache, layer), jnp.full((B, K), cache.num_keys)
        log_T = jnp.full(len(levels), -jnp.inf)
    everything = jnp.all(log_T == -jnp.inf) & can_read_all
    with jax.named_scope("select"):
        found = select(q, levels, active, layer, log_T, R, skip=everything)
    with jax.named_scope("attend"):
        all_rows = jnp.broadcast_to(jnp.where(everything, cache.num_keys, 0), (B, K))
        listed = Listed(cache.keys, cache.values, found.lists.items, found.lists.num_items)
        in_order = (InOrder(cache.keys, cache.values, all_rows), *_short(cache, B, K))
        out, lse = sparse_decode.attend(q, in_order, listed, layer)
    return out, lse, jnp.where(everything, all_rows, found.num_kept.reshape(B, K))


def attend_all(q, cache: Cache, layer):
    """Dense attention of one token a user, q [B K G H], to everything: (out f32[B K G H], lse f32[B K G]).

    The baseline: the same kernel, which then reads 64 rows a copy.
    """
    B, K = q.shape[:2]
    rows = jnp.full((B, K), cache.num_keys, jnp.int32)
    return sparse_decode.attend(q, (InOrder(cache.keys, cache.values, rows), *_short(cache, B, K)), None, layer)


def _short(cache: Cache, B: int, K: int):
    """Window and own tokens, as far as there are any."""
    W = cache.window_keys.shape[2]
    own_rows = jnp.broadcast_to(cache.own_rows[:, None], (B, K))
    if W:
        yield InOrder(cache.window_keys, cache.window_values, jnp.full((B, K), W, jnp.int32))
    yield InOrder(cache.own_keys, cache.own_values, own_rows, own=True)


def _in_granules(levels, layer):
    """(levels, layer) of which each has a whole number of granules of clusters: all that TMA can read where it lies.

    Layers, heads and clusters multiply to one unless heads are few and odd; then the layer at hand is copied.
    """
    if all(level.counts.size % GRANULE == 0 for level in levels):
        return levels, layer

    def one_layer(x):
        widths = [(0, 0), (0, 0), (0, -x.shape[2] % GRANULE)] + [(0, 0)] * (x.ndim - 3)  # clusters of no key
        return jnp.pad(jax.lax.dynamic_index_in_dim(x, layer, 0), widths)

    return [jax.tree.map(one_layer, level) for level in levels], jnp.int32(0)
