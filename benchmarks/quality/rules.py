"""What the library lacks: other scores of a cluster, and thresholds of a layer or a head of their own.

`rule` makes a `Method` of one level of clusters; with nothing changed it chooses what the library chooses
(tests/test_quality_rules.py), whose functions normalise and average the scores. Whatever the score, a cluster's number
is what one of its keys is taken to weigh in the softmax, normalised over all keys and averaged over the rows that share
a selection; thresholds are quantiles of these numbers over keys. What the library has (bits, sinks, levels, margins,
its variance term) is varied by its own configuration: variants.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.quality.methods import CONFIG, Choice, Fixed, Method, cluster_of_key
from squeezejax import SqueezeConfig
from squeezejax.pallas_kernels.xla import levelwise

# ---- Scores of clusters


class Clusters(NamedTuple):
    """The finest level of a tree; leading axes [L K] but inside a head."""

    centroids: jax.Array  # f32[C H]
    counts: jax.Array  # i32[C]
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
    return levelwise.centroid_dots(q, clusters.centroids)


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
    # The mean of exp s(q, k) over Gaussian keys, exp(s(q, c) + ½ variance), by dimension: the library has one number.
    "variances": Score(_and(lambda clusters, q: _spread(clusters, q) / 2), _variances, vectors=2),
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
    """Clusters, and which of them every key is in."""

    clusters: Clusters
    of_key: jax.Array  # i32[L K S]


@functools.partial(jax.jit, static_argnames="learn")
def _know(level, of_key, keys, values, learn) -> Index:
    """The index of a tree's finest level, with what a score needs to know."""
    clusters = Clusters(level.centroids, level.counts, level.value_centroids)
    if learn is not None:
        clusters = clusters._replace(known=jax.vmap(jax.vmap(learn))(keys, values, of_key, clusters))
    return Index(clusters, of_key)


def _score(clusters: Clusters, q, valid, logits: Callable):
    """log A f32[C] of a head's clusters."""
    alive = clusters.counts > 0
    scores = levelwise.log_scores(logits(clusters, q), clusters.counts, alive)
    return levelwise.LogMean.start(alive.shape).add(scores, valid).end(alive)


@functools.cache  # one function for each score, so that methods which share it share their compiled program
def _choosing(score: Score):
    def choose(index: Index, q, valid, log_T) -> Choice:
        kept = _score(index.clusters, q, valid, score.logits) > log_T
        of_cluster = score.vectors + score.numbers / q.shape[1]
        read = jnp.sum((index.clusters.counts > 0).astype(jnp.float32)) * of_cluster
        return Choice(kept[index.of_key], read)

    return choose


@functools.partial(jax.jit, static_argnames=("logits", "scope"))
def _thresholds(clusters: Clusters, queries, dropped, logits: Callable, scope: str):
    """log T f32[L K] for the fraction dropped f32[] of all keys of a scope; queries [L N W H]."""
    L, K = clusters.counts.shape[:2]
    q = queries.reshape(L, K, -1, queries.shape[3])
    everyone = jnp.ones(q.shape[2], bool)
    log_A = jax.vmap(jax.vmap(lambda clusters, q: _score(clusters, q, everyone, logits)))(clusters, q)  # [L K C]
    groups = {"model": 1, "layer": L, "head": L * K}[scope]
    of_group = jax.vmap(_quantile, in_axes=(0, 0, None))
    log_T = of_group(log_A.reshape(groups, -1), clusters.counts.reshape(groups, -1), dropped)
    return jnp.repeat(log_T, L * K // groups).reshape(L, K)


def _quantile(values, counts, fraction):
    """The value at `fraction` of all, every one counted `counts` times; −∞ for a fraction of 0."""
    order = jnp.argsort(values)
    ends = jnp.cumsum(counts[order])
    rank = jnp.floor(fraction * (ends[-1] - 1).astype(jnp.float32)).astype(jnp.int32)
    at = jnp.searchsorted(ends, rank, side="right")
    return jnp.where(fraction <= 0, -jnp.inf, values[order][at])


def rule(name: str, *, score: str = "centroid", scope: str = "model", config: SqueezeConfig = CONFIG) -> Method:
    """One level of clusters, scored as SCORES has it, with a threshold a "model", a "layer" or a "head"."""
    how = SCORES[score]

    def build(fixed: Fixed) -> Index:
        cache, finest = fixed.cache, fixed.built.levels[-1]
        return _know(finest, cluster_of_key(fixed.built), cache.keys, cache.values, how.learn)

    def knob(fixed: Fixed, index: Index, sparsity: float):
        return _thresholds(index.clusters, fixed.queries, jnp.float32(sparsity), how.logits, scope)

    return Method(name, build, _choosing(how), knob, "sparsity", config)
