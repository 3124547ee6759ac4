"""The table of thresholds, looked up at any sparsity."""

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.arguments import check_number
from squeezejax.tree import Tree

GRID = np.union1d(np.linspace(0, 1, 1001), np.linspace(0.99, 1, 101)).astype(np.float32)


def log_thresholds(tree: Tree, sparsity) -> jax.Array:
    """log T f32[levels], coarse → fine, at `sparsity` f32[], for one query token; of one a user f32[B], f32[B levels].

    sparsity ≤ 0 gives −∞ (every key kept), as NaN does under a trace, ≥ 1 gives +∞ (only what is always read is
    attended). Between grid points thresholds are interpolated linearly, not their logarithms. With codes of keys there
    is one more threshold, the last, for single keys. Raises ValueError for a tree that is not calibrated.
    """
    return _look_up(tree, sparsity, tree.thresholds)


def block_log_thresholds(tree: Tree, sparsity) -> jax.Array | None:
    """`log_thresholds` for W query tokens that select together; None where the tree makes no difference."""
    return None if tree.block_thresholds is None else _look_up(tree, sparsity, tree.block_thresholds)


def expected_missed_mass(tree: Tree, sparsity) -> jax.Array:
    """What `sparsity` f32[], may be traced, costs: the share f32[] of attention that goes to keys that are not read.

    Measured exactly, when the tree was calibrated, on the queries of its own window, each by itself, and averaged over
    layers and heads; other questions differ. Raises ValueError for a tree on which it was not measured.
    """
    if tree.missed_masses is None:
        raise ValueError(
            "what a sparsity misses was not measured on this tree: it is for score='variance', when calibrated"
        )
    p = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0)
    return jnp.interp(p, tree.sparsities, tree.missed_masses)


def sparsity_for(tree: Tree, missed_mass: float) -> float:
    """The largest sparsity of the table at which the tree misses at most this share of attention, as measured.

    Raises ValueError as `expected_missed_mass` does.
    """
    expected_missed_mass(tree, 0.0)
    good = np.asarray(tree.missed_masses) <= missed_mass
    return float(np.asarray(tree.sparsities)[np.flatnonzero(good)[-1]]) if good.any() else 0.0


def _look_up(tree: Tree, sparsity, table) -> jax.Array:
    p = check_number("sparsity", sparsity, per_user=True)
    if table is None or tree.sparsities is None:
        raise ValueError("the tree has no thresholds: call squeezejax.calibrate(tree, queries) first")
    return _interpolate(tree.sparsities, table, p)


@jax.jit
def _interpolate(grid, table, p):
    """log T f32[levels] at p f32[], from a grid f32[P] and table f32[levels P]; at p f32[B], f32[B levels]."""
    if p.ndim:
        return jax.vmap(_interpolate, (None, None, 0))(grid, table, p)
    p = jnp.where(jnp.isnan(p), 0.0, p)
    inside = jnp.clip(p, 0.0, 1.0)
    # The first grid point that reaches p, so that the one before lies below it also where ones pad the grid.
    right = jnp.maximum(jnp.searchsorted(grid, inside), 1)
    left = right - 1
    weight = (inside - grid[left]) / (grid[right] - grid[left])
    low, high = table[:, left], table[:, right]
    top = jnp.maximum(jnp.maximum(low, high), jnp.finfo(jnp.float32).min)  # finite: −∞ − −∞ would be NaN
    log_T = top + jnp.log((1 - weight) * jnp.exp(low - top) + weight * jnp.exp(high - top))
    return jnp.where(p <= 0, -jnp.inf, jnp.where(p >= 1, jnp.inf, log_T))
