"""Prefill over the fixed context, on Hopper: kept clusters become lists of granules, then all blocks are attended.

The lists are made by XLA: a whole block of queries shares one, so they cost little next to the attention. Which
cluster a row belongs to is found once a layer; a row is kept iff its cluster is, and granules with a kept row are
moved to the front of their lane's list.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import sparse_prefill
from squeezejax.pallas_kernels.mosaic import GRANULE

LISTED_ROWS = 1 << 26  # rows that lists are made for at once; each costs some bytes


class Attended(NamedTuple):
    """Attention over the kept keys of the fixed context, and how many these were."""

    out: jax.Array  # f32[U M H]
    lse: jax.Array  # f32[U M]
    num_kept: jax.Array  # i32[U]


def check(q, keys):
    """Raises NotImplementedError, with the reason, unless `attend_kept` can take q [… H] over keys [L K R H]."""
    sparse_prefill.check(q.dtype, keys.dtype, q.shape[-1], keys.shape[2])


def attend_kept(q, keys, values, kept, starts, counts, layer) -> Attended:
    """Attention of blocks of query rows, q [U M H], each over the rows of its kept clusters (spec.md, Online 6).

    Lane u is of key/value head u mod K; keys, values [L K R H]; kept bool[U C], clusters of the finest level that are
    runs of rows given by starts, counts i32[K C]; layer i32[], may be traced. Blocks are taken together as far as
    their lists have room: the more at once, the more evenly the machine is filled.
    """
    U, K, R = q.shape[0], keys.shape[1], keys.shape[2]
    owner = jax.vmap(lambda starts, counts: cluster_of_rows(starts, counts, R))(starts, counts)  # [K R]
    together = K * max(1, LISTED_ROWS // (K * R))

    def attend_some(some):
        q, kept = some
        items, num_items = list_granules(kept, owner)
        return sparse_prefill.attend_items(q, keys, values, items, num_items, layer)

    if together >= U:
        out, lse = attend_some((q, kept))
    else:
        groups = -(-U // together)
        parts = lambda x: jnp.pad(x, [(0, groups * together - U)] + [(0, 0)] * (x.ndim - 1)).reshape(
            groups, together, *x.shape[1:]
        )
        out, lse = jax.lax.map(attend_some, (parts(q), parts(kept)))  # the lanes added keep nothing
        out, lse = (x.reshape(-1, *x.shape[2:])[:U] for x in (out, lse))
    lanes = jnp.where(kept.reshape(-1, *counts.shape), counts, 0)
    return Attended(out, lse, jnp.sum(lanes, axis=-1).reshape(U))


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
