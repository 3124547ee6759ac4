"""The tree: a squeezed context as one pytree, and building it from keys and values.

Axis letters, used in names, shape comments and einsum strings throughout the repository:

    B  batch (user inputs over one tree)        S  clustered keys of the fixed context
    T  query tokens of a user input             C  clusters (centroids) of one level
    L  layers                                   W  observation window: last tokens of the context
    N  query heads                              H  head dimension
    K  key/value heads                          D  model (embedding) dimension
    G  query heads per key/value head, N/K      V  vocabulary

Keys and values lie in cluster order, the clusters of one parent side by side, so that a cluster at any level is one
run of rows: `starts` and `counts` say which. Readers use these two and `order`, and assume nothing else about rows.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.config import SqueezeConfig
from squeezejax.mesh import sharding
from squeezejax.offline.kmeans import kmeans
from squeezejax.offline.shape import GRANULE, Shape, shape_clusters, shape_of
from squeezejax.pallas_kernels.xla.segment_sums import segment_sum


def _static(**kwargs):
    return dataclasses.field(metadata={"static": True}, **kwargs)


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Level:
    """The clusters of one level of the hierarchy; a cluster with count 0 is dead and masked everywhere."""

    centroids: jax.Array  # f32[L K C H], means of the raw keys after RoPE
    counts: jax.Array  # i32[L K C], keys in the cluster
    starts: jax.Array  # i32[L K C], first row of the cluster's run
    parents: jax.Array  # i32[L K C], cluster of the next coarser level; zeros at the coarsest
    # The same relation downwards, as runs of clusters of the next finer level; None at the finest.
    child_starts: jax.Array | None = None  # i32[L K C]
    child_counts: jax.Array | None = None  # i32[L K C]
    value_centroids: jax.Array | None = None  # f32[L K C H], means of the values, for the tail estimate (estimate.py)


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Tree:
    """A squeezed fixed context: all that answering questions about it needs, besides the model."""

    keys: jax.Array  # [L K S' H], after RoPE, in cluster order
    values: jax.Array  # [L K S' H]
    order: jax.Array  # i32[L K S'], position in the context of each row; −1 = padding
    window_keys: jax.Array  # [L K W H]
    window_values: jax.Array  # [L K W H]
    levels: tuple[Level, ...]  # coarse → fine
    config: SqueezeConfig = _static()
    num_keys: int = _static()  # S; rows may be more, by padding
    fingerprint: str | None = _static(default=None)  # of the model that made it; None = unknown
    sparsities: jax.Array | None = None  # f32[P], ascending grid of the table below
    thresholds: jax.Array | None = None  # f32[levels P], log T; None = not calibrated
    context_hash: jax.Array | None = None  # u8[32], SHA-256 of the context's token ids (with every part that was
    # appended: of the hash so far and the part's); a leaf, so that another document compiles nothing again
    parts: int = _static(default=1)  # of equal size, along rows and clusters; a cluster lies in one with its children

    # Axes by attribute path, R = rows; what `squeezejax.shardings` splits a tree by.
    AXES: ClassVar[dict[str, str]] = {
        "keys": "LKRH",
        "values": "LKRH",
        "order": "LKR",
        "window_keys": "LKWH",
        "window_values": "LKWH",
        "levels.centroids": "LKCH",
        "levels.counts": "LKC",
        "levels.starts": "LKC",
        "levels.parents": "LKC",
        "levels.child_starts": "LKC",
        "levels.child_counts": "LKC",
        "levels.value_centroids": "LKCH",
        "sparsities": "P",
        "thresholds": "nP",
        "context_hash": "h",
    }

    @property
    def context_length(self) -> int:
        """Tokens of the fixed context, S + W; the first user token has this position."""
        return self.num_keys + self.window_keys.shape[2]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.keys.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.keys.shape[1]


def build_tree(
    keys, values, config: SqueezeConfig, *, key=None, labels=None, implementation: str | None = None
) -> Tree:
    """Clusters a context's keys (spec.md, Offline 2-3; paper sections 3.1 and 3.3) into an uncalibrated tree.

    keys, values [L K S+W H] after RoPE, floating point; the last W = config.observation_window rows stay unclustered.
    `key` seeds K-means (default `jax.random.key(0)`). `labels` skips the clustering: a tuple coarse → fine, whose last
    entry i32[L K S] maps key → finest cluster and each earlier one i32[L K C_below] maps cluster → parent; C of a
    level is then the length of the next coarser entry, or else its largest label + 1, and clusters may be empty.
    `implementation` of the clustering, as for `kmeans`.

    Raises ValueError for shapes that do not fit, a context no longer than the window, keys to cluster that are not
    finite, and labels out of range. There are never fewer keys than clusters: C of a level is at most S.
    """
    keys, values = jnp.asarray(keys), jnp.asarray(values)
    _check_keys(keys, values, config)
    L = keys.shape[0]
    if not isinstance(keys, jax.core.Tracer):
        for i in range(L):
            check_finite(keys[i], values[i], i)
    if labels is None:
        seeds = jax.random.split(jax.random.key(0) if key is None else key, L)
        layers = [build_layer(keys[i], values[i], config, seeds[i], implementation) for i in range(L)]
    else:
        clusters = _check_labels(labels, keys, config)
        layers = [
            _arrange(keys[i], values[i], tuple(jnp.asarray(entry[i], jnp.int32) for entry in labels), clusters, config)
            for i in range(L)
        ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@functools.partial(jax.jit, static_argnames=("config", "implementation", "first_row"))
def build_layer(
    keys, values, config: SqueezeConfig, key, implementation: str | None = None, first_row: int = 0
) -> Tree:
    """`build_tree` for one layer: keys, values [K S+W H] -> a Tree whose arrays lack the axis L.

    `first_row` is where its rows will begin: cluster sizes that suit kernels depend on it.
    """
    build = functools.partial(_build_heads, config=config, implementation=implementation, first_row=first_row)
    return sharding.map_heads(build, keys, values, jax.random.split(key, keys.shape[0]))


def _build_heads(
    keys, values, seeds, config: SqueezeConfig, implementation: str | None = None, first_row: int = 0
) -> Tree:
    """`build_layer` with a random key a head."""
    S = keys.shape[1] - config.observation_window
    clusters = config.num_clusters(S)
    options = {
        "max_iterations": config.kmeans_iterations,
        "tolerance": config.kmeans_tolerance,
        "swap_rounds": config.kmeans_swap_rounds,
        "implementation": implementation,
    }

    def cluster_head(rows, seed):  # rows [S H] -> labels, coarse → fine
        *upper_seeds, fine_seed = jax.random.split(seed, config.num_levels)
        # K-means takes float32 and bfloat16; float16 widens exactly.
        rows = rows.astype(jnp.float32) if rows.dtype == jnp.float16 else rows
        found = kmeans(rows, clusters[-1], key=fine_seed, **options)
        labels = [found.labels]
        weights = found.counts.astype(jnp.float32)
        for C, upper_seed in zip(reversed(clusters[:-1]), reversed(upper_seeds), strict=True):
            found = kmeans(found.centroids, C, key=upper_seed, weights=weights, **options)
            weights = jax.ops.segment_sum(weights, found.labels, C)
            labels.insert(0, found.labels)
        return tuple(labels)

    with jax.named_scope("cluster"):
        labels = jax.vmap(cluster_head)(keys[:, :S], seeds)
    return _arrange(keys, values, labels, clusters, config, shape_of(config, S, keys.dtype, first_row))


@functools.partial(jax.jit, static_argnames=("clusters", "config", "shape"))
def _arrange(keys, values, labels, clusters: tuple[int, ...], config: SqueezeConfig, shape: Shape | None = None):
    """Sorts one layer by cluster into a Tree without the axis L.

    labels as for `build_tree`, but without L; clusters = C of each level; `shape` of the finest ones, None = as given.
    """
    S = keys.shape[1] - config.observation_window
    order, levels = jax.vmap(functools.partial(_arrange_head, clusters=clusters, shape=shape))(keys[:, :S], labels)
    padding = padding_rows(S, keys.dtype)
    take = lambda x: jnp.take_along_axis(x[:, :S], order[:, :, None], axis=1)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    return Tree(
        keys=pad(take(keys)),
        values=pad(take(values)),
        order=jnp.pad(order, ((0, 0), (0, padding)), constant_values=-1),
        window_keys=keys[:, S:],
        window_values=values[:, S:],
        levels=levels,
        config=config,
        num_keys=S,
    )


def padding_rows(num_keys: int, dtype) -> int:
    """Rows of zeros at the end of a head."""
    # Kernels, which take 16-bit keys, fetch rows by granules: a head then ends with a whole one.
    return -num_keys % GRANULE if dtype.itemsize == 2 else 0


def _arrange_head(keys, labels, *, clusters, shape: Shape | None):
    """One head: keys [S H], labels coarse → fine -> (order i32[S], levels without L and K)."""
    # Renumber from the top, so that the children of a cluster become neighbours, and their rows one run.
    parents = [jnp.zeros(clusters[0], jnp.int32)]
    number = jnp.arange(clusters[0], dtype=jnp.int32)  # old cluster id -> new one
    for C, parent_of in zip(clusters[1:], labels[:-1], strict=True):
        parent = number[parent_of]
        old = jnp.argsort(parent, stable=True).astype(jnp.int32)
        parents.append(parent[old])
        number = jnp.zeros(C, jnp.int32).at[old].set(jnp.arange(C, dtype=jnp.int32))
    cluster_of = number[labels[-1]]
    if shape is not None:
        cluster_of = shape_clusters(keys, cluster_of, parents[-1], shape)
    order = jnp.argsort(cluster_of, stable=True).astype(jnp.int32)
    rows, row_cluster = keys[order].astype(jnp.float32), cluster_of[order]

    levels, children = [], (None, None)
    for C, parent in zip(reversed(clusters), reversed(parents), strict=True):
        counts, starts = _run_lengths(row_cluster, C)
        centroids = _means(rows, row_cluster, counts, starts)
        levels.insert(0, Level(centroids, counts, starts, parent, *children))
        row_cluster = parent[row_cluster]
        if len(levels) < len(clusters):
            child_counts, child_starts = _run_lengths(parent, clusters[-len(levels) - 1])
            children = (child_starts, child_counts)
    return order, tuple(levels)


def _run_lengths(owner, num_owners: int):
    """How many neighbours each owner has and where they begin, i32[C] both; owner i32[…] is ascending."""
    counts = jax.ops.segment_sum(jnp.ones_like(owner), owner, num_owners, indices_are_sorted=True)
    return counts, jnp.cumsum(counts) - counts


def _means(rows, row_cluster, counts, starts):
    """Mean of each cluster f32[C H]; rows f32[S H] in cluster order, row_cluster i32[S] ascending."""
    # First row + mean difference: equal keys then give exactly that key, and ties stay ties (spec.md, traps).
    first = rows[jnp.minimum(starts, rows.shape[0] - 1)]
    excess = segment_sum(rows - first[row_cluster], row_cluster, len(counts))
    centroids = first + excess / jnp.maximum(counts, 1).astype(jnp.float32)[:, None]
    return jnp.where((counts > 0)[:, None], centroids, 0.0)


def _check_keys(keys, values, config):
    if keys.ndim != 4 or keys.shape != values.shape:
        raise ValueError(f"keys and values must both be [L K S+W H], got {keys.shape} and {values.shape}")
    if not jnp.issubdtype(keys.dtype, jnp.floating) or keys.dtype != values.dtype:
        raise ValueError(f"keys and values must share a floating-point dtype, got {keys.dtype} and {values.dtype}")
    check_context_length(keys.shape[2], config)


def check_finite(keys, values, layer: int):
    """Raises ValueError unless one layer's keys and values [K S+W H] are numbers."""
    if not bool(jnp.all(jnp.isfinite(keys)) & jnp.all(jnp.isfinite(values))):
        raise ValueError(
            f"the keys or values of layer {layer} are not finite: check the model's weights and dtype (float16 "
            "overflows at 65,504)"
        )


def check_context_length(num_tokens: int, config: SqueezeConfig):
    """Raises ValueError unless at least one key is left to cluster before the window."""
    if num_tokens <= config.observation_window:
        raise ValueError(
            f"the context has {num_tokens} tokens, and the observation window takes {config.observation_window} of "
            "them: nothing is left to cluster. Use a longer context or a smaller observation_window."
        )


def _check_labels(labels, keys, config) -> tuple[int, ...]:
    """C of each level, after checking that labels have the documented form."""
    L, K, tokens, _ = keys.shape
    S = tokens - config.observation_window
    if len(labels) != config.num_levels:
        raise ValueError(f"labels has {len(labels)} levels, cluster_fractions {config.num_levels}; they must agree")
    labels = [np.asarray(entry) for entry in labels]
    for entry in labels:
        if entry.ndim != 3 or entry.shape[:2] != (L, K) or not np.issubdtype(entry.dtype, np.integer):
            raise ValueError(f"every entry of labels must be integers [L={L} K={K} …], got {entry.dtype}{entry.shape}")
        if entry.min() < 0:
            raise ValueError(f"labels must not be negative, got {entry.min()}")
    if labels[-1].shape[2] != S:
        raise ValueError(f"the last entry of labels must give each of the {S} clustered keys, got {labels[-1].shape}")
    # A level's C is the length of the entry that maps its clusters to parents; the coarsest has no such entry.
    clusters = (int(labels[0].max()) + 1, *(entry.shape[2] for entry in labels[:-1]))
    for C, entry in zip(clusters, labels, strict=True):
        if entry.max() >= C:
            raise ValueError(f"labels name cluster {entry.max()}, but that level has {C} clusters")
    return clusters
