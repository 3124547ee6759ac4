"""One decode step over the fixed context, on Hopper: select, list and attend, one token a user, in five kernels.

scores of centroids → kept clusters (a level) → work list → attention over its shares → merge of the shares. A coarser
level adds two kernels. What lies between them is small: XLA computes it in a few fusions of the same program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import centroid_scores, sparse_decode
from squeezejax.pallas_kernels.work_list import CHUNK, list_items, pad_clusters


class Attended(NamedTuple):
    """Attention over the kept keys of the fixed context, and how many these were."""

    out: jax.Array  # f32[B K G H]
    lse: jax.Array  # f32[B K G]
    num_kept: jax.Array  # i32[B K]


def check(q, keys, levels):
    """Raises NotImplementedError, with the reason, unless `attend_kept` can take q [B K G H] over keys [L K R H]."""
    sparse_decode.check(q.dtype, keys.dtype, q.shape[2], q.shape[3], keys.shape[2])
    for level in levels:
        centroid_scores.check(level.counts.size)


def attend_kept(q, keys, values, levels, active, layer, log_T) -> Attended:
    """Attention of one token a user, q [B K G H], over the keys that it keeps (spec.md, Online 5 and 6).

    keys, values [L K R H]; levels, coarse → fine, with the fields of the tree's `Level`; active bool[B], the users
    whose token takes part (others keep nothing); layer i32[], may be traced; log_T f32[levels], −∞ keeps every key.
    Raises NotImplementedError for what the kernels cannot take.
    """
    check(q, keys, levels)
    B, _K = q.shape[:2]
    layer = jnp.asarray(layer, jnp.int32)
    queries = q.astype(jnp.float32)
    kept = None
    for depth, level in enumerate(levels):
        with jax.named_scope("select"):
            counts = jnp.broadcast_to(level.counts[layer], (B, *level.counts.shape[1:]))
            alive = active[:, None, None]
            if kept is not None:
                parents = jnp.broadcast_to(CHUNK + level.parents[layer], counts.shape)
                alive = alive & (jnp.take_along_axis(kept, parents, axis=2) > 0)
            counts = pad_clusters(jnp.where(alive, counts, 0))
            starts = pad_clusters(level.starts[layer])
            kept, chunk_items, chunk_keys = centroid_scores.keep_clusters(
                queries, level.centroids, starts, counts, log_T[depth], layer
            )
    with jax.named_scope("list_kept_keys"):
        items = list_items(kept, starts, counts, chunk_items, keys.shape[2])
    with jax.named_scope("attend_kept_keys"):
        out, lse = sparse_decode.attend_items(q, keys, values, items, jnp.sum(chunk_items, axis=2), layer)
    return Attended(out, lse, jnp.sum(chunk_keys, axis=2))


def attend_all(q, keys, values, num_rows: int, layer):
    """Dense attention of one token a user over the first num_rows rows of every head: (out f32[B K G H], lse).

    The baseline: the same kernel, reading 64 rows at a time. Arguments as for `attend_kept`.
    """
    B, K, G, H = q.shape
    sparse_decode.check(q.dtype, keys.dtype, G, H, keys.shape[2])
    config = sparse_decode.default_config(H, G, granule=sparse_decode.TILE)
    granule = jnp.arange(-(-num_rows // config.granule))
    rows = jnp.minimum(num_rows - granule * config.granule, config.granule)
    items = jnp.broadcast_to(granule * 256 + rows, (B, K, granule.size))
    num_items = jnp.full((B, K), granule.size, jnp.int32)
    return sparse_decode.attend_items(q, keys, values, items, num_items, layer, config=config)
