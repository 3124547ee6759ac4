"""Which clusters blocks of query rows keep, on Hopper: levels scored by `block_scores`, coarse to fine.

At the coarsest level every block reads every cluster. Below it a block reads granules of 8 clusters with a child of one
that it kept, and nothing else. XLA compares and makes the lists: one number a block and cluster, not one a query row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels.hopper import block_scores
from squeezejax.pallas_kernels.hopper.centroid_tiles import Read, split
from squeezejax.pallas_kernels.hopper.mosaic import GRANULE

WHOLE = 128  # clusters: a whole number of tiles of every pass


class Table(NamedTuple):
    """One layer of a level, its clusters padded with some of no key to C', a multiple of `WHOLE`."""

    high: jax.Array  # [K C' H], `split` of the centroids
    low: jax.Array
    counts: jax.Array  # i32[K C']
    parents: jax.Array  # i32[K C']


def table(level, layer, dtype) -> Table:
    """The fields of a tree's `Level` as one layer's scoring reads them; layer i32[], may be traced."""
    padding = ((0, 0), (0, -level.counts.shape[2] % WHOLE))
    take = lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
    parts = split(take(level.centroids), dtype)
    return Table(
        *(jnp.pad(x, (*padding, (0, 0))) for x in parts),
        *(jnp.pad(take(x), padding) for x in (level.counts, level.parents)),
    )


def select_blocks(q, valid, tables: list[Table], log_T):
    """The clusters of the finest level that blocks keep, bool[n K C'] (docs/method.md, Selection).

    q [n K M H], the query rows of n blocks; valid bool[n M], rows that enter the means; tables, coarse → fine;
    log_T f32[levels].
    """
    missing = -q.shape[2] % block_scores.CHUNK
    q = jnp.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0)))
    valid = jnp.pad(valid, ((0, 0), (0, missing)))
    num_rows = jnp.sum(valid.astype(jnp.float32), axis=1)
    needed = jnp.where(num_rows > 0, num_rows, jnp.inf)[:, None, None]  # no row, no mean: nothing is kept
    kept = None
    for depth, here in enumerate(tables):
        alive = (here.counts > 0)[None]
        if kept is None:
            sums = _score_all(q, valid, here, log_T[depth])
        else:
            of_parent = jax.vmap(lambda kept, parents: kept[:, parents], in_axes=(1, 0), out_axes=1)
            alive = alive & of_parent(kept, here.parents)
            sums = _score_alive(q, valid, here, alive, log_T[depth])
        kept = alive & (sums > needed)
    return kept


def _score_all(q, valid, here: Table, log_T):
    """`block_scores.sum_scores` of every block over every cluster: f32[n K C']."""
    n, K, M, H = q.shape
    rows = jnp.swapaxes(q, 0, 1).reshape(K, n * M, H)  # a head's blocks read the same centroids
    rows_valid = jnp.broadcast_to(valid.reshape(1, n * M), (K, n * M))
    read = Read(here.high, here.low, here.counts.astype(jnp.float32))
    sums = block_scores.sum_scores(rows, rows_valid, read, log_T)
    return jnp.swapaxes(jnp.sum(sums.reshape(K, n, -1, sums.shape[2]), axis=2), 0, 1)


def _score_alive(q, valid, here: Table, alive, log_T):
    """The same over the clusters alive bool[n K C'], of which those with none in their granule are not read."""
    n, K, M, H = q.shape
    lanes, C = n * K, alive.shape[2]
    by_granule = lambda x: x.reshape(lanes, C // GRANULE, GRANULE)
    listed = jnp.any(by_granule(alive), axis=2)
    position = jnp.cumsum(listed, axis=1, dtype=jnp.int32) - 1
    num_granules = position[:, -1] + 1
    lane, number = jnp.arange(lanes)[:, None], jnp.arange(C // GRANULE, dtype=jnp.int32)[None, :]
    granules = jnp.zeros((lanes, C // GRANULE), jnp.int32)
    granules = granules.at[lane, jnp.where(listed, position, C // GRANULE)].set(number, mode="drop")
    in_list = number < num_granules[:, None]
    granules = jnp.where(in_list, granules, granules[:, :1])  # the last tile is filled with what is read anyway

    weights = by_granule(jnp.where(alive, here.counts[None], 0).astype(jnp.float32))[lane, granules]
    weights = jnp.where(in_list[:, :, None], weights, 0.0).reshape(lanes, C)
    read = Read(here.high, here.low, weights, granules, num_granules)
    valid = jnp.broadcast_to(valid[:, None], (n, K, M)).reshape(lanes, M)
    sums = jnp.sum(block_scores.sum_scores(q.reshape(lanes, M, H), valid, read, log_T), axis=1)
    return by_granule(sums)[lane, jnp.maximum(position, 0)].reshape(n, K, C)
