"""Cluster sizes that suit kernels: whole granules of rows, and none too large, by moving borders between neighbours.

Kernels fetch whole granules of rows, so a kept cluster that begins or ends inside one makes them read rows for nothing.
In memory the clusters of a parent lie side by side; put into an order in which neighbours are alike, and rows at a
border being those that fit the other side best, a border can move by a few rows at little cost (benchmarks/notes).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.config import SqueezeConfig
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.xla.segment_sums import segment_sum

POWER_STEPS = 8  # towards a family's principal direction; only an order comes of it, so few will do


class Shape(NamedTuple):
    """What the finest clusters of a head should be like."""

    granule: int  # they end at multiples of so many rows
    most: int | None  # rows of the largest one, a multiple of granule and at least S/C; None = any number
    first_row: int = 0  # of the head, counted where granules are


def shape_of(config: SqueezeConfig, S: int, dtype, first_row: int = 0) -> Shape | None:
    """The shape that a configuration asks for with S keys of a dtype; None = as K-means finds them."""
    C = config.num_clusters(S)[-1]
    granule = config.cluster_granule
    if granule is None:
        # Small clusters would lose too many of their rows to their neighbours; single keys need no granules.
        granule = registry.layout(dtype).granule
        granule = granule if 2 * granule * C <= S and not config.key_bits else 1
    if config.cluster_cap is None:
        return None if granule == 1 else Shape(granule, None, first_row % granule)
    most = granule * math.ceil(config.cluster_cap * S / C / granule)
    return Shape(granule, most, first_row % granule)


def shape_clusters(rows, cluster_of, parents, shape: Shape):
    """Moves borders of one head's finest clusters -> cluster_of i32[S], a parent's clusters in a new order.

    rows [S H]; cluster_of i32[S]; parents i32[C], ascending, of each cluster: these stay as they are. Clusters may be
    left empty.
    """
    C = parents.shape[0]
    unit = _unit(rows.astype(jnp.float32))
    centres = _unit(segment_sum(unit, cluster_of, C))
    order = jnp.lexsort((_along_family(centres, parents), parents))
    cluster_of = jnp.zeros(C, jnp.int32).at[order].set(jnp.arange(C, dtype=jnp.int32))[cluster_of]
    centres = centres[order]

    ahead = jnp.roll(centres, -1, axis=0).at[-1].set(centres[-1])
    behind = jnp.roll(centres, 1, axis=0).at[0].set(centres[0])
    leaning = jnp.einsum("SH,SH->S", unit, (ahead - behind)[cluster_of])
    sorted_rows = jnp.lexsort((leaning, cluster_of))
    ends = jnp.cumsum(jax.ops.segment_sum(jnp.ones_like(cluster_of), cluster_of, C))
    ends = _borders(ends, shape)
    # Position i belongs to the cluster whose number is the count of borders up to i.
    S = rows.shape[0]
    passed = jnp.cumsum(jnp.zeros(S, jnp.int32).at[ends[:-1]].add(1, mode="drop"))
    return jnp.zeros(S, jnp.int32).at[sorted_rows].set(passed)


def _along_family(centres, parents):
    """Where each centre [C H] lies along the principal direction of its siblings, f32[C]."""
    C, H = centres.shape
    total = segment_sum(jnp.concatenate([centres, jnp.ones((C, 1))], axis=1), parents, C)
    offset = centres - (total[:, :H] / jnp.maximum(total[:, H:], 1.0))[parents]
    place = lambda direction: jnp.einsum("CH,CH->C", offset, direction[parents])
    step = lambda _, direction: _unit(segment_sum(offset * place(direction)[:, None], parents, C))
    start = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, H)), (C, H))
    return place(jax.lax.fori_loop(0, POWER_STEPS, step, start))


def _borders(ends, shape: Shape):
    """Ends i32[C] of runs, ascending, moved to where `shape` wants them; the last stays."""
    granule, most, first = shape
    S, number = ends[-1], jnp.arange(ends.shape[0], dtype=jnp.int32)
    down = lambda row: jnp.clip((row + first) // granule * granule - first, 0, S)  # to the border before a row
    ends = down(ends + granule // 2).at[-1].set(S)
    if most is not None:
        # A run that is too long hands rows on; what the last ones cannot take goes back.
        ends = number * most + jax.lax.cummin(jnp.minimum(ends, down(most * (number + 1))) - number * most)
        ends = jnp.maximum(ends, down(S - jnp.flip(number) * most + granule - 1)).at[-1].set(S)
    return ends


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
