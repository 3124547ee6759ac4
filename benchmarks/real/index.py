"""What looking up keys in a tree reads: one function that counts, one that turns counts into bytes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from squeezejax import Selection, Tree
from squeezejax.online.select import kept_rows
from squeezejax.pallas_kernels.codes import bytes_of
from squeezejax.pallas_kernels.interface import Reading
from squeezejax.pallas_kernels.layout import split_heads, to_lanes
from squeezejax.pallas_kernels.xla.backend import select
from squeezejax.pallas_kernels.xla.lists import Found


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Looked:
    """How much of the index one selection read, of each key/value head."""

    clusters: jax.Array  # i32[K], whose centroids were scored, of all levels
    codes: jax.Array  # i32[K], keys whose codes were scored


def look(tree: Tree, q, layer, log_T) -> tuple[jax.Array, Looked]:
    """Selects for q [N H], one token, as the library does -> (bool[K S], `Looked`)."""
    found = find(tree, q, layer, Reading(log_T))
    clusters = live(tree, 0, layer).sum(axis=1)
    for depth in range(1, len(tree.levels)):
        # The levels above by themselves are a tree too, and what it keeps is what is looked at below.
        above = dataclasses.replace(
            tree, levels=tree.levels[:depth], key_codes=None, key_steps=None, config=_shallow(tree, depth)
        )
        kept = find(above, q, layer, Reading(log_T[:depth])).clusters[0]
        seen = jnp.take_along_axis(kept, tree.levels[depth].parents[layer], axis=1) & live(tree, depth, layer)
        clusters = clusters + seen.sum(axis=1)
    codes = jnp.zeros_like(clusters)
    if tree.key_codes is not None:  # of every key of a cluster that is kept
        codes = jnp.sum(jnp.where(found.clusters[0], tree.levels[-1].counts[layer], 0), axis=1)
    layer = jnp.asarray(layer, jnp.int32)
    return Selection(kept_rows(tree, found, layer)[0], layer).key_mask(tree), Looked(clusters, codes)


def find(tree: Tree, q, layer, reading: Reading) -> Found:
    """The library's own selection for q [N H], one token."""
    rows = to_lanes(split_heads(q[None, None], tree.num_kv_heads))
    return select(tree, rows, jnp.ones((1, rows.shape[2]), bool), rows.shape[2], layer, reading)


def index_bytes(tree: Tree, looked: Looked) -> jax.Array:
    """Bytes of the index read, f32[K]: centroids as they are stored, with their counts, and codes of candidates."""
    H, config = tree.keys.shape[-1], tree.config
    # With a count, and a variance where the score has one.
    of_cluster = bytes_of(H, config.index_bits) + 4 + (2 if config.score == "variance" else 0)
    of_code = bytes_of(H, config.key_bits) if config.key_bits else 0
    return looked.clusters.astype(jnp.float32) * of_cluster + looked.codes.astype(jnp.float32) * of_code


def live(tree: Tree, depth: int, layer) -> jax.Array:
    """bool[K C], clusters of a level that have keys."""
    return tree.levels[depth].counts[layer] > 0


def _shallow(tree: Tree, depth: int):
    return dataclasses.replace(tree.config, cluster_fractions=tree.config.cluster_fractions[:depth], key_bits=0)
