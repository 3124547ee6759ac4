"""Prefill over the fixed context, on Hopper: all blocks select their clusters, then attend to lists of granules.

The lists are made by XLA: a whole block of queries shares one, so they cost little next to the attention. Which
cluster a row belongs to is found once a layer; a row is kept iff its cluster is, and granules with a kept row are
moved to the front of their lane's list.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels.hopper import block_scores, sparse_prefill
from squeezejax.pallas_kernels.hopper.mosaic import GRANULE
from squeezejax.pallas_kernels.hopper.select_blocks import select_blocks, table

LISTED_ROWS = 1 << 26  # rows that lists are made for at once; each costs some bytes
MOST_SUMS = 1 << 26  # of 128 query rows' scores of one cluster, at once
MOST_CHUNKS = 1 << 14  # of 128 query rows, at once: a launch's grid has at most 65,535 parts of them


class Attended(NamedTuple):
    """Attention over the kept keys of the fixed context, and how many these were."""

    out: jax.Array  # f32[U M H]
    lse: jax.Array  # f32[U M]
    num_kept: jax.Array  # i32[U]


def check(q, keys):
    """Raises NotImplementedError, with the reason, unless `attend_kept` can take q [… H] over keys [L K R H]."""
    sparse_prefill.check(q.dtype, keys.dtype, q.shape[-1], keys.shape[2])


def select(q, valid, levels, layer, log_T):
    """The clusters of the finest level that each block of query rows keeps, bool[U C] (docs/method.md, Selection).

    q [U M H], lane u of key/value head u mod K; valid bool[U/K M], rows that enter a block's means; levels, coarse →
    fine, have the fields of the tree's `Level`; layer i32[], may be traced; log_T f32[levels], −∞ keeps everything.
    """
    U, M, H = q.shape
    _, K, C = levels[-1].counts.shape

    def score(q, valid):
        tables = [table(level, layer, q.dtype) for level in levels]
        sums = K * _chunks(M) * max(here.counts.shape[1] for here in tables)  # of one block
        keep = lambda q, valid: select_blocks(q, valid, tables, log_T)[:, :, :C]
        return _in_groups(keep, min(MOST_SUMS // sums, MOST_CHUNKS // (K * _chunks(M))), q, valid)

    def keep_all(q, valid):
        counts = jax.lax.dynamic_index_in_dim(levels[-1].counts, layer, 0)  # [1 K C]
        return jnp.any(valid, axis=1)[:, None, None] & (counts > 0)

    with jax.named_scope("select"):
        kept = jax.lax.cond(jnp.all(log_T == -jnp.inf), keep_all, score, q.reshape(-1, K, M, H), valid)
    return kept.reshape(U, C)


def attend_kept(q, keys, values, kept, starts, counts, layer) -> Attended:
    """Attention of blocks of query rows, q [U M H], over the rows of its kept clusters (docs/method.md, Selection).

    Lane u is of key/value head u mod K; keys, values [L K R H]; kept bool[U C], clusters of the finest level that are
    runs of rows given by starts, counts i32[K C]; layer i32[], may be traced. Blocks are taken together as far as
    their lists have room: the more at once, the more evenly the machine is filled.
    """
    U, M, H = q.shape
    K, R = keys.shape[1:3]
    owner = jax.vmap(lambda starts, counts: cluster_of_rows(starts, counts, R))(starts, counts)  # [K R]

    def attend_some(q, kept):
        items, num_items = list_granules(kept.reshape(-1, kept.shape[2]), owner)
        found = sparse_prefill.attend_items(q.reshape(-1, M, H), keys, values, items, num_items, layer)
        return [x.reshape(-1, K, *x.shape[1:]) for x in found]

    kept = kept.reshape(-1, *counts.shape)
    most = min(LISTED_ROWS // (K * R), MOST_CHUNKS // (K * _chunks(M)))
    out, lse = _in_groups(attend_some, most, q.reshape(-1, K, M, H), kept)
    num_kept = jnp.sum(jnp.where(kept, counts, 0), axis=-1)
    return Attended(out.reshape(U, M, H), lse.reshape(U, M), num_kept.reshape(U))


def _chunks(num_rows: int) -> int:
    return -(-num_rows // block_scores.CHUNK)


def _in_groups(function, most: int, *xs):
    """function(*xs), whose arguments and results have one leading axis, on at most so many of it at a time, or one."""
    n, most = len(xs[0]), max(1, most)
    if n <= most:
        return function(*xs)
    groups = -(-n // most)
    size = -(-n // groups)
    pad = lambda x: jnp.pad(x, [(0, groups * size - n)] + [(0, 0)] * (x.ndim - 1))  # blocks that keep nothing
    found = jax.lax.map(lambda some: function(*some), [pad(x).reshape(groups, size, *x.shape[1:]) for x in xs])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], found)


def cluster_of_rows(starts, counts, num_rows: int):
    """The cluster that each row of a head belongs to, i32[R], or C; clusters are disjoint runs in any order."""
    C = counts.shape[0]
    row = jnp.arange(num_rows, dtype=jnp.int32)
    begins = jnp.full(num_rows, C, jnp.int32)
    begins = begins.at[jnp.where(counts > 0, starts, num_rows)].set(jnp.arange(C, dtype=jnp.int32), mode="drop")
    latest = jax.lax.cummax(jnp.where(begins < C, row, 0))
    owner = begins[latest]
    safe = jnp.minimum(owner, C - 1)
    return jnp.where((owner < C) & (row < starts[safe] + counts[safe]), owner, C)


def list_granules(kept, owner):
    """The granules of each lane that hold a kept row: (items i32[U R/8], granule · 256 + mask, num_items i32[U]).

    kept bool[U C], lane u of head u mod K; owner i32[K R] from `cluster_of_rows`.
    """
    (K, R), U = owner.shape, kept.shape[0]
    of_head = jnp.pad(kept, ((0, 0), (0, 1))).reshape(-1, K, kept.shape[1] + 1)  # a row of no cluster is not kept
    rows = jax.vmap(lambda kept, owner: kept[:, owner], in_axes=(1, 0), out_axes=1)(of_head, owner)
    bits = jnp.where(rows.reshape(U, R // GRANULE, GRANULE), (1 << jnp.arange(GRANULE, dtype=jnp.int32))[None, None], 0)
    masks = jnp.sum(bits, axis=2)
    live = masks > 0
    slot = jnp.where(live, jnp.cumsum(live, axis=1) - 1, R // GRANULE)
    items = jnp.arange(R // GRANULE, dtype=jnp.int32)[None, :] * 256 + masks
    lane = jnp.arange(U)[:, None]
    return jnp.zeros_like(masks).at[lane, slot].set(items, mode="drop"), jnp.sum(live, axis=1, dtype=jnp.int32)
