"""Which clusters matter to a query: centroids scored level by level, thresholded in log space (spec.md, Online 5)."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.mesh import sharding
from squeezejax.offline.calibrate import log_thresholds as log_thresholds_at
from squeezejax.online.fallback import dense_if_cheaper
from squeezejax.online.scores import layer_level, map_over, score_heads
from squeezejax.pallas_kernels.xla import attend as reference
from squeezejax.pallas_kernels.xla.look_up import look_up
from squeezejax.tree import Tree

# With more query rows than this, matrix products dominate, and masking the dead is cheaper than listing the living.
MOST_LISTED_ROWS = 64


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Selection:
    """The finest clusters that one set of query tokens keeps in one layer."""

    kept: jax.Array  # bool[K C]
    layer: jax.Array  # i32[]

    def key_mask(self, tree: Tree) -> jax.Array:
        """bool[K S]: the clustered keys that are kept, in their original order; the window is not included."""
        level = layer_level(tree.levels[-1], self.layer)
        order = tree.order[self.layer]
        change = self.kept.astype(jnp.int32)
        heads = jnp.arange(order.shape[0])[:, None]
        edges = jnp.zeros((order.shape[0], order.shape[1] + 1), jnp.int32)
        edges = edges.at[heads, level.starts].add(change).at[heads, level.starts + level.counts].add(-change)
        rows = jnp.cumsum(edges, axis=1)[:, :-1] > 0
        mask = jnp.zeros((order.shape[0], tree.num_keys), bool)
        # Padding rows (order −1) are sent past the end, where the scatter drops them.
        return mask.at[heads, jnp.where(order < 0, tree.num_keys, order)].set(rows, mode="drop")

    def num_kept(self, tree: Tree) -> jax.Array:
        """i32[K]: keys kept by each key/value head."""
        return jnp.sum(jnp.where(self.kept, layer_level(tree.levels[-1], self.layer).counts, 0), axis=-1)


def select(tree: Tree, q, *, layer, sparsity=None, log_thresholds=None) -> Selection:
    """The clusters kept for q [T N H], the query tokens of one layer that share one selection.

    `sparsity` (default the tree's) is looked up in the calibrated table; `log_thresholds` f32[levels] overrides it.
    Both may be traced, as may `layer`. A cluster is kept iff its log A exceeds log T strictly and its ancestors are
    kept. A sparsity at which selecting cannot pay in this tree keeps every key, as in `attend` (fallback.py).
    Raises ValueError for shapes that do not fit the tree, or for a tree without thresholds where they are needed.
    """
    check_queries(tree, q, "T N H")
    log_T = resolve_thresholds(tree, sparsity, log_thresholds)
    groups = split_heads(q[None], tree.num_kv_heads)
    kept = _select_clusters(tree, groups, jnp.asarray(layer, jnp.int32), log_T)
    return Selection(kept=kept, layer=jnp.asarray(layer, jnp.int32))


class Kept(NamedTuple):
    """What every user and key/value head keeps of one layer, in two forms."""

    runs: reference.Runs  # rows of the kept clusters, leading axes [B K]
    clusters: jax.Array  # bool[B K C], finest level


def select_lanes(tree: Tree, q, valid, layer, log_T, context: str | None = None) -> Kept:
    """One selection a user for q [B T K G H], of which valid bool[B T] take part, at log_T f32[levels].

    Inside a shard_map whose axis `context` splits the context, q finds what it keeps of this device's part.
    """
    B, T, K, G, H = q.shape
    list_runs = jax.vmap(jax.vmap(reference.kept_runs, in_axes=(0, 0, 0)), in_axes=(0, None, None))

    def score(levels):  # -> bool[B K C], kept clusters of the last of them
        return map_over(lambda user: score_heads(levels, layer, *user, log_T, context)[1], (q, valid))

    with jax.named_scope("select"):
        *_, finest = tree.levels
        if len(tree.levels) == 1 or T * G > MOST_LISTED_ROWS:
            clusters = score(tree.levels)
            return Kept(list_runs(clusters, finest.starts[layer], finest.counts[layer]), clusters)
        coarsest = tree.levels[0]
        children = list_runs(score(tree.levels[:1]), coarsest.child_starts[layer], coarsest.child_counts[layer])
        rows = q.transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
        runs, ids = look_up(tree.levels[1:], rows, jnp.repeat(valid, G, axis=1), layer, log_T[1:], children, context)
        user, head = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
        clusters = jnp.zeros((B, K, finest.counts.shape[2]), bool).at[user, head, ids].set(True, mode="drop")
        return Kept(runs, clusters)


# Without jit every call would compile its loops again: their bodies are new functions each time.
@jax.jit
def _select_clusters(tree: Tree, q, layer, log_T):
    """bool[K C], the finest clusters kept for q [1 T K G H]."""
    valid, mesh = jnp.ones(q.shape[:2], bool), sharding.mesh_of(tree)
    select_shard = lambda *args: select_lanes(*args, context=sharding.context_axis(mesh)).clusters[0]
    if mesh is None:
        return select_shard(tree, q, valid, layer, log_T)
    whole = sharding.spec(mesh, "")
    in_specs = (sharding.specs(mesh, tree), sharding.spec(mesh, "btK"), whole, whole, whole)
    call = sharding.map_shards(select_shard, mesh, in_specs, sharding.spec(mesh, "KC"))
    return call(sharding.local_numbers(tree), q, valid, layer, log_T)


def resolve_thresholds(tree: Tree, sparsity, log_thresholds, implementation: str | None = None) -> jax.Array:
    """log T f32[levels] from an explicit value, else from the table at `sparsity`, else at the tree's own sparsity.

    A sparsity, where no implementation is named, becomes −∞ if dense attention is expected to be faster.
    """
    if log_thresholds is None:
        sparsity = tree.config.sparsity if sparsity is None else sparsity
        log_T = log_thresholds_at(tree, sparsity)
        return dense_if_cheaper(tree, sparsity, log_T) if implementation is None else log_T
    if sparsity is not None:
        raise ValueError("give sparsity or log_thresholds, not both")
    log_T = jnp.asarray(log_thresholds, jnp.float32)
    if log_T.shape != (len(tree.levels),):
        raise ValueError(f"log_thresholds must be f32[{len(tree.levels)}], one a level, got shape {log_T.shape}")
    return log_T


def check_queries(tree: Tree, q, axes: str):
    """Raises ValueError unless q [… N H] has the axes named and fits the tree's heads."""
    _, K, _, H = tree.keys.shape
    if q.ndim != len(axes.split()) or q.shape[-1] != H or q.shape[-2] % K:
        raise ValueError(f"q must be [{axes}] with H = {H} and N a multiple of K = {K}, got {q.shape}")
    if 0 in q.shape:
        raise ValueError(f"there are no query tokens: q [{axes}] has shape {q.shape}")


def split_heads(q, num_kv_heads: int):
    """q [B T N H] -> [B T K G H]: query heads grouped under the key/value head that they share."""
    B, T, N, H = q.shape
    return q.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
