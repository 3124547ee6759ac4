"""From keys and values to a tree: clustering them, sorting them into runs, and rounding what the index holds."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax import buckets
from squeezejax.config import SqueezeConfig
from squeezejax.mesh import sharding
from squeezejax.offline.kmeans import Clustering, Division, cluster_levels, divide_levels
from squeezejax.offline.shape import Shape, shape_clusters, shape_of
from squeezejax.pallas_kernels import codes, registry
from squeezejax.pallas_kernels.keys_values import KeysValues, in_8_bits
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


class Real(NamedTuple):
    """How much of a layer is real, where there is room for more: numbers that programs do not depend on."""

    num_tokens: jax.Array  # i32[], sinks + S + W, the first ones
    divisions: tuple[Division, ...] | None  # of the rows and clusters of each level, coarse → fine; None: all are real


def room_for(num_tokens: int, config: SqueezeConfig, clustering: Clustering, dtype) -> tuple[int, Real]:
    """How many rows a layer of so many tokens is built with, so that a program serves many S (buckets.py), and `Real`.

    Where cluster sizes are made to suit kernels (shape.py) they are made for S, and there is room for no more.
    """
    S = num_tokens - config.always_read
    if not config.key_bits or shape_of(config, S, stored_dtype(config, dtype)) is not None:
        num_rows, divisions = S, None
    else:
        num_rows = buckets.round_up_rows(S)
        rooms = num_rows, config.num_clusters(num_rows)
        divisions = divide_levels(S, config.num_clusters(S), rooms, clustering)
    return num_rows, jax.device_put(Real(np.int32(num_tokens), divisions))


@functools.partial(jax.jit, static_argnames=("config", "clustering", "implementation", "first_row", "num_rows"))
def build_layer(
    keys,
    values,
    config: SqueezeConfig,
    key,
    clustering: Clustering,
    implementation: str | None = None,
    first_row: int = 0,
    offset=None,
    num_rows: int | None = None,
    real: Real | None = None,
) -> TreeLayer:
    """`build_tree` for one layer: keys, values [K sinks+S+W H].

    `first_row` is where its rows will begin: cluster sizes that suit kernels depend on it. `offset` f32[K H] is the
    mean that codes leave out, where they are to be joined with others; by default that of these keys. With num_rows
    the layer has room for so many clustered keys, and clusters for them, of which `real` are there; `num_keys` is
    then num_rows, and keys and values may have any number of tokens from sinks + num_rows on.
    """
    options = {
        "config": config,
        "clustering": clustering,
        "implementation": implementation,
        "first_row": first_row,
        "num_rows": num_rows,
    }
    build = functools.partial(_build_heads, **options)
    K = keys.shape[0]
    by_head = jax.tree.map(lambda x: jnp.broadcast_to(x, (K, *x.shape)), real)
    return sharding.map_heads(build, keys, values, jax.random.split(key, K), offset, by_head)


def _build_heads(
    keys,
    values,
    seeds,
    offset,
    real: Real | None,
    *,
    config: SqueezeConfig,
    clustering: Clustering,
    implementation: str | None,
    first_row: int,
    num_rows: int | None,
) -> TreeLayer:
    """`build_layer` with a random key a head, and `real` the same for each."""
    num_rows = keys.shape[1] - config.always_read if num_rows is None else num_rows
    real = jax.tree.map(lambda x: x[0], real)
    rows = clustered(keys, config, num_rows)
    clusters = config.num_clusters(num_rows)

    def cluster_head(rows, seed):  # rows [R H] -> labels, coarse → fine
        # K-means takes float32 and bfloat16; float16 widens exactly.
        rows = rows.astype(jnp.float32) if rows.dtype == jnp.float16 else rows
        options = {"options": clustering, "implementation": implementation}
        return cluster_levels(rows, clusters, key=seed, divisions=None if real is None else real.divisions, **options)

    with jax.named_scope("cluster"):
        labels = jax.vmap(cluster_head)(rows, seeds)
    shape = shape_of(config, num_rows, stored_dtype(config, keys.dtype), first_row)
    return _arrange(keys, values, labels, clusters, config, shape, offset, None if real is None else real.num_tokens)


def clustered(x, config: SqueezeConfig, num_rows: int):
    """The rows of x [K sinks+S+W H] that are clustered, or more, if num_rows says so: [K num_rows H]."""
    return x[:, config.sinks : config.sinks + num_rows]


def always_read(x, config: SqueezeConfig, num_tokens):
    """The other ones of the first num_tokens rows: [K sinks+W H]."""
    W = config.observation_window
    window = jax.lax.dynamic_slice_in_dim(x, num_tokens - W, W, axis=1)
    return jnp.concatenate([x[:, : config.sinks], window], axis=1)


@functools.partial(jax.jit, static_argnames=("clusters", "config", "shape"))
def _arrange(
    keys,
    values,
    labels,
    clusters: tuple[int, ...],
    config: SqueezeConfig,
    shape: Shape | None = None,
    offset=None,
    num_tokens=None,
) -> TreeLayer:
    """Sorts one layer by cluster.

    labels as for `build_tree`, but without L, the number of clusters for rows that are not real; clusters = C of each
    level; `shape` of the finest ones, None = as given; num_tokens i32[], sinks + S + W (None: all of keys).
    """
    num_tokens = keys.shape[1] if num_tokens is None else num_tokens
    S, R = num_tokens - config.always_read, labels[-1].shape[1]
    rows = clustered(keys, config, R)
    order, levels = jax.vmap(functools.partial(_arrange_head, clusters=clusters, shape=shape))(rows, labels)
    padding = padding_rows(R, stored_dtype(config, keys.dtype))
    live = jnp.arange(R, dtype=jnp.int32) < S  # of rows in cluster order, in which those that are not real come last

    def take(x):
        taken = jnp.take_along_axis(x, order[:, :, None], axis=1)
        return jnp.where(live[None, :, None], taken, jnp.zeros((), x.dtype))

    pad = lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    sorted_keys = take(rows)
    round_head = functools.partial(_round_head, live=live, config=config)
    with jax.named_scope("round"):
        levels, coded = jax.vmap(round_head)(sorted_keys, levels, offset)
    key_codes, key_steps = (None, None) if coded is None else map(pad, coded)
    cache = KeysValues(sorted_keys, take(clustered(values, config, R)))
    cache = jax.tree.map(pad, in_8_bits(cache) if config.cache_bits == 8 else cache)
    order = jnp.where(live[None, :], order, -1)
    return TreeLayer(
        **vars(cache),
        order=jnp.pad(order, ((0, 0), (0, padding)), constant_values=-1),
        window_keys=always_read(keys, config, num_tokens),
        window_values=always_read(values, config, num_tokens),
        levels=levels,
        config=config,
        num_keys=R,
        key_codes=key_codes,
        key_steps=key_steps,
    )


def _round_head(keys, levels: tuple[Level, ...], offset, *, live, config: SqueezeConfig):
    """One head's levels with centroids rounded and spreads measured, and the codes of its keys [R H], or None.

    Keys lie in cluster order, those of live bool[R] being real; offset f32[H], or None for the mean of these keys.
    """
    if config.index_bits == 32 and config.score == "mean":
        return levels, None
    turned = codes.rotate(keys)
    if offset is None:
        offset = jnp.sum(turned, axis=0) / jnp.sum(live.astype(jnp.float32))  # of rows that are not real, zeros
    rounded = []
    for level in levels:
        C = len(level.counts)
        if config.index_bits >= 16:
            dtype = jnp.float32 if config.index_bits == 32 else jnp.bfloat16
            level = dataclasses.replace(level, centroids=level.centroids.astype(dtype))
            numbers = codes.rotate(level.centroids)
        else:
            packed, steps = codes.encode(codes.rotate(level.centroids) - offset[None], config.index_bits)
            level = dataclasses.replace(level, centroids=None, codes=packed, steps=steps, offset=offset)
            numbers = codes.decode(codes.Codes(packed, steps), keys.shape[1]) + offset[None]
        # The clusters of a level are runs of rows, in order.
        cluster = jnp.repeat(jnp.arange(C), level.counts, total_repeat_length=len(live))
        residual = jnp.where(live[:, None], turned - numbers[cluster], 0.0)
        if config.score == "variance":
            squares = segment_sum(jnp.mean(residual**2, axis=1), cluster, C)
            spreads = squares / jnp.maximum(level.counts, 1).astype(jnp.float32)
            level = dataclasses.replace(level, spreads=spreads.astype(jnp.bfloat16))
        rounded.append(level)
    return tuple(rounded), codes.encode(residual, config.key_bits) if config.key_bits else None


def stored_dtype(config: SqueezeConfig, dtype):
    """Of clustered keys and values that a model gives in `dtype`."""
    return jnp.dtype(jnp.int8) if config.cache_bits == 8 else dtype


def padding_rows(num_keys: int, dtype) -> int:
    """Rows of zeros at the end of a head."""
    return -num_keys % registry.layout(dtype).row_multiple


def _arrange_head(keys, labels, *, clusters, shape: Shape | None):
    """One head: keys [R H], labels coarse → fine -> (order i32[R], levels without L and K).

    Rows and clusters that are not real have the label C. The rows come last, the clusters with those of the last one.
    """
    # Renumber from the top, so that the children of a cluster become neighbours, and their rows one run.
    parents = [jnp.zeros(clusters[0], jnp.int32)]
    number = jnp.arange(clusters[0], dtype=jnp.int32)  # old cluster id -> new one
    for C, parent_of in zip(clusters[1:], labels[:-1], strict=True):
        parent = number[jnp.minimum(parent_of, len(number) - 1)]
        old = jnp.argsort(parent, stable=True).astype(jnp.int32)
        parents.append(parent[old])
        number = jnp.zeros(C, jnp.int32).at[old].set(jnp.arange(C, dtype=jnp.int32))
    renumber = lambda numbers, labels, C: jnp.where(labels < len(numbers), numbers[labels], C)
    cluster_of = renumber(number, labels[-1], clusters[-1])
    if shape is not None:
        cluster_of = shape_clusters(keys, cluster_of, parents[-1], shape)
    order = jnp.argsort(cluster_of, stable=True).astype(jnp.int32)
    rows, row_cluster = keys[order].astype(jnp.float32), cluster_of[order]

    levels, children = [], (None, None)
    above = (*reversed(clusters[:-1]), 0)
    for C, parent, C_above in zip(reversed(clusters), reversed(parents), above, strict=True):
        counts, starts = _run_lengths(row_cluster, C)
        centroids = _means(rows, row_cluster, counts, starts)
        levels.insert(0, Level(centroids, counts, starts, parent, *children))
        row_cluster = renumber(parent, row_cluster, C_above)
        if len(levels) < len(clusters):
            child_counts, child_starts = _run_lengths(parent, C_above)
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
