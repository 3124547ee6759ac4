"""Thresholds from the observation window: one number per level for the whole model, for every sparsity (spec.md, 4).

A key's score is its cluster's A, averaged over the calibration queries and the group's heads. The threshold for
sparsity p is the p-quantile of all key scores of all layers and heads together. In a hierarchy the levels above the
finest keep a margin more, and each level below is calibrated on what they leave: there scores depend on the thresholds
above, of which the table has some hundreds of sets.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.arguments import check_number
from squeezejax.mesh import sharding
from squeezejax.online.scores import score_heads
from squeezejax.pallas_kernels.xla import attend as reference
from squeezejax.tree import Tree

GRID = np.union1d(np.linspace(0, 1, 1001), np.linspace(0.99, 1, 101)).astype(np.float32)
MOST_EXACT_CLUSTERS = 8192  # up to here a flat table holds every step of the quantile function
TOLERANCE = 3e-4  # beyond it, the relative error of a threshold that may come from interpolation
MOST_ROUNDING = 5e-4  # thresholds stay within 1e-3 of the quantile, even at logits of many thousand
SCORES_AT_ONCE = 1 << 27  # cluster scores held at once, whatever the number of thresholds tried above them
LEAST = 1e-300  # of a denominator, against the score that is largest when nothing is cut


def log_thresholds(tree: Tree, sparsity) -> jax.Array:
    """log T f32[levels], coarse → fine, at `sparsity` f32[], which may be traced.

    sparsity ≤ 0 gives −∞ (every key kept), ≥ 1 gives +∞ (only window and user tokens attended). Between grid points
    thresholds are interpolated linearly, not their logarithms. Raises ValueError for a tree that is not calibrated, and
    for a sparsity that is no number; NaN on a device or under a trace keeps every key, as 0 does.
    """
    p = check_number("sparsity", sparsity)
    if tree.thresholds is None or tree.sparsities is None:
        raise ValueError("the tree has no thresholds: call squeezejax.calibrate(tree, queries) first")
    return _look_up(tree.sparsities, tree.thresholds, p)


@jax.jit
def _look_up(grid, table, p):
    """log T f32[levels] at p f32[], from a grid f32[P] and table f32[levels P]."""
    inside = jnp.clip(p, 0.0, 1.0)
    # The first grid point that reaches p, so that the one before lies below it also where ones pad the grid.
    right = jnp.maximum(jnp.searchsorted(grid, inside), 1)
    left = right - 1
    weight = (inside - grid[left]) / (grid[right] - grid[left])
    low, high = table[:, left], table[:, right]
    top = jnp.maximum(jnp.maximum(low, high), jnp.finfo(jnp.float32).min)  # finite: −∞ − −∞ would be NaN
    log_T = top + jnp.log((1 - weight) * jnp.exp(low - top) + weight * jnp.exp(high - top))
    return jnp.where(p > 0, jnp.where(p >= 1, jnp.inf, log_T), -jnp.inf)


def calibrate(tree: Tree, queries) -> Tree:
    """The tree with its table of thresholds, from queries [L N W H] after RoPE: usually the window's own.

    Any number W ≥ 1 of queries serves. Runs on the host (a sort of all cluster scores), so not under `jit`.
    Raises ValueError for shapes that do not fit the tree or values that are not finite.
    """
    queries = jnp.asarray(queries)
    L, K, _, H = tree.keys.shape
    if queries.ndim != 4 or queries.shape[0] != L or queries.shape[3] != H or queries.shape[1] % K:
        raise ValueError(f"queries must be [L={L} N W H={H}] with N a multiple of K = {K}, got {queries.shape}")
    if queries.shape[2] < 1:
        raise ValueError("calibration needs at least one query token")
    if not bool(jnp.all(jnp.isfinite(queries))):
        raise ValueError("queries hold values that are not finite")
    counts = [sharding.whole_on_host(level.counts).ravel() for level in tree.levels]
    coarsest = np.stack([_coarsest_scores(tree, queries[layer], layer) for layer in range(L)])  # [L K C]
    grid = GRID if len(counts) > 1 else _with_steps(GRID, coarsest.ravel(), counts[0])
    table = np.empty((0, len(grid)), np.float32)
    for depth, count in enumerate(counts):
        dropped = dropped_fractions(grid, depth, tree.config)
        if depth == 0:
            row = _quantiles(coarsest.ravel(), count, dropped)
        else:
            row = _row_below(tree, queries, coarsest, count, table, dropped)
        row = _above_ties(row, _rounding(queries, tree.levels[depth], exact=depth == 0))
        # A coarse level that has to keep everything keeps its lowest cluster too, which no quantile does.
        is_finest = depth == len(counts) - 1
        table = np.vstack([table, row if is_finest else np.where(dropped <= 0, -np.inf, row)])
    return dataclasses.replace(tree, sparsities=jnp.asarray(grid), thresholds=jnp.asarray(table, jnp.float32))


def _row_below(tree: Tree, queries, coarsest, counts, above, dropped) -> np.ndarray:
    """log T [P] of the level below those with thresholds `above` f32[levels above P], dropping fractions [P].

    coarsest f32[L K C], counts i[L·K·C] of the level in question.
    """
    # Sparsities that share all thresholds above this level share its scores: score each distinct set once.
    sets, set_of = np.unique(above, axis=1, return_inverse=True)
    row = np.empty(len(dropped))
    batch = max(1, SCORES_AT_ONCE // len(counts))
    for first in range(0, sets.shape[1], batch):
        some = sets[:, first : first + batch]
        scores = np.empty((some.shape[1], len(counts)), np.float32)  # [P L·K·C]
        for layer, part in enumerate(np.split(scores, len(queries), axis=1)):
            part[:] = _restricted_scores(tree, queries[layer], layer, coarsest[layer], some)
        for i, log_A in enumerate(scores, first):
            members = set_of.ravel() == i
            row[members] = _quantiles(log_A, counts, dropped[members])
    return row


def dropped_fractions(grid, depth: int, config) -> np.ndarray:
    """The fraction of all keys that `depth` (0 = coarsest) drops at each sparsity of the grid.

    The coarsest level keeps coarse_margin times what is wanted in the end, the finest just that, and levels between
    follow a geometric series; none keeps more than everything.
    """
    above = config.num_levels - 1
    margin = config.coarse_margin ** ((above - depth) / above) if above else 1.0
    return 1 - np.minimum(1, margin * (1 - grid.astype(np.float64)))


@jax.jit
def _coarsest_scores(tree: Tree, queries, layer):
    """log A f32[K C] of one layer's coarsest level, as selection has it, whole on every device; queries [N W H]."""
    mesh = sharding.mesh_of(tree)
    if mesh is None:
        return _coarsest_here(tree, queries, layer)
    score_shard = functools.partial(_coarsest_here, context=sharding.context_axis(mesh))
    whole = sharding.spec(mesh, "")
    in_specs = (sharding.specs(mesh, tree), sharding.spec(mesh, "K"), whole)
    call = sharding.map_shards(score_shard, mesh, in_specs, sharding.spec(mesh, "KC"))
    return sharding.constrain(tree, call(sharding.local_numbers(tree), queries, layer), "")


def _coarsest_here(tree: Tree, queries, layer, context: str | None = None):
    """`_coarsest_scores` on one device; `context` is the axis of an enclosing shard_map that splits the context."""
    K = tree.num_kv_heads
    q = queries.reshape(K, -1, *queries.shape[1:]).transpose(2, 0, 1, 3)  # [W K G H]
    return score_heads(tree.levels[:1], layer, q, jnp.ones(q.shape[0], bool), jnp.full(1, jnp.inf), context)[0]


@functools.partial(jax.jit, static_argnames="depth")
def _dots(tree: Tree, queries, layer, depth: int):
    """s(q, c) f32[K M C] of one layer, whole on every device; queries [N W H], M query rows a key/value head."""
    rows = queries.reshape(tree.num_kv_heads, -1, queries.shape[-1])
    centroids = tree.levels[depth].centroids[layer]
    dots = jax.lax.map(lambda head: reference.centroid_dots(*head), (rows, centroids))
    return sharding.constrain(tree, dots, "")


def _restricted_scores(tree: Tree, queries, layer: int, coarsest, above) -> np.ndarray:
    """log A f32[P K·C] of the level below thresholds above f32[levels above P]; coarsest f32[K C]; queries [N W H]."""
    depths = range(1, len(above) + 1)
    dots = {depth: np.asarray(_dots(tree, queries, layer, depth)) for depth in depths}
    levels = [
        jax.tree.map(lambda leaf: sharding.to_host(leaf[layer]), (tree.levels[d].counts, tree.levels[d].parents))
        for d in depths
    ]
    found = []
    for head in range(len(coarsest)):
        log_A = coarsest[head][None]
        for depth, (counts, parents) in zip(depths, levels, strict=True):
            kept = log_A > above[depth - 1][:, None]
            alive = kept[:, parents[head]] & (counts[head] > 0)
            log_A = _log_means(dots[depth][head], counts[head], alive)
        found.append(log_A.astype(np.float32))
    return np.concatenate(found, axis=1)


def _log_means(dots, counts, alive) -> np.ndarray:
    """`descend`'s log A for many sets of alive clusters at once: dots f32[M C], alive bool[P C] -> [P C].

    One exponential serves all sets, and two matrix products do the rest, in float64, whose range makes it possible: a
    query row counts nothing in a set that holds nothing within 690 nats of its best.
    """
    live = counts > 0
    exp = np.where(live, dots, -np.inf).astype(np.float64)
    exp = np.exp(exp - exp.max(axis=1, keepdims=True))
    totals = (alive * counts) @ exp.T  # [P M]
    shares = np.where(totals > LEAST, 1 / np.maximum(totals, LEAST), 0) / len(dots)
    with np.errstate(divide="ignore"):
        return np.where(alive, np.log(shares @ exp), -np.inf)


def _sorted_scores(log_A, counts):
    """Scores of keys that take part ascending, −∞ first for all others, and the keys up to and including each."""
    alive = (counts > 0) & (log_A > -np.inf)
    kept, number = log_A[alive], counts[alive].astype(np.int64)
    order = np.argsort(kept)  # not stable, which is slow: equal scores are as good as one
    others = counts.sum(dtype=np.int64) - number.sum()
    ascending = np.concatenate([[-np.inf], kept[order].astype(np.float64)])
    return ascending, np.concatenate([[others], others + np.cumsum(number[order])])


def _quantiles(log_A, counts, fractions) -> np.ndarray:
    """log of the quantiles of exp(log_A), every cluster counted `counts` times; linear like NumPy's default."""
    ascending, ends = _sorted_scores(log_A, counts)
    position = np.clip(fractions, 0, 1) * (ends[-1] - 1)
    below = np.floor(position)
    low, high = (
        ascending[np.searchsorted(ends, np.minimum(rank, ends[-1] - 1), side="right")] for rank in (below, below + 1)
    )
    with np.errstate(divide="ignore"):
        return np.logaddexp(low + np.log1p(below - position), high + np.log(position - below))


def _with_steps(grid, log_A, counts) -> np.ndarray:
    """The grid and the sparsities at which the quantile function bends, two a cluster, padded with ones.

    All of them while there are few clusters; else only those without which interpolation would miss by more than
    TOLERANCE. The size depends on the number of clusters alone: documents of one length share compiled programs.
    """
    size = len(grid) + 2 * min(len(counts), MOST_EXACT_CLUSTERS)
    _, ends = _sorted_scores(log_A, counts)
    ranks = np.concatenate([ends - 1, ends[:-1]]) / max(ends[-1] - 1, 1)
    steps = np.union1d(grid, np.clip(ranks, 0, 1).astype(np.float32))
    if len(steps) > size:
        steps = _coarsened(steps, np.isin(steps, grid), _quantiles(log_A, counts, steps.astype(np.float64)), size)
    return np.pad(steps, (0, size - len(steps)), constant_values=1)


def _coarsened(steps, chosen, log_T, size: int) -> np.ndarray:
    """The chosen steps, and of the others what linear interpolation needs, worst first, but `size` in all."""
    position = np.arange(len(steps))
    while True:
        kept = np.flatnonzero(chosen)
        interval = np.clip(np.searchsorted(kept, position, side="right") - 1, 0, len(kept) - 2)
        left, right = kept[interval], kept[interval + 1]
        weight = (steps - steps[left]).astype(np.float64) / (steps[right] - steps[left])
        with np.errstate(divide="ignore"):
            guess = np.logaddexp(log_T[left] + np.log1p(-weight), log_T[right] + np.log(weight))
        error = np.where(chosen, 0, np.abs(guess - log_T))
        worst = np.maximum.reduceat(error, kept[:-1])
        add = np.flatnonzero((error > TOLERANCE) & (error == worst[interval]))
        room = size - len(kept)
        if not len(add) or not room:
            return steps[chosen]
        chosen = chosen.copy()
        chosen[add[np.argsort(-error[add], kind="stable")[:room]]] = True


def _rounding(queries, level, exact: bool) -> float:
    """How far two computations of one log score may lie apart, at most: equal centroids need not give equal dots.

    A matrix product may sum the columns of a centroid table in different orders, so what decides is the length of the
    summands, ‖q‖·‖c‖/√H, not the score. Unless `exact`, selection also sums over queries and clusters otherwise than
    was done here: in float32, in the manner of a tree.
    """
    eps = float(np.finfo(np.float32).eps)
    lengths = [jnp.max(jnp.linalg.norm(x.astype(jnp.float32), axis=-1)) for x in (queries, level.centroids)]
    bound = float(lengths[0]) * float(lengths[1]) / math.sqrt(queries.shape[-1])
    sums = 0 if exact else 4 * eps * math.log2(queries.shape[1] * queries.shape[2] * level.counts.shape[2])
    return min(2 * eps * bound, MOST_ROUNDING) + sums


def _above_ties(log_T, rounding: float) -> np.ndarray:
    """Float32, a little up: whether a cluster exceeds its own score is no matter of rounding."""
    log_T = log_T.astype(np.float32)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(log_T), log_T + 4 * np.spacing(np.abs(log_T)) + np.float32(rounding), log_T)
