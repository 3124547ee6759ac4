"""The paper's rule: every level normalised by itself, over what the levels above left (docs/method.md, The index).

A threshold often equals a cluster's score exactly, so calibration and selection both call `descend`. Only below the
coarsest level, where there are hundreds of sets of thresholds, calibration sums otherwise, and sets its thresholds
higher by the rounding.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import codes
from squeezejax.pallas_kernels.xla.lists import Found, kept_runs
from squeezejax.pallas_kernels.xla.look_up import look_up
from squeezejax.pallas_kernels.xla.softmax import MASKED, map_over

# With more query rows than this, matrix products dominate, and masking the dead is cheaper than listing the living.
MOST_LISTED_ROWS = 64


def layer_level(level, layer):
    """One layer of a level: arrays [K …]; `layer` may be traced."""
    return jax.tree.map(lambda leaf: leaf[layer], level)


def select(tree, q, valid, layer, log_T, *, context: str | None = None) -> Found:
    """One selection a user for rows q [B K M H], of which valid bool[B M] take part, at log_T f32[B levels].

    Inside a shard_map whose axis `context` splits the context, q finds what it keeps of this device's part.
    """
    B, K, M, _ = q.shape
    list_runs = jax.vmap(jax.vmap(kept_runs), in_axes=(0, None, None))
    flat = lambda runs: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), runs)
    of_user = lambda levels, q, valid, log_T: score_heads(levels, layer, q, valid, log_T, context)[1]
    score = lambda levels: map_over(lambda user: of_user(levels, *user), (q, valid, log_T))
    *_, finest = tree.levels
    if len(tree.levels) == 1 or M > MOST_LISTED_ROWS:
        clusters = score(tree.levels)  # bool[B K C]
        runs = list_runs(clusters, finest.starts[layer], finest.counts[layer])
        return Found(flat(runs), runs.num_rows, clusters)
    coarsest = tree.levels[0]
    children = list_runs(score(tree.levels[:1]), coarsest.child_starts[layer], coarsest.child_counts[layer])
    runs, ids = look_up(tree.levels[1:], q, valid, layer, log_T[:, 1:], children, context)
    user, head = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    clusters = jnp.zeros((B, K, finest.counts.shape[2]), bool).at[user, head, ids].set(True, mode="drop")
    return Found(flat(runs), runs.num_rows, clusters)


def score_heads(levels: tuple, layer, q, valid, log_T, context: str | None = None):
    """Scores one layer from coarse to fine: (log A f32[K C], kept bool[K C]) of the last of `levels`.

    q [K M H]; valid bool[M], the query rows that take part; log_T f32[≥ levels]; `layer` may be traced.
    `context` is the axis of an enclosing shard_map over which the clusters are distributed.
    """

    def one_head(head):
        # Sliced here, not before: only one head's centroids are ever copied out of the stack.
        here = jax.tree.map(lambda leaf: leaf[layer, head], levels)
        return descend(here, q[head], valid, log_T, context)

    return map_over(one_head, jnp.arange(len(q)))


def descend(levels: tuple, q, valid, log_T, context: str | None = None):
    """One head from coarse to fine: (log A f32[C], kept bool[C]) of the last of `levels`.

    levels without the axes L and K; q [M H], query rows of the group; valid bool[M]; log_T f32[≥ levels]. A cluster is
    kept iff log A > log T strictly. Below the coarsest level only children of kept clusters are alive, and their
    denominators count nothing else.
    """
    kept = None
    for depth, level in enumerate(levels):
        alive = level.counts > 0
        if kept is not None:
            alive &= kept[level.parents]
        log_A = score_clusters(*aligned(q, level), level.counts, alive, valid, context=context)
        kept = log_A > log_T[depth]
    return log_A, kept


def aligned(q, level) -> tuple[jax.Array, jax.Array]:
    """q [… H] and the numbers f32[C H] of a level's centroids, in one space: turned, where they are codes."""
    if level.codes is None:
        return q, level.centroids.astype(jnp.float32)
    H = q.shape[-1]
    return codes.rotate(q), level.offset[..., None, :] + codes.decode(codes.Codes(level.codes, level.steps), H)


def score_clusters(q, centroids, counts, alive, valid, *, context: str | None = None, block: int = 128):
    """log A of every cluster: its softmax-normalised score, averaged over query rows (docs/method.md, Selection).

    q [M H]; centroids f32[C H]; counts i32[C]; alive bool[C], clusters that take part; valid bool[M], rows that do.
    Gives f32[C]: log A over alive clusters, −∞ for the others. Rows are taken in blocks whose scores stay in cache:
    memory is block · C floats, however many rows there are. `context` is the axis of an enclosing shard_map over which
    the clusters are distributed.
    """
    M, H = q.shape
    add = lambda mean, q, valid: mean.add(log_scores(centroid_dots(q, centroids), counts, alive, context), valid)
    mean = LogMean.start(counts.shape)
    if block >= M:
        return add(mean, q, valid).end(alive)
    padding = -M % block
    blocks = jnp.pad(q, ((0, padding), (0, 0))).reshape(-1, block, H), jnp.pad(valid, (0, padding)).reshape(-1, block)
    return jax.lax.scan(lambda mean, rows: (add(mean, *rows), None), mean, blocks)[0].end(alive)


def centroid_dots(q, centroids) -> jax.Array:
    """s(q, c) = q·c/√H in float32: q [M H], centroids f32[C H] -> f32[M C]."""
    # HIGHEST: accelerators would otherwise round both operands, which moves scores by up to 3 % (docs/method.md).
    dots = jnp.einsum("MH,CH->MC", q.astype(jnp.float32), centroids, precision=jax.lax.Precision.HIGHEST)
    return dots / math.sqrt(q.shape[-1])


def log_scores(dots, counts, alive, context: str | None = None):
    """log S of every cluster for every query row: f32[M C], s(q, c) -> f32[M C], normalised over alive clusters.

    Maximum and sum run over alive clusters only, so that a dead cluster, however high it scores, changes nothing.
    """
    # One order of operations, here and in calibration: (s − max) − log Σ n exp(s − max), then log-mean-exp over rows.
    live = jnp.where(alive[None, :], dots, MASKED)
    top = jnp.max(live, axis=1, keepdims=True)
    top = jax.lax.pmax(top, context) if context else top
    shifted = live - top
    weights = jnp.where(alive, counts, 0).astype(jnp.float32)
    total = jnp.sum(weights[None, :] * jnp.exp(shifted), axis=1, keepdims=True)
    total = jax.lax.psum(total, context) if context else total
    return shifted - jnp.log(jnp.maximum(total, 1.0))  # ≥ 1 wherever a cluster is alive: its maximum adds n ≥ 1


class LogMean(NamedTuple):
    """A mean over query rows, in log space: rows seen so far."""

    top: jax.Array  # f32[C]
    total: jax.Array  # f32[C], Σ exp(log S − top)
    num_rows: jax.Array  # f32[]

    @classmethod
    def start(cls, shape):
        """No row yet."""
        return cls(jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.float32))

    def add(self, scores, valid) -> "LogMean":
        """Adds rows of log S f32[M C] where valid bool[M]."""
        scores = jnp.where(valid[:, None], scores, MASKED)
        top = jnp.maximum(self.top, jnp.max(scores, axis=0))
        here = jnp.sum(jnp.where(valid[:, None], jnp.exp(scores - top[None, :]), 0.0), axis=0)
        num_rows = self.num_rows + jnp.sum(valid.astype(jnp.float32))
        return LogMean(top, self.total * jnp.exp(self.top - top) + here, num_rows)

    def end(self, alive):
        """log A f32[C], −∞ for clusters not alive and where there was no row."""
        # log 1 − log 1 = 0: equal scores stay bit-equal.
        log_mean = self.top + (jnp.log(self.total) - jnp.log(self.num_rows))
        return jnp.where(alive & (self.num_rows > 0), log_mean, -jnp.inf)
