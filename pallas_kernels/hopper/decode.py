"""One decode step of attention on Hopper, one token a user: select and attend.

A level is scored, what exceeds its threshold is kept, and what that leads to is listed: clusters of the level below, or
rows of the cache (three kernels a level). Where keys have codes, those of the rows listed are scored, and what exceeds
its threshold is listed again. One kernel then attends to the listed rows, the window and the user's own tokens
together, and one merges its parts. XLA computes sums of how many items tiles add, and a few numbers a query.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import codes
from squeezejax.pallas_kernels.hopper import sparse_decode
from squeezejax.pallas_kernels.hopper.centroid_scores import Terms, score_clusters
from squeezejax.pallas_kernels.hopper.keep_clusters import keep_clusters
from squeezejax.pallas_kernels.hopper.keep_keys import keep_keys
from squeezejax.pallas_kernels.hopper.mosaic import GRANULE, MASKED, check_rows
from squeezejax.pallas_kernels.hopper.scores import Query, split_query
from squeezejax.pallas_kernels.hopper.shares import offsets_of
from squeezejax.pallas_kernels.hopper.sparse_decode import InOrder, Listed
from squeezejax.pallas_kernels.hopper.step import Step
from squeezejax.pallas_kernels.hopper.work_list import PER_TILE, Lists, in_order, list_items


class Cache(NamedTuple):
    """All that one decode step attends to, besides selecting it."""

    keys: jax.Array  # [L K R H], the fixed context
    values: jax.Array
    num_keys: int  # S, the first rows of each head; the rest is padding
    window_keys: jax.Array  # [L K W H]
    window_values: jax.Array
    own_keys: jax.Array  # [B T' K H], of one layer
    own_values: jax.Array


class Index(NamedTuple):
    """What a step selects by: the levels, and with our rule what else a score takes (the fields of the tree)."""

    levels: tuple  # coarse → fine, with the fields of the tree's `Level`
    key_codes: jax.Array | None = None  # u8[L K R …]
    key_steps: jax.Array | None = None  # bf16[L K R]
    sinks: jax.Array | None = None  # [L K s H], keys that count in the denominator; None: the paper's rule
    denominators: jax.Array | None = None  # f32[L K G 2]

    @classmethod
    def of(cls, tree) -> "Index":
        """A tree's."""
        if tree.config.score == "mean":
            return cls(tree.levels)
        sinks = tree.window_keys[:, :, : tree.config.sinks]
        return cls(tree.levels, tree.key_codes, tree.key_steps, sinks, tree.denominators)


class Selected(NamedTuple):
    """What a step keeps of the fixed context, and what finding it took."""

    lists: Lists  # of the kept rows
    num_kept: jax.Array  # i32[B K], keys
    num_read: tuple  # i32[B K] tiles of 64 clusters read at each level, then of keys' codes


def check(q, keys, *other_keys):
    """Raises NotImplementedError, with the reason, unless the kernels can take q [… N H] over keys [L K R H].

    other_keys, the window's and the users' own, need only be of the same dtype.
    """
    _, K, R, _ = keys.shape
    sparse_decode.check(q.shape[-2] // K, q.shape[-1], q.dtype, keys.dtype, *(cache.dtype for cache in other_keys))
    check_rows(R)


def select(q, index: Index, step: Step, num_rows: int, *, may_skip=False) -> Selected:
    """What one token a user, q [B K G H], keeps of num_rows rows (docs/method.md, Selection).

    With may_skip, nothing is read or kept where every threshold is −∞.
    """
    B, K, G, H = q.shape
    layer = step.layer
    levels, step = _in_granules(index.levels, step)
    rows = q.reshape(B * K, G, H)
    query = Query(rows) if index.sinks is None else split_query(rows)
    skip = step.everything() if may_skip else jnp.bool_(False)
    lists, lse = in_order(B * K, levels[0].counts.shape[2], skip), None
    num_read = []
    for depth, level in enumerate(levels):
        finest = depth == len(levels) - 1
        below = num_rows if finest else levels[depth + 1].counts.shape[2]
        terms = None if index.sinks is None else _terms(q, index, level, layer, step.layer)
        scores = score_clusters(query, level, terms, lists, step)
        kept, lse = keep_clusters(scores, lists, level, terms, lse, below, step, depth, G)
        num_read.append(lists.num_tiles.reshape(B, K))
        lse = None if terms is None else lse
        num_tiles = lists.num_tiles
        lists = list_items(kept, lists.offsets, below, owned=finest and index.key_codes is not None)
    if index.key_codes is not None:
        step = step._replace(layer=layer)
        kept = keep_keys(query, index.key_codes, index.key_steps, scores.dots, lse, lists, step, len(levels))
        num_read.append(lists.num_tiles.reshape(B, K))
        num_tiles = -(-lists.num_tiles // PER_TILE)  # of 64 items now
        lists = list_items(kept, offsets_of(num_tiles), num_rows)
    return Selected(lists, kept.num_rows(num_tiles).reshape(B, K), tuple(num_read))


def _terms(q, index: Index, level, layer, level_layer) -> Terms:
    """What our rule adds to the scores of a level for q [B K G H], at `layer` of the tree and of the level."""
    B, K, G, H = q.shape
    plain = q.astype(jnp.float32) / math.sqrt(H)
    of_layer = lambda x, layer: jax.lax.dynamic_index_in_dim(x, layer[0], 0, keepdims=False)
    dot = lambda spec, *x: jnp.einsum(spec, *x, precision=jax.lax.Precision.HIGHEST)
    sinks = dot("BKGH,KsH->sBKG", plain, of_layer(index.sinks, layer).astype(jnp.float32))
    sinks = jax.nn.logsumexp(sinks, axis=0) if len(sinks) else jnp.full((B, K, G), MASKED)
    line = jnp.zeros((K, G, 2)).at[..., 1].set(1.0)
    line = line if index.denominators is None else of_layer(index.denominators, layer)
    shift, slope = (jnp.broadcast_to(line[..., i], (B, K, G)) for i in range(2))
    offset = dot("BKGH,KH->BKG", codes.rotate(plain), of_layer(level.offset, level_layer))
    found = Terms(offset, jnp.sum(plain * plain, axis=3) / 2, sinks, shift, slope)
    return Terms(*(jnp.pad(x.reshape(B * K, G), ((0, 0), (0, -G % 8))) for x in found))


def attend_kept(q, cache: Cache, index: Index, step: Step):
    """Attention of one token a user, q [B K G H], to kept keys, window and own tokens (docs/method.md, Selection).

    Thresholds None keep every key. Gives (out f32[B K G H], lse f32[B K G], kept i32[B] keys of
    all heads together).
    """
    B, K = q.shape[:2]
    R = cache.keys.shape[2]
    # Reading every row in order costs far less than listing them; it takes rows that all lie before the padding.
    can_read_all = R - cache.num_keys < GRANULE
    if step.thresholds is None:
        if can_read_all:
            return *attend_all(q, cache, step), jnp.full(B, K * cache.num_keys)
        step = step._replace(thresholds=jnp.full(len(index.levels) + (index.key_codes is not None), -jnp.inf))
    with jax.named_scope("select"):
        found = select(q, index, step, R, may_skip=can_read_all)
    with jax.named_scope("attend"):
        everything = [InOrder(cache.keys, cache.values, cache.num_keys, if_all=True)] if can_read_all else []
        listed = Listed(cache.keys, cache.values, found.lists)
        out, lse = sparse_decode.attend(q, (*everything, *_short(cache)), listed, step)
    num_kept = jnp.sum(found.num_kept, axis=1)
    if can_read_all:
        num_kept = jnp.where(jnp.all(step.thresholds == -jnp.inf), K * cache.num_keys, num_kept)
    return out, lse, num_kept


def attend_all(q, cache: Cache, step: Step):
    """Dense attention of one token a user, q [B K G H], to everything: (out f32[B K G H], lse f32[B K G]).

    The baseline: the same kernel, which then reads 64 rows a copy. Thresholds are ignored.
    """
    step = step._replace(thresholds=jnp.zeros(1))
    sources = (InOrder(cache.keys, cache.values, cache.num_keys), *_short(cache))
    return sparse_decode.attend(q, sources, None, step)


def _short(cache: Cache):
    """Window and own tokens, as far as there are any."""
    W = cache.window_keys.shape[2]
    if W:
        yield InOrder(cache.window_keys, cache.window_values, W)
    yield InOrder(cache.own_keys, cache.own_values, None)


def _in_granules(levels, step: Step):
    """(levels, step) of which each has a whole number of granules of clusters: all that TMA can read where it lies.

    Layers, heads and clusters multiply to one unless heads are few and odd; then the layer at hand is copied.
    """
    if all(level.counts.size % GRANULE == 0 for level in levels):
        return levels, step

    def one_layer(x):
        widths = [(0, 0), (0, 0), (0, -x.shape[2] % GRANULE)] + [(0, 0)] * (x.ndim - 3)  # clusters of no key
        return jnp.pad(jax.lax.dynamic_index_in_dim(x, step.layer[0], 0), widths)

    return [jax.tree.map(one_layer, level) for level in levels], step._replace(layer=jnp.zeros(1, jnp.int32))
