"""What centroids tell of the keys that are not read: choosing clusters by mass, the tail estimate, the mass missed.

To a query, a cluster of n keys with centroid c weighs about n·exp s(q, c) in the softmax, its *estimated mass*. Where
a coarser level gives a cluster up, its own centroid stands for everything below it. Three options build on that:

- `min_mass`: instead of those above a threshold, keep the fewest clusters that hold min_mass of all clusters' estimated
  mass, for every selection anew (what is attended anyway plays no part: against its exact mass, that of a cluster
  with one outstanding key is estimated far too low, and a head that has to find that key would keep nothing);
- `tail`: clusters that are not kept still contribute their estimated mass times the mean of their values, as in
  RetroInfer (arXiv 2505.02922) and Multipole Attention (arXiv 2506.13059);
- the *missed mass*: the estimated mass of clusters that are not kept, as a fraction of that and all that is attended.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.arguments import check_number
from squeezejax.online.scores import map_over
from squeezejax.online.select import resolve_thresholds
from squeezejax.pallas_kernels.xla import attend as reference
from squeezejax.pallas_kernels.xla.attend import MASKED
from squeezejax.tree import Level, Tree


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Estimate:
    """Which of the options are on; without any there is no Estimate, and nothing is estimated."""

    min_mass: jax.Array | None = None  # f32[]; None = thresholds choose
    tail: bool = dataclasses.field(default=False, metadata={"static": True})


def resolve(
    tree: Tree, *, tail=False, min_mass=None, missed_mass=False, sparsity=None, log_thresholds=None, implementation=None
):
    """(log T f32[levels] or None, Estimate or None) from the options of `attend` and `generate`.

    Raises ValueError for options that exclude each other or need what the tree lacks, NotImplementedError for an
    implementation that cannot estimate.
    """
    if not (tail or missed_mass or min_mass is not None):
        return resolve_thresholds(tree, sparsity, log_thresholds, implementation), None
    if implementation == "mosaic":
        raise NotImplementedError("tail, min_mass and missed_mass run as plain XLA: use implementation=None or 'xla'")
    if tail and any(level.value_centroids is None for level in tree.levels):
        raise ValueError("tail=True needs a tree with value centroids: tree = squeezejax.add_value_centroids(tree)")
    if min_mass is None:
        return resolve_thresholds(tree, sparsity, log_thresholds, implementation), Estimate(tail=tail)
    if sparsity is not None or log_thresholds is not None:
        raise ValueError("give min_mass, sparsity or log_thresholds, not two of them")
    min_mass = check_number("min_mass", min_mass, 0, 1, wanted="in [0, 1]")
    return None, Estimate(min_mass, tail)


class Chosen(NamedTuple):
    """What every user and key/value head keeps of one layer, and what is left to the centroids of each level."""

    runs: reference.Runs  # rows of the kept clusters, leading axes [B K]
    rest: list  # a level: (out f32[B K M H], lse f32[B K M]) of the clusters given up there; out None without tail


def choose(tree: Tree, q, valid, layer, log_T, estimate: Estimate) -> Chosen:
    """One selection a user for rows q [B K M H], of which valid bool[B M] take part."""

    def one_head(head, q, valid):
        levels = jax.tree.map(lambda leaf: leaf[layer, head], tree.levels)
        (*_, kept), rest = descend(levels, q, valid, log_T, estimate, tree.config.coarse_margin)
        return reference.kept_runs(kept, levels[-1].starts, levels[-1].counts), rest

    def one_user(user):
        q, valid = user
        return map_over(lambda lane: one_head(*lane, valid), (jnp.arange(len(q)), q))

    with jax.named_scope("select"):
        return Chosen(*map_over(one_user, (q, valid)))


def descend(levels: tuple[Level, ...], q, valid, log_T, estimate: Estimate, margin: float):
    """One head from coarse to fine -> ([kept bool[C], …], [`Chosen.rest`, …]), one entry a level.

    levels without the axes L and K; q [M H]; valid bool[M]; log_T f32[levels] where thresholds choose; margin is the
    config's coarse_margin.
    """
    kepts, rest = [], []
    given_up = jnp.full(len(q), MASKED, jnp.float32)  # log of the mass that coarser levels have given up
    for depth, level in enumerate(levels):
        alive = level.counts > 0
        if depth:
            alive &= kepts[-1][level.parents]
        log_mass = reference.centroid_dots(q, level.centroids) + _log(level.counts)[None, :]
        log_mass = jnp.where(alive[None, :], log_mass, MASKED)
        if estimate.min_mass is None:
            kept = reference.score_clusters(q, level.centroids, level.counts, alive, valid) > log_T[depth]
        else:
            # Coarser levels may lose `margin` times less than the finest, levels between a geometric series.
            above = len(levels) - 1
            lost = (1 - estimate.min_mass) / margin ** ((above - depth) / max(above, 1))
            kept = alive & _fewest(log_mass, given_up, valid, 1 - lost)
        rest.append(_attend_centroids(log_mass, alive & ~kept, level.value_centroids if estimate.tail else None))
        given_up = jnp.logaddexp(given_up, rest[-1][1])
        kepts.append(kept)
    return kepts, rest


def _log(counts):
    return jnp.log(jnp.maximum(counts, 1).astype(jnp.float32))


def _fewest(log_mass, given_up, valid, wanted):
    """The fewest clusters, bool[C], that hold `wanted` of all mass, on average over valid bool[M].

    log_mass f32[M C] of the clusters in question, given_up f32[M] of all others.
    """
    total = jnp.logaddexp(given_up, jax.nn.logsumexp(log_mass, axis=1))
    shares = jnp.where(valid[:, None], jnp.exp(log_mass - total[:, None]), 0.0)
    mass = jnp.sum(shares, axis=0) / jnp.maximum(jnp.sum(valid.astype(jnp.float32)), 1.0)
    order = jnp.argsort(-mass, stable=True)
    before = jnp.cumsum(mass[order]) - mass[order]
    found = jnp.zeros(mass.shape, bool).at[order].set(before < wanted)
    # Else sums might round to 1 before the last cluster; NaN, which a trace lets through, keeps everything too.
    return jnp.where(wanted < 1, found, jnp.any(valid))


def _attend_centroids(log_mass, left, values):
    """Rows attend to the clusters left bool[C] as if all their keys were centroids: (out f32[M H] or None, lse f32[M]).

    log_mass f32[M C]; values f32[C H], the clusters' mean values, or None.
    """
    log_mass = jnp.where(left[None, :], log_mass, MASKED)
    top = jnp.max(log_mass, axis=1)
    weights = jnp.where(left[None, :], jnp.exp(log_mass - top[:, None]), 0.0)
    total = jnp.sum(weights, axis=1)
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1.0)), MASKED)  # the largest alone adds 1
    if values is None:
        return None, lse
    out = jnp.einsum("MC,CH->MH", weights, values, precision=jax.lax.Precision.HIGHEST)
    return out / jnp.maximum(total, 1.0)[:, None], lse


@jax.jit
def add_value_centroids(tree: Tree) -> Tree:
    """The tree with the mean value of every cluster at every level, which `tail=True` needs.

    They take as much memory as the centroids. `save` and `load` keep them.
    """
    L, K, R, _ = tree.values.shape
    flat = lambda x: x.reshape(L * K, *x.shape[2:])

    def one_head(head):  # index in L·K -> [means f32[C H], …], coarse → fine
        values = flat(tree.values)[head].astype(jnp.float32)
        fine = jax.tree.map(lambda leaf: flat(leaf)[head], tree.levels[-1])
        cluster = cluster_of_rows(fine.starts, fine.counts, R)
        sums = [jax.ops.segment_sum(values, cluster, fine.counts.shape[0])]  # drops padding
        for coarse, level in reversed([*itertools.pairwise(tree.levels)]):
            sums.insert(0, jax.ops.segment_sum(sums[0], flat(level.parents)[head], coarse.counts.shape[2]))
        sizes = [jnp.maximum(flat(level.counts)[head], 1).astype(jnp.float32) for level in tree.levels]
        return tuple(total / size[:, None] for total, size in zip(sums, sizes, strict=True))

    means = map_over(one_head, jnp.arange(L * K))
    levels = tuple(
        dataclasses.replace(level, value_centroids=mean.reshape(L, K, *mean.shape[1:]))
        for level, mean in zip(tree.levels, means, strict=True)
    )
    return dataclasses.replace(tree, levels=levels)


def cluster_of_rows(starts, counts, num_rows: int):
    """The cluster of every row of one head, i32[R], −1 for padding; starts, counts i32[C] of disjoint runs."""
    # A row lies in the run that began last, if in any: runs may lie in any order, with padding between them.
    row = jnp.arange(num_rows)
    first = jnp.where(counts > 0, starts, num_rows)
    begins = jnp.full(num_rows, -1).at[first].set(jnp.arange(counts.shape[0]), mode="drop")
    last = jax.lax.cummax(jnp.where(begins >= 0, row, 0))
    cluster = begins[last]
    return jnp.where((cluster >= 0) & (row < last + counts[cluster]), cluster, -1)
