"""Ways of choosing keys, all behind one signature: nothing but the choice differs between them.

A method makes an *index* of a context's clustered keys once, and then chooses, for the query rows that share one
selection and one key/value head, which keys these attend to. Every method chooses per key/value head, anew for every
token of a reply and once for all tokens of a question, and never touches the observation window or the question's own
tokens, which everybody attends to. Where several rows share a selection (the heads of a group, the tokens of a
question), each row's scores are normalised by a softmax and the rows averaged, as in Squeezed Attention; for a single
row that leaves a method's own order of keys as it is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from squeezejax import Estimate, Selection, SqueezeConfig, Tree, add_value_centroids, build_tree, calibrate
from squeezejax.online.reading import reading_of
from squeezejax.online.select import kept_rows
from squeezejax.pallas_kernels import codes
from squeezejax.pallas_kernels.interface import Reading
from squeezejax.pallas_kernels.xla import backend as xla
from squeezejax.pallas_kernels.xla import estimated, levelwise
from squeezejax.pallas_kernels.xla.lists import Found, cluster_of_rows
from squeezejax.pallas_kernels.xla.softmax import merge

CONFIG = SqueezeConfig.paper()  # of the trees of most methods; sparsities are settings of a run
DEFAULT = SqueezeConfig()  # the library's own
PAGE = 16  # keys of one of Quest's pages
SINKS = 4  # first tokens that StreamingLLM keeps
POOLING = 5  # neighbouring tokens that SnapKV averages
BLOCK = 20  # keys of a position block: the mean size of our clusters


class Cache(NamedTuple):
    """A context's keys and values in their order."""

    keys: jax.Array  # [L K S H], of which a method chooses
    values: jax.Array  # [L K S H]
    window_keys: jax.Array  # [L K sinks+W H], which everybody attends to: first tokens, where there are any, and last
    window_values: jax.Array  # [L K sinks+W H]


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A context that was read once, and the trees that a configuration makes of it, when a method first asks."""

    cache: Cache
    queries: jax.Array  # [L N W H], which calibrate: the window's, or others where it is empty
    config: SqueezeConfig = CONFIG
    weights: tuple[float, ...] | None = None  # of dimensions, in the metric "slow"

    @functools.cached_property
    def built(self) -> Tree:
        """All levels, with value centroids, not calibrated."""
        sinks, window = self.config.sinks, self.config.observation_window
        # What everybody attends to may begin with more first tokens than this configuration's sinks.
        around = lambda x, always: [always[:, :, :sinks], x, always[:, :, always.shape[2] - window :]]
        whole = lambda x, always: jnp.concatenate(around(x, always), axis=2)
        cache = self.cache
        keys, values = whole(cache.keys, cache.window_keys), whole(cache.values, cache.window_values)
        return add_value_centroids(build_tree(keys, values, self.config, weights=self.weights))

    @functools.cached_property
    def tree(self) -> Tree:
        """All levels, calibrated."""
        return calibrate(self.built, self.queries)

    @functools.cached_property
    def flat(self) -> Tree:
        """The finest level alone, calibrated."""
        level = self.built.levels[-1]
        level = dataclasses.replace(level, parents=jnp.zeros_like(level.parents))
        config = dataclasses.replace(self.config, cluster_fractions=self.config.cluster_fractions[-1:])
        return calibrate(dataclasses.replace(self.built, levels=(level,), config=config), self.queries)


class Choice(NamedTuple):
    """What one selection attends to, and what finding it took."""

    mask: jax.Array  # bool[S]
    index_read: jax.Array  # f32[], vectors of the index that were read; a key and its value are two
    rest: tuple | None = None  # (out f32[M H], lse f32[M]) over keys not in the mask, where a method estimates them


@dataclasses.dataclass(frozen=True)
class Method:
    """One way of choosing keys."""

    name: str
    build: Callable[[Fixed], Any]  # -> index, every leaf with leading axes [L K]
    choose: Callable[..., Choice]  # (index of one head, q [M H], valid bool[M], knob of that head)
    knob: Callable[[Fixed, Any, float], Any]  # (context, index, setting, see `kind`) -> [L K …]
    kind: str = "keys"  # what a setting is: "keys", the fraction to keep; "sparsity"; or "mass" to attend to
    config: SqueezeConfig = CONFIG  # of the context
    question_block: int | None = None  # tokens of a question that share a selection; None = all of them
    steps: int = 1  # tokens of a reply for which one selection serves


# ---- Methods that rank units of keys and keep the first ones


class Units(NamedTuple):
    """Keys in units that are kept or dropped whole, and what a method knows of them."""

    of_key: jax.Array  # i32[L K S]
    sizes: jax.Array  # i32[L K U]
    known: Any = None


def keep_first(units: Units, scores, num_keys):
    """Keys of the units that score best, until num_keys are reached: bool[S]; scores f32[U], −∞ = never."""
    order = jnp.argsort(-scores, stable=True)
    sizes = units.sizes[order]
    before = jnp.cumsum(sizes) - sizes
    kept = jnp.zeros(scores.shape, bool).at[order].set((before < num_keys) & (scores[order] > -jnp.inf))
    return kept[units.of_key]


def mean_softmax(logits, valid):
    """Softmax of each row of logits f32[M U], averaged over valid bool[M]: f32[U]."""
    shares = jnp.where(valid[:, None], jax.nn.softmax(logits, axis=1), 0.0)
    return jnp.sum(shares, axis=0) / jnp.maximum(jnp.sum(valid.astype(jnp.float32)), 1.0)


def in_order(fixed: Fixed, size: int, known=None) -> Units:
    """Units of `size` neighbouring keys; `known`, what the method knows of each."""
    S = fixed.cache.keys.shape[2]
    of_key = jnp.arange(S) // size
    sizes = jnp.bincount(of_key, length=-(-S // size))
    return Units(everywhere(fixed, of_key), everywhere(fixed, sizes), known)


def everywhere(fixed: Fixed, x) -> jax.Array:
    """The same x for every layer and key/value head: [L K …]."""
    return jnp.broadcast_to(x, (*fixed.cache.keys.shape[:2], *x.shape))


def pad_units(x, size: int, value):
    """x [L K S H] as [L K U size H], the last unit filled up with `value`."""
    L, K, S, H = x.shape
    return jnp.pad(x, ((0, 0), (0, 0), (0, -S % size), (0, 0)), constant_values=value).reshape(L, K, -1, size, H)


def ranked(name: str, build, score) -> Method:
    """A method that keeps the best units; score(units of a head, q [M H], valid) -> (f32[U], vectors read)."""

    def choose(units, q, valid, num_keys):
        scores, read = score(units, q, valid)
        return Choice(keep_first(units, scores, num_keys), jnp.float32(read))

    num_keys = lambda fixed, index, share: everywhere(fixed, jnp.int32(round(share * fixed.cache.keys.shape[2])))
    return Method(name, build, choose, num_keys)


def _exact_build(fixed: Fixed) -> Units:
    return in_order(fixed, 1, fixed.cache.keys)


def _exact_score(units: Units, q, valid):
    """The oracle: exact attention weights, for which every key is read."""
    return mean_softmax(levelwise.centroid_dots(q, units.known), valid), len(units.known)


def quest(name: str, bits: int = 16) -> Method:
    """Quest (Tang et al., arXiv 2406.10774, algorithm 1): the most that a key of a page could score, from the page's
    smallest and largest value in every dimension. Here in every layer; the paper leaves the first two dense.
    `bits`: of a number of the index, where keys have 16.
    """

    def build(fixed: Fixed) -> Units:
        keys = fixed.cache.keys
        low, high = jnp.min(pad_units(keys, PAGE, jnp.inf), axis=3), jnp.max(pad_units(keys, PAGE, -jnp.inf), axis=3)
        return in_order(fixed, PAGE, (rounded(low, keys, bits), rounded(high, keys, bits)))

    def score(units: Units, q, valid):
        low, high = units.known  # [U H]
        bound = jnp.maximum(q, 0) @ high.T + jnp.minimum(q, 0) @ low.T  # Σ max(q·low, q·high)
        H = q.shape[1]
        return mean_softmax(bound / jnp.sqrt(jnp.float32(H)), valid), 2 * len(low) * vector_read(bits, H)

    return ranked(name, build, score)


def rounded(x, keys, bits: int):
    """x [L K U H] as it comes back from so many bits a number, with one scale a vector; 16 = as it is.

    What all keys [L K S H] have in common is left out of the rounding: it moves no score against another.
    """
    if bits == 16:
        return x
    common = jnp.mean(keys, axis=2, keepdims=True)
    scale = jnp.max(jnp.abs(x - common), axis=3, keepdims=True) / (2 ** (bits - 1) - 1)
    return common + jnp.round((x - common) / jnp.maximum(scale, 1e-30)) * scale


def vector_read(bits: int, H: int) -> float:
    """What reading a vector in so many bits a number takes, its scale included, in vectors of 16 bits."""
    return 1.0 if bits == 16 else bits / 16 + 1 / H


def _blocks_build(fixed: Fixed) -> Units:
    units = in_order(fixed, BLOCK)
    return units._replace(
        known=jnp.sum(pad_units(fixed.cache.keys, BLOCK, 0), axis=3) / units.sizes[..., None].astype(jnp.float32)
    )


def _by_centroid(units: Units, q, valid):
    """Blocks of positions with their mean key (as MoBA scores them, arXiv 2502.13189), or clusters, by log A."""
    size = units.sizes > 0
    return levelwise.score_clusters(q, units.known, units.sizes, size, valid), jnp.sum(size)


def _clusters_build(fixed: Fixed) -> Units:
    fine = fixed.flat.levels[-1]
    return Units(cluster_of_key(fixed.flat), fine.counts, fine.centroids)


def _window_build(fixed: Fixed) -> Units:
    """StreamingLLM (Xiao et al., arXiv 2309.17453): the first tokens, and the most recent."""
    position = jnp.arange(fixed.cache.keys.shape[2])
    return in_order(fixed, 1, everywhere(fixed, jnp.where(position < SINKS, jnp.inf, position.astype(jnp.float32))))


def _snapkv_build(fixed: Fixed) -> Units:
    """SnapKV (Li et al., arXiv 2404.14469, listing 1): attention of the prompt's last queries to the keys before them,
    summed over the queries, smoothed over neighbours. Here the prompt is the fixed context, kept for any question;
    heads of a group, which the paper lacks, are averaged."""
    L, K, S, H = fixed.cache.keys.shape
    N, W = fixed.queries.shape[1:3]
    queries = fixed.queries.reshape(L, K, N // K, W, H) / jnp.sqrt(jnp.float32(H))
    before = jnp.einsum("LKGWH,LKSH->LKGWS", queries, fixed.cache.keys)
    everybodys = fixed.cache.window_keys.shape[2]  # the window, and first tokens before it where it holds them
    causal = jnp.tril(jnp.ones((W, everybodys), bool), everybodys - W)
    own = jnp.einsum("LKGWH,LKVH->LKGWV", queries, fixed.cache.window_keys)
    own = jnp.where(causal[None, None, None], own, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([before, own], axis=-1), axis=-1)[..., :S]
    observed = jnp.mean(jnp.sum(weights, axis=3), axis=2)  # [L K S]
    kernel = jnp.ones((1, 1, POOLING), jnp.float32) / POOLING
    pooled = jax.lax.conv_general_dilated(observed.reshape(L * K, 1, S), kernel, (1,), "SAME").reshape(L, K, S)
    return in_order(fixed, 1, pooled)


def _random_build(fixed: Fixed) -> Units:
    units = _clusters_build(fixed)
    return units._replace(known=jax.random.uniform(jax.random.key(0), units.sizes.shape))


def _as_known(units: Units, q, valid):
    """The order of the index, whatever the query."""
    return units.known, 0


# ---- Our own: the library's selection, without and with what it estimates


def cluster_of_key(tree: Tree) -> jax.Array:
    """The finest cluster of every clustered key, in the keys' original order: i32[L K S]."""
    fine = tree.levels[-1]

    def one_head(order, starts, counts):
        cluster = cluster_of_rows(starts, counts, len(order))
        at = jnp.where(order < 0, tree.num_keys, order)  # padding is sent past the end
        return jnp.zeros(tree.num_keys, jnp.int32).at[at].set(cluster, mode="drop")

    return jax.vmap(jax.vmap(one_head))(tree.order, fine.starts, fine.counts)


def _index_of(tree: Tree) -> Tree:
    """What selecting reads of a tree: every leaf has the leading axes [L K]."""
    nothing = dict.fromkeys(name for name, axes in Tree.AXES.items() if not axes.startswith("LK"))
    arrays = {
        "keys": tree.keys[..., :0],
        "values": tree.values[..., :0],
        "window_keys": tree.window_keys[:, :, : tree.config.sinks],
        "window_values": tree.window_values[:, :, :0],
    }
    return dataclasses.replace(tree, **arrays, **nothing)


def by_library(index: Tree, q, valid, reading: Reading) -> Choice:
    """The library's own selection for one head: index without the axes [L K], q [M H], valid bool[M]."""
    tree = jax.tree.map(lambda leaf: leaf[None, None], index)
    group = 1 if tree.denominators is None else tree.denominators.shape[2]
    find = lambda tree, reading: xla.select(tree, q[None, None], valid[None], group, jnp.int32(0), reading)
    found = find(tree, reading)
    mask = Selection(kept_rows(tree, found, 0)[0], jnp.int32(0)).key_mask(tree)[0]
    rest = merge(*((out[0, 0], lse[0, 0]) for out, lse in found.rest)) if reading.tail else None
    return Choice(mask, _index_read(tree, found, find, q, valid, reading), rest)


def _index_read(tree: Tree, found: Found, find, q, valid, reading: Reading):
    """Vectors of 16 bits that a selection read: centroids level by level, codes of keys, mean values for a tail.

    Centroids in 32 bits count as in 16, which change no choice.
    """
    H, config = q.shape[1], tree.config
    one = config.score == "variance"  # a variance, in 16 bits, comes with every centroid
    of_cluster = vector_stored(config.index_bits, H) + (1 / H if one else 0)
    if reading.min_mass is not None:
        levels = jax.tree.map(lambda leaf: leaf[0, 0], tree.levels)
        kept = estimated.descend(levels, q, valid, reading, config.coarse_margin)[0]
    else:
        # The levels above by themselves are a tree too, and what it keeps is what is looked at below.
        above = range(1, len(tree.levels))
        kept = [find(_shallow(tree, depth), _shallow_reading(reading, depth)).clusters[0, 0] for depth in above]
        kept.append(found.clusters[0, 0])
    read, parents = jnp.float32(0), jnp.ones(1, bool)
    for level, keep in zip(tree.levels, kept, strict=True):
        counts = level.counts[0, 0]
        living = (counts > 0) & parents[level.parents[0, 0]]
        read += jnp.sum(living.astype(jnp.float32)) * of_cluster
        if reading.tail:
            # The mean value of what is given up, and of clusters of whose keys some are.
            read += jnp.sum(living & (~keep | (level is tree.levels[-1] and bool(config.key_bits)))).astype(jnp.float32)
        parents = keep
    if config.key_bits:
        keys = jnp.sum(jnp.where(kept[-1], tree.levels[-1].counts[0, 0], 0)).astype(jnp.float32)
        read += keys * vector_stored(config.key_bits, H)
    return read


def _shallow(tree: Tree, depth: int) -> Tree:
    """The coarsest `depth` levels of a tree."""
    config = dataclasses.replace(tree.config, cluster_fractions=tree.config.cluster_fractions[:depth], key_bits=0)
    return dataclasses.replace(tree, levels=tree.levels[:depth], key_codes=None, key_steps=None, config=config)


def _shallow_reading(reading: Reading, depth: int) -> Reading:
    block = None if reading.block_log_T is None else reading.block_log_T[:depth]
    return dataclasses.replace(reading, log_T=reading.log_T[:depth], block_log_T=block, tail=False, missed_mass=False)


def vector_stored(bits: int, H: int) -> float:
    """What reading a vector takes that the library stores in so many bits a number, in vectors of 16 bits."""
    return codes.bytes_of(H, min(bits, 16)) / (2 * H)


def squeezed(
    name: str,
    config: SqueezeConfig = CONFIG,
    *,
    flat: bool = False,
    by_mass: bool = False,
    tail: bool = False,
    **tokens,
) -> Method:
    """Squeezed Attention as the library has it: by thresholds, or by mass; with or without the tail estimate.

    `flat`: the finest level alone. `tokens`: question_block and steps of a `Method`.
    """
    tree_of = lambda fixed: fixed.flat if flat else fixed.tree

    def knob(fixed, index, setting) -> Reading:
        options = {"min_mass": setting} if by_mass else {}
        estimate = Estimate(tail=tail, **options) if tail or by_mass else None
        sparsity = None if by_mass else setting
        reading = reading_of(tree_of(fixed), sparsity=sparsity, estimate=estimate, implementation="xla")
        return jax.tree.map(lambda x: everywhere(fixed, x), reading)

    build = lambda fixed: _index_of(tree_of(fixed))
    return Method(name, build, by_library, knob, "mass" if by_mass else "sparsity", config, **tokens)


METHODS = {
    method.name: method
    for method in (
        squeezed("squeezed_default", DEFAULT),
        squeezed("squeezed_default_tail", DEFAULT, tail=True),
        squeezed("squeezed_default_clusters", dataclasses.replace(DEFAULT, key_bits=0)),
        squeezed("squeezed"),
        squeezed("squeezed_flat", flat=True),
        squeezed("squeezed_tail", tail=True),
        squeezed("squeezed_flat_tail", flat=True, tail=True),
        squeezed("squeezed_mass", by_mass=True),
        squeezed("squeezed_mass_tail", by_mass=True, tail=True),
        squeezed("squeezed_flat_mass_tail", flat=True, by_mass=True, tail=True),
        ranked("clusters_ranked", _clusters_build, _by_centroid),
        ranked("exact", _exact_build, _exact_score),
        quest("quest"),
        quest("quest_4_bits", bits=4),
        ranked("blocks", _blocks_build, _by_centroid),
        ranked("snapkv", _snapkv_build, _as_known),
        ranked("window", _window_build, _as_known),
        ranked("random", _random_build, _as_known),
    )
}
