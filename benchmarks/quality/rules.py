"""Squeezed Attention with one thing changed: how a cluster scores, where a threshold holds, how it is calibrated.

`rule` makes a `Method`. It is a second, small implementation of calibration and selection that is open to changes; with
none of them it chooses what the library chooses (tests/test_quality_rules.py). Whatever the score, a cluster's number
is what one of its keys is taken to weigh in the softmax, normalised over all keys and averaged over the rows that share
a selection; thresholds are quantiles of these numbers over keys.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality.methods import CONFIG, SINKS, Choice, Fixed, Method, cluster_of_key, rounded, vector_read
from squeezejax import SqueezeConfig
from squeezejax.offline.calibrate import dropped_fractions
from squeezejax.pallas_kernels.xla import attend as reference
from squeezejax.pallas_kernels.xla.softmax import merge

# ---- Scores of clusters


class Clusters(NamedTuple):
    """One level of a tree; leading axes [L K] but inside a head."""

    centroids: jax.Array  # f32[C H]
    counts: jax.Array  # i32[C]
    parents: jax.Array  # i32[C]
    values: jax.Array  # f32[C H], means
    known: Any = None  # what a score needs beside centroids


@dataclasses.dataclass(frozen=True)
class Score:
    """How clusters are scored, and what that takes."""

    logits: Callable  # (clusters of a head, q [M H]) -> f32[M C], log of what one of a cluster's keys weighs
    learn: Callable | None = None  # (keys [S H], values [S H], cluster i32[S], clusters) -> `known`
    vectors: float = 1  # of the cache's dtype, read of a cluster that is scored
    numbers: float = 0  # single ones, read beside


def _dots(clusters: Clusters, q):
    return reference.centroid_dots(q, clusters.centroids)


def _mean_of(x, cluster, clusters: Clusters):
    """Mean over each cluster's keys of x [S …]: [C …]."""
    total = jax.ops.segment_sum(x, cluster, len(clusters.counts))
    return total / jnp.maximum(clusters.counts, 1).astype(jnp.float32).reshape(-1, *[1] * (x.ndim - 1))


def _variances(keys, values, cluster, clusters):
    """Of each dimension: f32[C H]."""
    return _mean_of((keys - clusters.centroids[cluster]) ** 2, cluster, clusters)


def _variance(keys, values, cluster, clusters):
    """Of all dimensions alike: f32[C]."""
    return jnp.mean(_variances(keys, values, cluster, clusters), axis=1)


def _spread(clusters: Clusters, q):
    """Variance of s(q, k) among a cluster's keys, f32[M C], dimensions taken as independent: Σ q² σ² / H."""
    variances = clusters.known
    if variances.ndim == 1:
        return jnp.sum(q * q, axis=1)[:, None] * variances[None, :] / q.shape[1]
    return (q * q) @ variances.T / q.shape[1]


def _radius(keys, values, cluster, clusters):
    """Distance of a cluster's farthest key: f32[C]."""
    distance = jnp.linalg.norm(keys - clusters.centroids[cluster], axis=1)
    return jnp.maximum(jax.ops.segment_max(distance, cluster, len(clusters.counts)), 0.0)


def _reach(clusters: Clusters, q):
    return jnp.linalg.norm(q, axis=1)[:, None] * clusters.known[None, :] / jnp.sqrt(jnp.float32(q.shape[1]))


def _box(keys, values, cluster, clusters):
    """Smallest and largest value of each dimension among a cluster's keys: f32[C H] both."""
    size = len(clusters.counts)
    low, high = jax.ops.segment_min(keys, cluster, size), jax.ops.segment_max(keys, cluster, size)
    live = clusters.counts[:, None] > 0
    return jnp.where(live, low, 0.0), jnp.where(live, high, 0.0)


def _box_bound(clusters: Clusters, q):
    low, high = clusters.known
    return (jnp.maximum(q, 0) @ high.T + jnp.minimum(q, 0) @ low.T) / jnp.sqrt(jnp.float32(q.shape[1]))


def _value_norm(keys, values, cluster, clusters):
    return jnp.log(jnp.maximum(jnp.linalg.norm(clusters.values, axis=1), 1e-6))


def _value_gap(keys, values, cluster, clusters):
    return jnp.log(
        jnp.maximum(jnp.linalg.norm(clusters.values - jnp.mean(values, axis=0, keepdims=True), axis=1), 1e-6)
    )


def _and(more):
    """The logits of centroids and `more`."""
    return lambda clusters, q: _dots(clusters, q) + more(clusters, q)


SCORES = {
    # Squeezed Attention: a key weighs what its centroid does.
    "centroid": Score(_dots),
    # The mean of exp s(q, k) over Gaussian keys, exp(s(q, c) + ½ variance), by dimension and with one number.
    "variances": Score(_and(lambda clusters, q: _spread(clusters, q) / 2), _variances, vectors=2),
    "variance": Score(_and(lambda clusters, q: _spread(clusters, q) / 2), _variance, numbers=1),
    # What a key weighs that lies one standard deviation towards the query.
    "deviation": Score(_and(lambda clusters, q: jnp.sqrt(_spread(clusters, q))), _variance, numbers=1),
    # The most that a key inside the cluster's ball, or its box (Quest's for pages, arXiv 2406.10774), could weigh.
    "ball": Score(_and(_reach), _radius, numbers=1),
    "box": Score(_box_bound, _box, vectors=2),
    # Weights times the length of values (VATP, arXiv 2406.12335), here of a cluster's mean value, or of what that
    # differs by from the mean of all.
    "value_norm": Score(_and(lambda clusters, q: clusters.known[None, :]), _value_norm, numbers=1),
    "value_gap": Score(_and(lambda clusters, q: clusters.known[None, :]), _value_gap, numbers=1),
}


# ---- The rule


class Index(NamedTuple):
    """The levels of a tree, coarse → fine, and where its keys are."""

    levels: tuple[Clusters, ...]
    of_key: jax.Array  # i32[L K S], finest cluster


@functools.partial(jax.jit, static_argnames=("learn", "bits"))
def _know(levels, of_key, keys, values, learn, bits: int) -> Index:
    """The index of a tree's levels, with what a score needs to know, means in so many bits."""
    found, cluster = [], of_key
    for depth, level in reversed([*enumerate(levels)]):
        clusters = Clusters(level.centroids, level.counts, level.parents, level.value_centroids)
        if learn is not None:
            clusters = clusters._replace(known=jax.vmap(jax.vmap(learn))(keys, values, cluster, clusters))
        means = rounded(clusters.centroids, keys, bits), rounded(clusters.values, values, bits)
        found.insert(0, clusters._replace(centroids=means[0], values=means[1]))
        if depth:
            cluster = jnp.take_along_axis(level.parents, cluster, axis=2)
    return Index(tuple(found), of_key)


def _score(clusters: Clusters, q, valid, above, logits: Callable):
    """(log A f32[C], alive bool[C], log of what a key weighs f32[M C]) of a head's level; above bool[…], what was kept
    of the level above, at the coarsest one cluster."""
    alive = (clusters.counts > 0) & above[clusters.parents]
    weighs = logits(clusters, q)
    mean = reference.LogMean.start(alive.shape).add(reference.log_scores(weighs, clusters.counts, alive), valid)
    return mean.end(alive), alive, weighs


@functools.cache  # one function for each rule, so that methods which share it share their compiled program
def _choosing(score: Score, tail: bool, sinks: int, bits: int):
    def choose(index: Index, q, valid, log_T) -> Choice:
        kept, read, rest = jnp.ones(1, bool), jnp.float32(0), []
        H = q.shape[1]
        of_centroid = score.vectors * vector_read(bits, H) + score.numbers / H
        for depth, clusters in enumerate(index.levels):
            log_A, alive, weighs = _score(clusters, q, valid, kept, score.logits)
            kept = log_A > log_T[depth]
            read += jnp.sum(alive.astype(jnp.float32)) * of_centroid
            if tail:
                given_up = alive & ~kept
                rest.append(_attend_means(clusters, weighs, given_up))
                read += jnp.sum(given_up.astype(jnp.float32)) * vector_read(bits, H)
        mask = kept[index.of_key]
        return Choice(mask | (jnp.arange(len(mask)) < sinks), read, merge(*rest) if tail else None)

    return choose


def _attend_means(clusters: Clusters, weighs, given_up):
    """Rows attend to clusters given up bool[C] by their mean values: (out f32[M H], lse f32[M])."""
    mass = weighs + jnp.log(jnp.maximum(clusters.counts, 1).astype(jnp.float32))[None, :]
    mass = jnp.where(given_up[None, :], mass, reference.MASKED)
    lse = jax.nn.logsumexp(mass, axis=1)
    return jnp.exp(mass - lse[:, None]) @ clusters.values, lse


class Calibration(NamedTuple):
    """How thresholds are found."""

    scope: str = "model"  # one a "model", a "layer" or a "head"
    samples: str = "mean"  # scores averaged over the window's queries, or of each "query" by itself
    margin: float = CONFIG.coarse_margin


USUAL = Calibration()


@functools.partial(jax.jit, static_argnames=("logits", "how"))
def _thresholds(levels, queries, dropped, logits: Callable, how: Calibration):
    """log T f32[L K levels] for the fractions dropped f32[levels] of all keys; queries [L N W H]."""
    L, K = levels[0].counts.shape[:2]
    N, W, H = queries.shape[1:]
    q = queries.reshape(L, K, N // K, W, H)
    q = q.swapaxes(2, 3) if how.samples == "query" else q.reshape(L, K, 1, -1, H)  # [L K samples M H]
    everyone = jnp.ones(q.shape[3], bool)
    score = lambda clusters, q, above: _score(clusters, q, everyone, above, logits)[0]
    score = jax.vmap(jax.vmap(jax.vmap(score, in_axes=(None, 0, 0))))
    found, kept = [], jnp.ones((*q.shape[:3], 1), bool)
    for depth, clusters in enumerate(levels):
        log_A = score(clusters, q, kept)  # [L K samples C]
        groups = {"model": 1, "layer": L, "head": L * K}[how.scope]
        counts = jnp.broadcast_to(clusters.counts[:, :, None], log_A.shape)
        log_T = jax.vmap(_quantile, in_axes=(0, 0, None))(
            log_A.reshape(groups, -1), counts.reshape(groups, -1), dropped[depth]
        )
        log_T = jnp.repeat(log_T, L * K // groups).reshape(L, K)
        kept = log_A > log_T[:, :, None, None]
        found.append(log_T)
    return jnp.stack(found, axis=2)


def _quantile(values, counts, fraction):
    """The value at `fraction` of all, every one counted `counts` times; −∞ for a fraction of 0."""
    order = jnp.argsort(values)
    ends = jnp.cumsum(counts[order])
    rank = jnp.floor(fraction * (ends[-1] - 1).astype(jnp.float32)).astype(jnp.int32)
    at = jnp.searchsorted(ends, rank, side="right")
    return jnp.where(fraction <= 0, -jnp.inf, values[order][at])


def rule(
    name: str,
    *,
    score: str = "centroid",
    bits: int = 16,
    levels: int = 1,
    tail: bool = False,
    sinks: bool = False,
    calibration: Calibration = USUAL,
    config: SqueezeConfig = CONFIG,
    **tokens,
) -> Method:
    """Squeezed Attention with other choices than the library's; `levels` counts from the finest.

    bits: of a number of centroids and mean values, where keys and values have 16.
    tail: clusters given up are estimated (squeezejax/estimate.py). sinks: the first tokens are always kept, as
    StreamingLLM has it (arXiv 2309.17453). `tokens`: question_block and steps of a `Method`.
    """
    how = SCORES[score]

    def build(fixed: Fixed) -> Index:
        top, *others = fixed.built.levels[-levels:]
        top = dataclasses.replace(top, parents=jnp.zeros_like(top.parents))
        cache = fixed.cache
        return _know((top, *others), cluster_of_key(fixed.built), cache.keys, cache.values, how.learn, bits)

    def knob(fixed: Fixed, index: Index, sparsity: float):
        shape = dataclasses.replace(
            config, cluster_fractions=config.cluster_fractions[-levels:], coarse_margin=calibration.margin
        )
        grid = np.array([sparsity])
        dropped = np.array([dropped_fractions(grid, depth, shape)[0] for depth in range(levels)], np.float32)
        return _thresholds(index.levels, fixed.queries, dropped, how.logits, calibration)

    choose = _choosing(how, tail, SINKS if sinks else 0, bits)
    return Method(name, build, choose, knob, "sparsity", config, **tokens)
