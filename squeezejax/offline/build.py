"""From keys and values to a tree: clustering them, sorting them into runs, and rounding what the index holds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.config import SqueezeConfig
from squeezejax.mesh import sharding
from squeezejax.offline.kmeans import Clustering, cluster_levels
from squeezejax.offline.shape import Shape, shape_clusters, shape_of
from squeezejax.pallas_kernels import codes, registry
from squeezejax.pallas_kernels.xla.segment_sums import segment_sum
from squeezejax.tree import Level, Tree, TreeLayer, stack_layers

FAST_WEIGHT = 0.1  # of dimensions that RoPE turns more than once over the context


def build_tree(
    keys,
    values,
    config: SqueezeConfig,
    *,
    key=None,
    labels=None,
    weights=None,
    implementation: str | None = None,
) -> Tree:
    """Clusters a context's keys (paper sections 3.1 and 3.3) into an uncalibrated tree.

    Args:
      keys, values: [L K sinks+S+W H] after RoPE, in order, floating point; the first `config.sinks` and the last
        `config.observation_window` rows stay unclustered.
      config: how to build it.
      key: seeds K-means (default `jax.random.key(0)`).
      labels: skips the clustering: a tuple coarse → fine, whose last entry i32[L K S] maps key → finest cluster and
        each earlier one i32[L K C_below] maps cluster → parent; C of a level is then the length of the next coarser
        entry, or else its largest label + 1, and clusters may be empty.
      weights: H numbers, how much each dimension counts in the metric "slow" (default 1 each; `squeeze` knows which
        dimensions the model's RoPE turns fast: `dimension_weights`).
      implementation: of the clustering, as for `kmeans`.

    Raises:
      ValueError: shapes that do not fit, a context no longer than sinks and window, keys to cluster that are not
        finite, labels out of range.

    There are never fewer keys than clusters: C of a level is at most S.
    """
    keys, values = jnp.asarray(keys), jnp.asarray(values)
    _check_keys(keys, values, config)
    L, H = keys.shape[0], keys.shape[3]
    clustering = clustering_of(config, weights)
    if weights is not None and len(weights) != H:
        raise ValueError(f"weights must be H = {H} numbers, one a dimension, got {len(weights)}")
    if not isinstance(keys, jax.core.Tracer):
        for i in range(L):
            check_finite(keys[i], values[i], i)
    if labels is None:
        seeds = jax.random.split(jax.random.key(0) if key is None else key, L)
        layers = [build_layer(keys[i], values[i], config, seeds[i], clustering, implementation) for i in range(L)]
    else:
        clusters = _check_labels(labels, keys, config)
        layers = [
            _arrange(keys[i], values[i], tuple(jnp.asarray(entry[i], jnp.int32) for entry in labels), clusters, config)
            for i in range(L)
        ]
    return stack_layers(layers)


def clustering_of(config: SqueezeConfig, weights=None) -> Clustering:
    """How a configuration has keys clustered; `weights` as for `build_tree`."""
    slow = config.cluster_metric == "slow"
    return Clustering(
        metric="euclidean" if slow else "cosine",
        dimension_weights=tuple(weights) if slow and weights is not None else None,
        segment=config.cluster_segment,
        max_iterations=config.kmeans_iterations,
        tolerance=config.kmeans_tolerance,
        swap_rounds=config.kmeans_swap_rounds,
    )


def dimension_weights(frequencies, num_tokens: int) -> tuple[float, ...]:
    """How much each dimension of a key counts in the metric "slow", from RoPE's frequencies f32[H] in radians a token.

    1 where it turns less than once over num_tokens tokens, 0.1 where it turns more often: there a key's position
    decides, and is noise to a cluster (docs/method.md, The index).
    """
    slow = np.asarray(frequencies, np.float64) * num_tokens < 2 * np.pi
    return tuple(np.where(slow, 1.0, FAST_WEIGHT).tolist())


@functools.partial(jax.jit, static_argnames=("config", "clustering", "implementation", "first_row"))
def build_layer(
    keys,
    values,
    config: SqueezeConfig,
    key,
    clustering: Clustering,
    implementation: str | None = None,
    first_row: int = 0,
    offset=None,
) -> TreeLayer:
    """`build_tree` for one layer: keys, values [K sinks+S+W H].

    `first_row` is where its rows will begin: cluster sizes that suit kernels depend on it. `offset` f32[K H] is the
    mean that codes leave out, where they are to be joined with others; by default that of these keys.
    """
    options = {"config": config, "clustering": clustering, "implementation": implementation, "first_row": first_row}
    build = functools.partial(_build_heads, **options)
    seeds = jax.random.split(key, keys.shape[0])
    return sharding.map_heads(build, keys, values, seeds, *([] if offset is None else [offset]))


def _build_heads(
    keys,
    values,
    seeds,
    offset=None,
    *,
    config: SqueezeConfig,
    clustering: Clustering,
    implementation: str | None = None,
    first_row: int = 0,
) -> TreeLayer:
    """`build_layer` with a random key a head."""
    rows = clustered(keys, config)
    S = rows.shape[1]
    clusters = config.num_clusters(S)

    def cluster_head(rows, seed):  # rows [S H] -> labels, coarse → fine
        # K-means takes float32 and bfloat16; float16 widens exactly.
        rows = rows.astype(jnp.float32) if rows.dtype == jnp.float16 else rows
        return cluster_levels(rows, clusters, key=seed, options=clustering, implementation=implementation)

    with jax.named_scope("cluster"):
        labels = jax.vmap(cluster_head)(rows, seeds)
    return _arrange(keys, values, labels, clusters, config, shape_of(config, S, keys.dtype, first_row), offset)


def clustered(x, config: SqueezeConfig):
    """The rows of x [K sinks+S+W H] that are clustered: [K S H]."""
    return x[:, config.sinks : x.shape[1] - config.observation_window]


def always_read(x, config: SqueezeConfig):
    """The other rows: [K sinks+W H]."""
    return jnp.concatenate([x[:, : config.sinks], x[:, x.shape[1] - config.observation_window :]], axis=1)


@functools.partial(jax.jit, static_argnames=("clusters", "config", "shape"))
def _arrange(
    keys, values, labels, clusters: tuple[int, ...], config: SqueezeConfig, shape: Shape | None = None, offset=None
) -> TreeLayer:
    """Sorts one layer by cluster.

    labels as for `build_tree`, but without L; clusters = C of each level; `shape` of the finest ones, None = as given.
    """
    rows = clustered(keys, config)
    S = rows.shape[1]
    order, levels = jax.vmap(functools.partial(_arrange_head, clusters=clusters, shape=shape))(rows, labels)
    padding = padding_rows(S, keys.dtype)
    take = lambda x: jnp.take_along_axis(x, order[:, :, None], axis=1)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    sorted_keys = take(rows)
    round_head = functools.partial(_round_head, config=config)
    with jax.named_scope("round"):
        levels, coded = jax.vmap(round_head)(sorted_keys, levels, offset)
    key_codes, key_steps = (None, None) if coded is None else map(pad, coded)
    return TreeLayer(
        keys=pad(sorted_keys),
        values=pad(take(clustered(values, config))),
        order=jnp.pad(order, ((0, 0), (0, padding)), constant_values=-1),
        window_keys=always_read(keys, config),
        window_values=always_read(values, config),
        levels=levels,
        config=config,
        num_keys=S,
        key_codes=key_codes,
        key_steps=key_steps,
    )


def _round_head(keys, levels: tuple[Level, ...], offset, *, config: SqueezeConfig):
    """One head's levels with centroids rounded and spreads measured, and the codes of its keys [S H], or None.

    Keys lie in cluster order; offset f32[H], or None for the mean of these keys.
    """
    if config.index_bits == 32 and config.score == "mean":
        return levels, None
    S = keys.shape[0]
    turned = codes.rotate(keys)
    offset = jnp.mean(turned, axis=0) if offset is None else offset
    rounded = []
    for level in levels:
        if config.index_bits >= 16:
            dtype = jnp.float32 if config.index_bits == 32 else jnp.bfloat16
            level = dataclasses.replace(level, centroids=level.centroids.astype(dtype))
            numbers = codes.rotate(level.centroids)
        else:
            packed, steps = codes.encode(codes.rotate(level.centroids) - offset[None], config.index_bits)
            level = dataclasses.replace(level, centroids=None, codes=packed, steps=steps, offset=offset)
            numbers = codes.decode(codes.Codes(packed, steps), keys.shape[1]) + offset[None]
        # The clusters of a level are runs of rows, in order.
        cluster = jnp.repeat(jnp.arange(len(level.counts)), level.counts, total_repeat_length=S)
        residual = turned - numbers[cluster]
        if config.score == "variance":
            squares = segment_sum(jnp.mean(residual**2, axis=1), cluster, len(level.counts))
            spreads = squares / jnp.maximum(level.counts, 1).astype(jnp.float32)
            level = dataclasses.replace(level, spreads=spreads.astype(jnp.bfloat16))
        rounded.append(level)
    return tuple(rounded), codes.encode(residual, config.key_bits) if config.key_bits else None


def padding_rows(num_keys: int, dtype) -> int:
    """Rows of zeros at the end of a head."""
    return -num_keys % registry.layout(dtype).row_multiple


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
    # First row + mean difference: equal keys then give exactly that key, and ties stay ties (docs/method.md).
    first = rows[jnp.minimum(starts, rows.shape[0] - 1)]
    excess = segment_sum(rows - first[row_cluster], row_cluster, len(counts))
    centroids = first + excess / jnp.maximum(counts, 1).astype(jnp.float32)[:, None]
    return jnp.where((counts > 0)[:, None], centroids, 0.0)


def _check_keys(keys, values, config):
    if keys.ndim != 4 or keys.shape != values.shape:
        raise ValueError(f"keys and values must both be [L K sinks+S+W H], got {keys.shape} and {values.shape}")
    if not jnp.issubdtype(keys.dtype, jnp.floating) or keys.dtype != values.dtype:
        raise ValueError(f"keys and values must share a floating-point dtype, got {keys.dtype} and {values.dtype}")
    check_context_length(keys.shape[2], config)


def check_finite(keys, values, layer: int):
    """Raises ValueError unless one layer's keys and values [K sinks+S+W H] are numbers."""
    if not bool(jnp.all(jnp.isfinite(keys)) & jnp.all(jnp.isfinite(values))):
        raise ValueError(
            f"the keys or values of layer {layer} are not finite: check the model's weights and dtype (float16 "
            "overflows at 65,504)"
        )


def check_context_length(num_tokens: int, config: SqueezeConfig):
    """Raises ValueError unless at least one key is left to cluster between the sinks and the window."""
    if num_tokens <= config.always_read:
        sinks = f"{config.sinks} of them are sinks, " if config.sinks else ""
        raise ValueError(
            f"the context has {num_tokens} tokens, {sinks}and the observation window takes "
            f"{config.observation_window}: nothing is left to cluster. Use a longer context or a smaller "
            "observation_window."
        )


def _check_labels(labels, keys, config) -> tuple[int, ...]:
    """C of each level, after checking that labels have the documented form."""
    L, K, tokens, _ = keys.shape
    S = tokens - config.always_read
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
