"""Thresholds from the observation window: one number per level for the whole model, for every sparsity (spec.md, 4).

A key's score is its cluster's A, averaged over the calibration queries and the group's heads. The threshold for
sparsity p is the p-quantile of all key scores of all layers and heads together. In a hierarchy the levels above the
finest keep a margin more, and each level below is calibrated on what they leave.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.scores import layer_level, score_heads
from squeezejax.tree import Tree

GRID = np.union1d(np.linspace(0, 1, 1001), np.linspace(0.99, 1, 101)).astype(np.float32)
MOST_EXACT_CLUSTERS = 8192  # up to here a flat table holds every step of the quantile function


def log_thresholds(tree: Tree, sparsity) -> jax.Array:
    """log T f32[levels], coarse → fine, at `sparsity` f32[], which may be traced.

    sparsity ≤ 0 gives −∞ (every key kept), ≥ 1 gives +∞ (only window and user tokens attended). Between grid points
    thresholds are interpolated linearly, not their logarithms. Raises ValueError for a tree that is not calibrated.
    """
    p = jnp.asarray(sparsity, jnp.float32)
    if p.ndim:
        raise ValueError(f"sparsity must be one number, got shape {p.shape}")
    if tree.thresholds is None or tree.sparsities is None:
        raise ValueError("the tree has no thresholds: call squeezejax.calibrate(tree, queries) first")
    grid, table = tree.sparsities, tree.thresholds
    right = jnp.clip(jnp.searchsorted(grid, p), 1, grid.shape[0] - 1)
    left = right - 1
    weight = jnp.clip((p - grid[left]) / (grid[right] - grid[left]), 0.0, 1.0)
    low, high = table[:, left], table[:, right]
    top = jnp.maximum(jnp.maximum(low, high), jnp.finfo(jnp.float32).min)  # finite: −∞ − −∞ would be NaN
    log_T = top + jnp.log((1 - weight) * jnp.exp(low - top) + weight * jnp.exp(high - top))
    return jnp.where(p <= 0, -jnp.inf, jnp.where(p >= 1, jnp.inf, log_T))


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
    counts = [np.asarray(level.counts).ravel() for level in tree.levels]
    scores = _key_scores(tree, queries, np.empty((1, 0)))
    grid = _with_steps(GRID, scores[:, 0], counts[0]) if len(counts) == 1 else GRID
    table, set_of = np.empty((0, len(grid))), np.zeros(len(grid), int)
    for depth, count in enumerate(counts):
        if depth:
            # Sparsities that share all thresholds above this level share its scores: score each distinct set once.
            above, set_of = np.unique(table, axis=1, return_inverse=True)
            scores = _key_scores(tree, queries, above.T)
        dropped = _dropped_fractions(grid, depth, tree.config)
        row = np.empty(len(grid))
        for i, column in enumerate(scores.T):
            members = set_of.ravel() == i
            row[members] = _quantiles(column, count, dropped[members])
        # A coarse level that has to keep everything keeps its lowest cluster too, which no quantile does.
        is_finest = depth == len(counts) - 1
        table = np.vstack([table, row if is_finest else np.where(dropped <= 0, -np.inf, row)])
    return dataclasses.replace(tree, sparsities=jnp.asarray(grid), thresholds=_above_ties(table))


def _dropped_fractions(grid, depth: int, config) -> np.ndarray:
    """The fraction of all keys that `depth` (0 = coarsest) drops at each sparsity of the grid.

    The coarsest level keeps coarse_margin times what is wanted in the end, the finest just that, and levels between
    follow a geometric series; none keeps more than everything.
    """
    above = config.num_levels - 1
    margin = config.coarse_margin ** ((above - depth) / above) if above else 1.0
    return 1 - np.minimum(1, margin * (1 - grid.astype(np.float64)))


def _key_scores(tree: Tree, queries, above) -> np.ndarray:
    """log A f32[L·K·C P] of the level below those with thresholds `above` f32[P levels above], for P sets of them."""
    above = jnp.asarray(above, jnp.float32)
    scores = [np.asarray(_layer_scores(tree, queries[layer], layer, above)) for layer in range(tree.num_layers)]
    return np.concatenate([layer.reshape(layer.shape[0], -1) for layer in scores], axis=1).T


@jax.jit
def _layer_scores(tree: Tree, queries, layer, above):
    """log A f32[P K C] of one layer; queries [N W H], above f32[P levels above]."""
    K = tree.num_kv_heads
    q = queries.reshape(K, -1, *queries.shape[1:]).transpose(2, 0, 1, 3)  # [W K G H]
    levels = [layer_level(level, layer) for level in tree.levels[: above.shape[1] + 1]]
    valid = jnp.ones(q.shape[0], bool)
    return jax.lax.map(lambda log_T: score_heads(levels, q, valid, jnp.append(log_T, jnp.inf))[0], above)


def _sorted_scores(log_A, counts):
    """Live scores ascending, and the number of keys up to and including each."""
    live = counts > 0
    log_A, counts = log_A[live].astype(np.float64), counts[live].astype(np.int64)
    order = np.argsort(log_A, kind="stable")
    return log_A[order], np.cumsum(counts[order])


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
    """The grid and, where there are few clusters, every sparsity at which the quantile function bends."""
    _, ends = _sorted_scores(log_A, counts)
    if len(ends) > MOST_EXACT_CLUSTERS:
        return grid
    ranks = np.concatenate([ends - 1, ends[:-1]]) / max(ends[-1] - 1, 1)
    return np.union1d(grid, np.clip(ranks, 0, 1).astype(np.float32))


def _above_ties(table) -> jax.Array:
    """Float32, a few units in the last place up: whether a cluster exceeds its own score is no matter of rounding."""
    table = table.astype(np.float32)
    return jnp.asarray(np.where(np.isfinite(table), table + 4 * np.spacing(np.abs(table)), table))
