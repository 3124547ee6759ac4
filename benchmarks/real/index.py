"""What looking up keys in a tree reads: one function that counts, one that turns counts into bytes.

Where the library's index gets a part that is read (keys' codes, a variance, few bits), it is counted here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from squeezejax import Selection, Tree, select


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Looked:
    """How much of the index one selection read, of each key/value head."""

    clusters: jax.Array  # i32[K], whose centroids were scored, of all levels
    codes: jax.Array  # i32[K], keys whose codes were scored


def look(tree: Tree, q, layer, log_T) -> tuple[jax.Array, Looked]:
    """Selects for q [N H], one token, as the library does -> (bool[K S], `Looked`)."""
    picked = lambda tree: select(tree, q[None], layer=layer, log_thresholds=log_T[: len(tree.levels)])
    clusters = live(tree, 0, layer).sum(axis=1)
    candidates = None
    for depth in range(1, len(tree.levels)):
        # The levels above by themselves are a tree too, and what it keeps is what is looked at below.
        above: Selection = picked(dataclasses.replace(tree, levels=tree.levels[:depth], config=_shallow(tree, depth)))
        parents = tree.levels[depth].parents[layer]
        seen = jnp.take_along_axis(above.kept, parents, axis=1) & live(tree, depth, layer)
        clusters = clusters + seen.sum(axis=1)
    if getattr(tree.config, "key_bits", 0):
        raise NotImplementedError("count the keys whose codes are scored here: candidates of the clusters")
    codes = jnp.zeros_like(clusters) if candidates is None else candidates
    return picked(tree).key_mask(tree), Looked(clusters, codes)


def index_bytes(tree: Tree, looked: Looked) -> jax.Array:
    """Bytes of the index read, f32[K]: centroids as they are stored, with their counts, and codes of candidates."""
    H = tree.keys.shape[-1]
    bits, key_bits = getattr(tree.config, "index_bits", 32), getattr(tree.config, "key_bits", 0)
    # A count; in few bits a scale, and the variance that comes with it.
    of_cluster = bits * H / 8 + 4 + (4 if bits < 16 else 0)
    of_code = key_bits * H / 8 + 2
    return looked.clusters.astype(jnp.float32) * of_cluster + looked.codes.astype(jnp.float32) * of_code


def live(tree: Tree, depth: int, layer) -> jax.Array:
    """bool[K C], clusters of a level that have keys."""
    return tree.levels[depth].counts[layer] > 0


def _shallow(tree: Tree, depth: int):
    return dataclasses.replace(tree.config, cluster_fractions=tree.config.cluster_fractions[:depth])
