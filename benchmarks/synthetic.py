"""Trees of any size made in seconds, for timing: clusters of uneven size around random centres, no K-means.

What an attention step costs depends on shapes and on how many keys are kept, not on where the keys come from; how many
are kept is set by searching for the thresholds.
"""

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.config import SqueezeConfig
from squeezejax.tree import Level, Tree


def synthetic_tree(
    num_keys: int,
    *,
    num_layers: int = 1,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    fractions: tuple[float, ...] = (0.05,),
    window: int = 100,
    dtype=jnp.float32,
    seed: int = 0,
) -> Tree:
    """An uncalibrated tree of the paper's kind with S = num_keys clustered keys; clusters are runs, as always."""
    L, K, S, H = num_layers, num_kv_heads, num_keys, head_dim
    rng = np.random.default_rng(seed)
    config = SqueezeConfig.paper(cluster_fractions=fractions, observation_window=window)
    clusters = config.num_clusters(S)
    centres, parents, levels = np.zeros((L, K, 1, H), np.float32), None, []
    for C, below in zip(clusters, [*clusters[1:], S], strict=True):
        # Children scatter around their parent less than parents do around the origin.
        own = rng.standard_normal((L, K, C, H), dtype=np.float32) * (0.8 if levels else 1.2)
        centres = own + (np.take_along_axis(centres, parents[..., None], axis=2) if levels else 0)
        children = _uneven(rng, (L, K, C), below)
        levels.append([centres, children, np.zeros((L, K, C), np.int32) if parents is None else parents])
        parents = _owners(children, below)
    built, counts = (), None
    for centroids, children, owners in reversed(levels):
        runs = (children,) if counts is None else (_sums(counts, children), children)
        counts = runs[0]
        starts, *child_starts = (jnp.asarray(np.cumsum(run, axis=-1) - run, jnp.int32) for run in runs)
        counts_here, *child_counts = (jnp.asarray(run, jnp.int32) for run in runs)
        owners = jnp.asarray(owners, jnp.int32)
        built = (Level(jnp.asarray(centroids), counts_here, starts, owners, *child_starts, *child_counts), *built)
    cache = jax.jit(lambda key, rows: jax.random.normal(key, (L, K, rows, H), dtype), static_argnums=1)
    keys = [jax.random.key(seed + i, impl="unsafe_rbg") for i in range(4)]
    near = jnp.take_along_axis(built[-1].centroids, jnp.asarray(parents)[..., None], axis=2).astype(dtype)
    return Tree(
        keys=near + cache(keys[0], S) * jnp.asarray(0.5, dtype),
        values=cache(keys[1], S),
        order=jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (L, K, S)),
        window_keys=cache(keys[2], window),
        window_values=cache(keys[3], window),
        levels=built,
        config=config,
        num_keys=S,
    )


def thresholds_for(kept_fraction, tree: Tree, target: float, *, steps: int = 24) -> jax.Array:
    """log T f32[levels] at which `kept_fraction(log_T)` is the target, by bisection of the finest level's threshold.

    Coarser levels keep everything that the finest could: their threshold lies log 4 below, the default margin.
    """
    low, high = -40.0, 0.0
    depth = len(tree.levels)
    at = lambda log_t: jnp.asarray([log_t - 1.4 * (depth - 1 - i) for i in range(depth)], jnp.float32)
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if float(kept_fraction(at(middle))) > target else (low, middle)
    return at((low + high) / 2)


def _uneven(rng, shape, total: int) -> np.ndarray:
    """Positive integers [… C] that sum to `total` along the last axis, spread like an exponential distribution."""
    weights = rng.exponential(size=shape) + 0.05
    cuts = np.floor(np.cumsum(weights / weights.sum(-1, keepdims=True), axis=-1) * (total - shape[-1])).astype(int)
    cuts[..., -1] = total - shape[-1]
    return np.diff(cuts, axis=-1, prepend=0) + 1


def _owners(children, total: int) -> np.ndarray:
    """i32[… total]: the parent of each child, for children [… C] side by side."""
    flat = children.reshape(-1, children.shape[-1])
    owners = [np.repeat(np.arange(len(row), dtype=np.int32), row) for row in flat]
    return np.stack(owners).reshape(*children.shape[:-1], total)


def _sums(counts, children) -> np.ndarray:
    """Counts of parents: sums of their children's counts [… C], children [… P] of them side by side."""
    ends = np.cumsum(children, axis=-1)
    totals = np.take_along_axis(np.cumsum(counts, axis=-1), ends - 1, axis=-1)
    return np.diff(totals, axis=-1, prepend=0)
