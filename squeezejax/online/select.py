"""Which keys matter to a query: the selection by itself, as a mask (docs/method.md, Selection)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from squeezejax.mesh import sharding
from squeezejax.online.reading import check_reading, reading_of
from squeezejax.pallas_kernels.interface import Reading
from squeezejax.pallas_kernels.layout import split_heads, to_lanes
from squeezejax.pallas_kernels.xla import backend as xla
from squeezejax.pallas_kernels.xla.lists import Found, Rows
from squeezejax.tree import Tree


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Selection:
    """The clustered keys that one set of query tokens keeps in one layer."""

    rows: jax.Array  # bool[K R], rows of the cache that are kept
    layer: jax.Array  # i32[]

    def key_mask(self, tree: Tree) -> jax.Array:
        """bool[K S]: the clustered keys that are kept, in their original order; neither sinks nor window are in it."""
        order = tree.order[self.layer]
        heads = jnp.arange(order.shape[0])[:, None]
        mask = jnp.zeros((order.shape[0], tree.num_keys), bool)
        # Padding rows (order −1) are sent past the end, where the scatter drops them.
        return mask.at[heads, jnp.where(order < 0, tree.num_keys, order)].set(self.rows, mode="drop")

    def num_kept(self, tree: Tree) -> jax.Array:
        """i32[K]: keys kept by each key/value head."""
        return jnp.sum(self.rows & (tree.order[self.layer] >= 0), axis=-1, dtype=jnp.int32)


def select(tree: Tree, q, *, layer, sparsity=None, log_thresholds=None) -> Selection:
    """The keys kept for q [T N H], the query tokens of one layer that share one selection.

    `sparsity` (default the tree's) is looked up in the calibrated table; `log_thresholds` f32[levels] overrides it.
    Both may be traced, as may `layer`. A cluster is kept iff its log A exceeds log T strictly and its ancestors are
    kept; below the clusters, in a tree with codes of keys, a key likewise. A sparsity at which selecting cannot pay in
    this tree keeps every key, as in `attend` (fallback.py).
    Raises ValueError for shapes that do not fit the tree, or for a tree without thresholds where they are needed.
    """
    check_queries(tree, q, "T N H")
    reading = reading_of(tree, sparsity=sparsity, log_thresholds=log_thresholds)
    check_reading(reading, 1)
    layer = jnp.asarray(layer, jnp.int32)
    return Selection(_select_rows(tree, q, layer, reading), layer)


# Without jit every call would compile its loops again: their bodies are new functions each time.
@jax.jit
def _select_rows(tree: Tree, q, layer, reading: Reading):
    """bool[K R], the rows kept for q [T N H]."""
    mesh = sharding.mesh_of(tree)
    groups = split_heads(q[None], tree.num_kv_heads)

    def select_here(tree, groups, layer, reading, context=None):
        rows = to_lanes(groups)
        valid = jnp.ones((1, rows.shape[2]), bool)
        return kept_rows(tree, xla.select(tree, rows, valid, groups.shape[3], layer, reading, context), layer)[0]

    if mesh is None:
        return select_here(tree, groups, layer, reading)
    whole = sharding.spec(mesh, "")
    in_specs = (sharding.specs(mesh, tree), sharding.spec(mesh, "btK"), whole, whole)
    select_shard = functools.partial(select_here, context=sharding.context_axis(mesh))
    call = sharding.map_shards(select_shard, mesh, in_specs, sharding.spec(mesh, "KR"))
    return call(sharding.local_numbers(tree), groups, layer, reading)


def kept_rows(tree: Tree, found: Found, layer) -> jax.Array:
    """bool[B K R]: the rows that every user and head keeps of one layer."""
    B, K, _ = found.clusters.shape
    R = tree.keys.shape[2]
    if isinstance(found.lists, Rows):
        lists, lane = found.lists, jnp.arange(B * K)[:, None]
        listed = jnp.arange(R)[None, :] < lists.num_rows[:, None]
        rows = jnp.zeros((B * K, R), bool).at[lane, jnp.where(listed, lists.rows, R)].set(True, mode="drop")
        return rows.reshape(B, K, R)
    level = tree.levels[-1]
    starts, ends = level.starts[layer], level.starts[layer] + level.counts[layer]
    change = found.clusters.astype(jnp.int32)
    user, head = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    edges = jnp.zeros((B, K, R + 1), jnp.int32)
    edges = edges.at[user, head, starts[None]].add(change).at[user, head, ends[None]].add(-change)
    return jnp.cumsum(edges, axis=2)[:, :, :-1] > 0


def check_queries(tree: Tree, q, axes: str):
    """Raises ValueError unless q [… N H] has the axes named and fits the tree's heads."""
    _, K, _, H = tree.keys.shape
    if q.ndim != len(axes.split()) or q.shape[-1] != H or q.shape[-2] % K:
        raise ValueError(f"q must be [{axes}] with H = {H} and N a multiple of K = {K}, got {q.shape}")
    if 0 in q.shape:
        raise ValueError(f"there are no query tokens: q [{axes}] has shape {q.shape}")
