"""K-means of one head's keys, by direction or by weighted distance, of all rows at once or segment by segment.

Letters: S rows (keys), C clusters, H head dimension. Everything is written for one head; callers `vmap` it over heads
and layers. lloyd.py has the iterations.
"""

import dataclasses
import itertools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.offline import lloyd
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.xla.segment_sums import segment_sum

METRICS = ("cosine", "euclidean")


@dataclasses.dataclass(frozen=True)
class Clustering:
    """How rows are clustered; hashable. Raises ValueError for values that make no sense."""

    metric: str = "cosine"  # or "euclidean": by distance to the mean of the cluster's rows, which may lie anywhere
    # What the Euclidean metric multiplies a difference by, a number for each of the H dimensions; None = 1
    dimension_weights: tuple[float, ...] | None = None
    # Rows are cut into runs of about so many, each gets its share of the clusters and is clustered by itself: time
    # grows with S · segment · C / S, not with S · C. None = all rows in one.
    segment: int | None = None
    max_iterations: int = 7  # as for `kmeans`, these three
    swap_rounds: int = 5
    tolerance: float = 0.0

    def __post_init__(self):
        if self.dimension_weights is not None:
            object.__setattr__(self, "dimension_weights", tuple(float(w) for w in self.dimension_weights))
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, not {self.metric!r}.")
        if self.metric == "cosine" and self.dimension_weights is not None:
            raise ValueError("dimension_weights are for the Euclidean metric; for the cosine, weight the rows.")
        if self.dimension_weights is not None and not all(0 <= w < math.inf for w in self.dimension_weights):
            raise ValueError(f"dimension_weights must be finite and at least 0, got {self.dimension_weights}.")
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"a segment has at least one row, not {self.segment}.")
        if self.max_iterations < 0 or self.swap_rounds < 0:
            counts = f"{self.max_iterations} and {self.swap_rounds}"
            raise ValueError(f"max_iterations and swap_rounds are at least 0, not {counts}.")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["centroids", "labels", "counts", "inertia", "iterations"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KMeans:
    """The clusters of S rows."""

    centroids: jax.Array  # f32[C H], weighted means of the raw rows
    labels: jax.Array  # i32[S], cluster of each row
    counts: jax.Array  # i32[C], rows in each cluster, rows of weight 0 included; never 0
    # f32[], weighted mean over rows of 1 − cosine to the mean of the cluster's normalised rows; or, of the Euclidean
    # metric, of the squared distance to the cluster's mean, dimensions weighted
    inertia: jax.Array
    iterations: jax.Array  # i32[], Lloyd steps that ran, those of the swap rounds included; the most of any segment


class Division(NamedTuple):
    """How many rows and clusters of those that arrays have room for are real, the first ones, and their segments.

    Numbers of the host or a device: programs do not depend on them (buckets.py).
    """

    num_rows: jax.Array  # i32[]
    num_clusters: jax.Array  # i32[]
    rows: jax.Array  # i32[segments + 1], first row of every segment, and the end of the last
    clusters: jax.Array  # i32[segments + 1], their first clusters likewise


def divide(num_rows: int, num_clusters: int, segments: int) -> Division:
    """Rows and clusters cut into segments of equal size, on the host."""
    ends = np.arange(segments + 1) * num_rows // segments
    # Shares by the rows passed, so that no segment gets more clusters than it has rows, and none none.
    numbers = num_rows, num_clusters, ends, ends * num_clusters // num_rows
    return Division(*(np.asarray(x, np.int32) for x in numbers))


def kmeans(
    x,
    num_clusters,
    *,
    key,
    weights=None,
    max_iterations=7,
    swap_rounds=5,
    tolerance=0.0,
    implementation: str | None = None,
) -> KMeans:
    """Cluster rows by direction and average the raw rows (arXiv 2411.09688, offline clustering of the keys).

    Args:
      x: f32 or bf16[S H], the rows of one head; `jax.vmap` for more.
      num_clusters: C, static, 1 ≤ C ≤ S.
      key: a JAX random key; equal keys and rows give equal results, bit for bit.
      weights: f32[S] or None: how often each row counts. A row of weight ≤ 0 influences nothing and gets a valid
        label all the same. With fewer than C rows of positive weight, surplus clusters hold rows of weight 0 and a
        zero centroid.
      max_iterations: Lloyd steps at most, static, ≥ 0; 0 assigns the rows to the k-means++ seeds.
      swap_rounds: how many of these steps, the first ones, are followed by swaps: centres that are cheap to remove
        move to where they gain at least twice that. They lower the inertia below that of Lloyd steps to convergence.
      tolerance: stop when a Lloyd step (after the swap rounds) lowers the inertia by no more than this fraction.
      implementation: "mosaic" assigns rows by the Hopper kernel, "xla" and None by plain XLA; see registry.py.

    Every cluster has a row, also where rows repeat. Rows of norm below 1e-12 have no direction: they go to any cluster
    and count in its mean. Non-finite rows are not looked for: they make centroids and inertia NaN, in clusters that
    are otherwise arbitrary but valid.

    Raises:
      ValueError: wrong rank or dtype, C outside 1 … S, a negative number of steps.
      NotImplementedError: a named implementation that cannot run here, or cannot take rows of this head size.
    """
    options = Clustering(max_iterations=max_iterations, swap_rounds=swap_rounds, tolerance=tolerance)
    return cluster(x, num_clusters, key=key, weights=weights, options=options, implementation=implementation)


def cluster(
    x,
    num_clusters,
    *,
    key,
    weights=None,
    options: Clustering | None = None,
    implementation: str | None = None,
    division: Division | None = None,
) -> KMeans:
    """`kmeans` in either metric, of all rows at once or segment by segment, as `options` say (None: as `kmeans` does).

    x, num_clusters, key and weights are as for `kmeans`. The Hopper kernel knows the cosine only: `implementation`
    means nothing to the Euclidean metric, which is plain XLA. `division` says which rows and clusters are real where
    there is room for more (None: all are): other rows get the label `num_clusters`, other clusters no row.

    Raises ValueError and NotImplementedError as `kmeans`, and ValueError unless there is one weight a dimension.
    """
    options = options or Clustering()
    _check(x, num_clusters, weights, options)
    S, H = x.shape
    weights = jnp.ones(S, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    # A swap without a step after it would stay unassigned.
    rounds = min(options.swap_rounds, max(options.max_iterations - 1, 0))
    kernel = dims = None
    if options.metric == "cosine":
        backend = registry.choose(registry.resolve(implementation), "nearest", H)
        kernel = None if backend.name == "xla" else backend.nearest
    else:
        dims = jnp.asarray(options.dimension_weights or (1.0,) * H, jnp.float32)
    steps = options.max_iterations - rounds
    if division is None:
        present, division = None, divide(S, num_clusters, num_segments(S, num_clusters, options.segment))
    else:
        present = division.num_clusters
    return _cluster(x, weights, key, options.tolerance, dims, num_clusters, rounds, steps, kernel, division, present)


def cluster_levels(
    x,
    clusters: tuple[int, ...],
    *,
    key,
    options: Clustering | None = None,
    implementation: str | None = None,
    divisions: tuple[Division, ...] | None = None,
) -> tuple[jax.Array, ...]:
    """Labels of a hierarchy over rows x [S H], coarse → fine: of each cluster its parent, and i32[S] of each row.

    clusters = C of each level, coarse → fine. The finest are clusters of rows, all others of the centroids below, which
    count as often as they have rows. `divisions`, of each level, as for `cluster`.
    """
    rows, weights, labels = x, None, []
    levels = zip(clusters, jax.random.split(key, len(clusters)), divisions or [None] * len(clusters), strict=True)
    for C, level_key, division in reversed(list(levels)):
        options_here = {"options": options, "implementation": implementation, "division": division}
        found = cluster(rows, C, key=level_key, weights=weights, **options_here)
        rows, labels = found.centroids, [found.labels, *labels]
        weights = found.counts.astype(jnp.float32) if weights is None else jax.ops.segment_sum(weights, found.labels, C)
    return tuple(labels)


def divide_levels(num_rows: int, clusters: tuple[int, ...], rooms, options: Clustering) -> tuple[Division, ...]:
    """`Division` of each level, coarse → fine, for num_rows rows and clusters = C of each level.

    rooms = (rows, C of each level) that there is room for; the number of segments depends on these alone.
    """
    counts, room = (*clusters, num_rows), (*rooms[1], rooms[0])
    segments = [num_segments(below, C, options.segment) for C, below in itertools.pairwise(room)]
    return tuple(map(divide, counts[1:], counts[:-1], segments))


def usual_segment(num_rows: int) -> int:
    """Rows of a segment for which clusters of a text's keys lose some 2 to 5 % of their inertia, at a time of S·√S."""
    return max(2048, round(2048 * math.sqrt(num_rows / 8192)))


def num_segments(num_rows: int, num_clusters: int, segment: int | None) -> int:
    """Into how many segments rows are cut for segments of about `segment` rows; each gets two clusters or more."""
    return 1 if segment is None else max(1, min(-(-num_rows // segment), num_clusters // 2))


def _check(x, num_clusters, weights, options: Clustering):
    shape, dtype = getattr(x, "shape", ()), getattr(x, "dtype", type(x))
    if len(shape) != 2 or dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"kmeans takes float32 or bfloat16 rows [S H], not {dtype} {list(shape)}; use jax.vmap for several heads."
        )
    if not 1 <= num_clusters <= x.shape[0]:
        raise ValueError(f"kmeans needs 1 to {x.shape[0]} clusters for {x.shape[0]} rows, not {num_clusters}.")
    if weights is not None and jnp.shape(weights) != x.shape[:1]:
        raise ValueError(f"kmeans takes one weight a row, [{x.shape[0]}], not {jnp.shape(weights)}.")
    dims = options.dimension_weights
    if dims is not None and len(dims) != shape[1]:
        raise ValueError(f"dimension_weights has {len(dims)} entries, and rows have {shape[1]} dimensions.")


@partial(jax.jit, static_argnames=("num_clusters", "rounds", "steps", "kernel"))
def _cluster(
    x, weights, key, tolerance, dims, num_clusters, rounds, steps, kernel, division: Division, present
) -> KMeans:
    """`cluster`; `present` i32[], of num_clusters clusters the real ones, None = all."""
    real = jnp.arange(x.shape[0], dtype=jnp.int32) < division.num_rows
    live = (weights > 0) & real
    weights = jnp.where(live, weights, 0.0)
    raw = jnp.where(live[:, None], x.astype(jnp.float32), 0.0)

    def rows_of(raw, weights, num):
        if dims is None:
            return lloyd.cosine_rows(raw, weights, num, kernel)
        return lloyd.euclidean_rows(raw, weights, num, dims)

    def partition(raw, weights, num, key, present=None):
        return lloyd.partition(rows_of(raw, weights, num), num, key, rounds, steps, tolerance, present)

    if len(division.rows) == 2:
        labels, ran = partition(raw, weights, num_clusters, key, present)
    else:
        labels, ran = _by_segments(partition, raw, weights, num_clusters, key, division)
    with jax.named_scope("finish"):
        rows = rows_of(raw, weights, num_clusters)
        labels = _fill_empty(rows, live, real, labels, num_clusters, division.num_clusters)
        inertia = jnp.sum(weights * lloyd.half_distances(rows, labels, num_clusters))
        inertia = inertia / jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny)
        if rows.scale is not None:
            inertia = inertia * (2 * rows.scale**2)
        counts = jax.ops.segment_sum(real.astype(jnp.int32), labels, num_clusters)
        centroids = _raw_means(raw, live, weights, labels, num_clusters)
        labels = jnp.where(real, labels, num_clusters)
        return KMeans(centroids, labels, counts, jnp.maximum(inertia, 0.0), ran)


def _by_segments(partition, raw, weights, num_clusters: int, key, division: Division):
    """partition(raw, weights, num_clusters, key, present) of each segment -> (labels i32[S] of all, most steps)."""
    S, segments = weights.shape[0], len(division.rows) - 1
    # Room for any segment: rows are cut evenly, and clusters by rows, each rounded by less than one.
    size = -(-S // segments)
    most = min(size, size * num_clusters // S + 2)
    starts, ends = jnp.asarray(division.rows[:-1]), jnp.asarray(division.rows[1:])
    first, present = jnp.asarray(division.clusters[:-1]), jnp.diff(division.clusters)

    def one(operands):
        start, end, present, seed = operands
        place = start + jnp.arange(size, dtype=jnp.int32)
        inside = place < end
        place = jnp.minimum(place, S - 1)
        weights_here = jnp.where(inside, weights[place], 0.0)
        return partition(raw[place], weights_here, most, jax.random.fold_in(key, seed), present)

    labels, ran = jax.lax.map(one, (starts, ends, present, jnp.arange(segments, dtype=jnp.int32)))
    labels = labels + first[:, None]
    row = jnp.arange(S, dtype=jnp.int32)
    segment_of = jnp.searchsorted(ends, row, side="right").astype(jnp.int32)
    segment_of = jnp.minimum(segment_of, segments - 1)  # of rows that are not real, any
    place = jnp.minimum(row - starts[segment_of], size - 1)
    return jnp.minimum(labels[segment_of, place], num_clusters - 1), jnp.max(ran)


def _fill_empty(rows: lloyd.Rows, live, real, labels, num_clusters, present):
    """Labels i32[S] with a row in every cluster: the worst-fitting rows that are not alone move to the empty ones.

    Of the clusters the first `present` i32[] are to have rows; rows bool[S] that are not real stay where they are.
    """
    S, C = labels.shape[0], num_clusters
    number = jnp.arange(S, dtype=jnp.int32)
    # The first live row of each cluster stays, so that no other cluster is emptied.
    first = jax.ops.segment_min(jnp.where(live, number, S), labels, C)
    misfit = jnp.where(live, lloyd.half_distances(rows, labels, C), -1.0)  # dead rows move when no live one is left
    misfit = jnp.where(first[labels] == number, -2.0, jnp.where(real, misfit, -3.0))
    _, movers = jax.lax.top_k(misfit, C)
    empty = (first >= S) & (jnp.arange(C, dtype=jnp.int32) < present)  # segment_min of nothing is the largest integer
    mover = movers[jnp.cumsum(empty, dtype=jnp.int32) - 1]
    return labels.at[jnp.where(empty, mover, S)].set(jnp.arange(C, dtype=jnp.int32), mode="drop")


def _raw_means(raw, live, weights, labels, num_clusters):
    """Weighted means of raw [S H] f32[C H]: the first live row plus the mean difference from it.

    Equal rows then give exactly that row, and calibration's ties stay ties.
    """
    S, C = labels.shape[0], num_clusters
    first = jax.ops.segment_min(jnp.where(live, jnp.arange(S, dtype=jnp.int32), S - 1), labels, C)
    base = raw[jnp.minimum(first, S - 1)]
    sums = segment_sum((raw - base[labels]) * weights[:, None], labels, C)
    total = segment_sum(weights, labels, C)
    return base + sums / jnp.where(total > 0, total, 1.0)[:, None]
