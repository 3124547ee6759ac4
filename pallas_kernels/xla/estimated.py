"""Choosing clusters by their mass, and what the clusters that are not kept tell, level by level: masks, plain XLA.

The estimates are those of squeezejax/online/estimate.py. Where a coarser level gives a cluster up, its own centroid
stands for everything below it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels.xla.levelwise import aligned, centroid_dots, score_clusters
from squeezejax.pallas_kernels.xla.lists import Found, kept_runs
from squeezejax.pallas_kernels.xla.softmax import MASKED, map_over


def select(tree, q, valid, layer, reading) -> Found:
    """One selection a user for rows q [B K M H], of which valid bool[B M] take part, of whole clusters."""

    def one_head(head, q, valid, log_T):
        levels = jax.tree.map(lambda leaf: leaf[layer, head], tree.levels)
        (*_, kept), rest = descend(
            levels, q, valid, dataclasses.replace(reading, log_T=log_T), tree.config.coarse_margin
        )
        return kept_runs(kept, levels[-1].starts, levels[-1].counts), kept, rest

    def one_user(user):
        q, *of_user = user
        return map_over(lambda lane: one_head(*lane, *of_user), (jnp.arange(len(q)), q))

    log_T = None if reading.log_T is None else reading.log_T_of_users(len(q))
    runs, kept, rest = map_over(one_user, (q, valid, log_T))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), runs)
    return Found(flat, runs.num_rows, kept, rest)


def descend(levels: tuple, q, valid, reading, margin: float):
    """One head from coarse to fine -> ([kept bool[C], …], [(out or None, lse) of what is given up, …]), one a level.

    levels without the axes L and K; q [M H]; valid bool[M]; reading of one user; margin is the config's coarse_margin.
    """
    kepts, rest = [], []
    given_up = jnp.full(len(q), MASKED, jnp.float32)  # log of the mass that coarser levels have given up
    for depth, level in enumerate(levels):
        alive = level.counts > 0
        if depth:
            alive &= kepts[-1][level.parents]
        rows, numbers = aligned(q, level)
        scores = centroid_dots(rows, numbers)
        if level.spreads is not None:
            square = jnp.sum(rows.astype(jnp.float32) ** 2, axis=1) / (2 * q.shape[1])
            scores += square[:, None] * level.spreads.astype(jnp.float32)[None, :]
        log_mass = jnp.where(alive[None, :], scores + _log(level.counts)[None, :], MASKED)
        if reading.min_mass is None:
            kept = score_clusters(rows, numbers, level.counts, alive, valid) > reading.log_T[depth]
        else:
            # Coarser levels may lose `margin` times less than the finest, levels between a geometric series.
            above = len(levels) - 1
            lost = (1 - reading.min_mass) / margin ** ((above - depth) / max(above, 1))
            kept = alive & _fewest(log_mass, given_up, valid, 1 - lost)
        rest.append(_attend_centroids(log_mass, alive & ~kept, level.value_centroids if reading.tail else None))
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
