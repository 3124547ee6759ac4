"""Thresholds from the observation window: one number a level for the whole model, for every sparsity (paper, 3.2).

A key's score is its cluster's A, or its own where keys have codes; the threshold for sparsity p is the p-quantile of
all key scores of all layers and heads together. How the scores of the window's queries make a table is the rule's:
`levelwise.py` for score "mean", `common_scale.py` for score "variance".
"""

import dataclasses

import jax.numpy as jnp

from squeezejax import buckets
from squeezejax.offline import common_scale, levelwise
from squeezejax.tree import Tree


def calibrate(tree: Tree, queries) -> Tree:
    """The tree with its table of thresholds, from queries [L N W H] after RoPE: usually the window's own.

    Any number W ≥ 1 of queries serves. Runs partly on the host, so not under `jit`.
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
    table = common_scale.table if tree.config.score == "variance" else levelwise.table
    found = table(buckets.in_room(tree, "xla"), queries)
    return dataclasses.replace(tree, **found)
