"""Selection without lists: every cluster and every key's code is scored, and what is kept is a mask over rows.

Scores are those of the plain XLA backend, by its own functions. Scoring keys that no kept cluster holds costs bytes of
codes, a few percent of the keys'; listing those in kept clusters costs launches and a wait for the host, which in one
layer take longer.
"""

import functools

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import codes
from squeezejax.pallas_kernels.xla import common_scale, levelwise
from squeezejax.pallas_kernels.xla.lists import cluster_of_rows
from squeezejax.pallas_kernels.xla.softmax import map_over


def keep_rows(tree, rows, valid, group: int, layer, reading, context: str | None = None):
    """What rows [B K M H], of which valid bool[B M] take part, keep of the clustered keys: bool[B K R].

    `group` is G: a query token has so many rows. One selection a user; `context` as for `Backend.decode`.
    """
    rows = jax.lax.stop_gradient(rows)
    with jax.named_scope("select"):
        if tree.config.score == "mean":
            log_T = reading.log_T_of_users(len(rows))
            of_user = lambda user: levelwise.score_heads(tree.levels, layer, user[0], user[1], user[2], context)[1]
            cluster = _of_layer(tree, layer)
            return of_rows(map_over(of_user, (rows, valid, log_T)), cluster) & (cluster >= 0)[None]
        num_tokens = jnp.sum(valid.astype(jnp.float32), axis=1) / group
        log_T = reading.log_T_of(num_tokens, tree.config.calibration_tokens)
        return _keep_on_common_scale(tree, rows, valid, layer, log_T, context)


def clusters_of_rows(tree):
    """The finest cluster of every row, i32[L K R]; −1 for padding."""
    find = functools.partial(cluster_of_rows, num_rows=tree.keys.shape[2])
    return jax.vmap(jax.vmap(find))(tree.levels[-1].starts, tree.levels[-1].counts)


def _of_layer(tree, layer):
    """`clusters_of_rows` of one layer, i32[K R]."""
    if tree.row_clusters is not None:
        return tree.row_clusters[layer]
    find = functools.partial(cluster_of_rows, num_rows=tree.keys.shape[2])
    return jax.vmap(find)(tree.levels[-1].starts[layer], tree.levels[-1].counts[layer])


def of_rows(of_clusters, cluster):
    """What is known of clusters [B K C …], of every row: [B K R …] for its cluster i32[K R]; for −1, of cluster 0."""
    B, K, C = of_clusters.shape[:3]
    # One number, not three: XLA writes down an index of several.
    lane = jnp.arange(B * K).reshape(B, K, 1)
    flat = of_clusters.reshape(B * K * C, *of_clusters.shape[3:])
    return flat.at[lane * C + jnp.maximum(cluster, 0)[None]].get(mode="promise_in_bounds")


def _keep_on_common_scale(tree, rows, valid, layer, log_T, context: str | None):
    """`common_scale.select` as a mask; log_T f32[B levels (+ 1 for keys)]."""
    B, K, M, _ = rows.shape
    query = common_scale.query_of(rows, valid, layer)
    by_lane = lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
    by_user = lambda x: x.reshape(B, K, *x.shape[1:])
    levels = jax.tree.map(by_lane, tree.levels)
    log_T = jnp.repeat(log_T, K, axis=0).T[:, :, None]  # [levels U 1]
    dots, log_A, lse = common_scale.score_coarsest(tree, levels[0], query, context)
    kept = (log_A > log_T[0]) & (levels[0].counts[query.head] > 0)
    for level, log_t in zip(levels[1:], log_T[1:], strict=False):
        dots, log_A = common_scale.score_all(level, query, lse)
        kept = jnp.take_along_axis(kept, level.parents[query.head], axis=1) & (log_A > log_t)
        kept &= level.counts[query.head] > 0
    cluster = _of_layer(tree, layer)
    kept_rows = of_rows(by_user(kept), cluster) & (cluster >= 0)[None]
    if tree.key_codes is None:
        return kept_rows
    of_lanes = lambda leaf: jnp.broadcast_to(leaf[layer], (B, *leaf.shape[1:])).reshape(B * K, *leaf.shape[2:])
    key_codes = codes.Codes(of_lanes(tree.key_codes), of_lanes(tree.key_steps))
    of_cluster = of_rows(by_user(dots), cluster).reshape(B * K, -1, M)
    scores = common_scale.score_keys(key_codes, of_cluster, query.turned)
    exceeding = jax.vmap(common_scale.exceeds)(scores, lse, query.valid, log_T[-1, :, 0])
    return kept_rows & by_user(exceeding)


def temporaries(tree, q) -> int:
    """Bytes that a selection for q [B T K G H] writes down at once: scores of rows and their clusters, counts."""
    B, T, K, G, _ = q.shape
    return B * K * tree.keys.shape[2] * (8 * T * G + 12)
