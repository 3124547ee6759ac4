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
from squeezejax.pallas_kernels.xla import backend


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Looked:
    """How much of the index every token's selection read, of each key/value head."""

    clusters: jax.Array  # i32[R K], whose centroids were scored, of all levels
    codes: jax.Array  # i32[R K], keys whose codes were scored


def look(tree: Tree, q, layer, log_T, estimate: bool = False):
    """Selects for q [R N H], every token by itself, as the library does.

    Gives (bool[R K S], `Looked`, log of the mass estimated to be missed f32[R K G] or None).
    """
    K = tree.num_kv_heads
    rows = to_lanes(split_heads(q[:, None], K))  # [R K G H]
    valid = jnp.ones((len(q), rows.shape[2]), bool)

    def find(tree, **options):
        reading = Reading(log_T[: tree.config.num_thresholds], **options)
        return backend.select(tree, rows, valid, rows.shape[2], layer, reading)

    clusters = jnp.sum(_live(tree, 0, layer), axis=1)[None, :]
    for depth in range(1, len(tree.levels)):
        # The levels above by themselves are a tree too, and what it keeps is what is looked at below.
        above = find(_shallow(tree, depth)).clusters
        children = tree.levels[depth - 1].child_counts[layer]
        clusters = clusters + jnp.sum(jnp.where(above, children[None], 0), axis=2)
    found = find(tree, missed_mass=estimate)
    mask = jax.vmap(lambda rows: Selection(rows, layer).key_mask(tree))(kept_rows(tree, found, layer))
    codes = jnp.sum(jnp.where(found.clusters, tree.levels[-1].counts[layer][None], 0), axis=2)
    codes = codes if tree.config.key_bits else jnp.zeros_like(codes)
    missed = functools.reduce(jnp.logaddexp, [lse for _, lse in found.rest]) if estimate else None
    return mask, Looked(jnp.broadcast_to(clusters, codes.shape), codes), missed


def index_bytes(tree: Tree, looked: Looked) -> jax.Array:
    """Bytes of the index read, f32[R K]: centroids as stored, with what else is scored, and codes of candidates."""
    H, config = tree.keys.shape[-1], tree.config
    of_cluster = bytes_of(H, config.index_bits) + 4 + (2 if config.score == "variance" else 0)  # a count, a spread
    of_code = bytes_of(H, config.key_bits) if config.key_bits else 0
    return looked.clusters.astype(jnp.float32) * of_cluster + looked.codes.astype(jnp.float32) * of_code


def spared(tree: Tree) -> float:
    """Of the bytes of a key and value in 16 bits, the part that reading one in 8 bits and its scale spares."""
    H = tree.keys.shape[-1]
    return 1 - (H + 2) / (2 * H) if tree.config.cache_bits == 8 else 0.0


def _live(tree: Tree, depth: int, layer) -> jax.Array:
    return tree.levels[depth].counts[layer] > 0


def _shallow(tree: Tree, depth: int) -> Tree:
    """The coarsest `depth` levels as a tree of their own."""
    fractions = tree.config.cluster_fractions[:depth]
    config = dataclasses.replace(tree.config, cluster_fractions=fractions, key_bits=0)
    return dataclasses.replace(tree, levels=tree.levels[:depth], key_codes=None, key_steps=None, config=config)
