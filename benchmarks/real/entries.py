"""What is compared: the library's own path, exact keys, KVzip, and every method of benchmarks.quality.

An entry makes an index of a context and chooses keys for single tokens. The index of benchmarks.quality's methods
counts vectors of the cache's 16 bits; that of the library counts bytes as they are stored (index.py). Everybody attends
to the window and, but where an entry says otherwise, to the first `passes.SINKS` tokens; neither is counted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.quality import methods as quality
from benchmarks.quality.methods import Fixed, Method, everywhere
from benchmarks.quality.variants import ABLATIONS
from benchmarks.quality.variants import METHODS as QUALITY
from benchmarks.real.index import index_bytes, look, spared
from benchmarks.real.passes import SINKS, Chosen
from squeezejax import SqueezeConfig, build_tree, calibrate, log_thresholds
from squeezejax.offline.build import dimension_weights


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    build: Callable[[Fixed, Any], Any]  # (context, `Material`) -> index, a pytree
    choose: Callable[..., Chosen]  # (index, knob, layer, q [R N H]), a static argument of what is compiled
    knob: Callable[[Fixed, Any, float], Any]  # (context, index, setting) -> what choose takes
    kind: str  # what a setting is: "keys", the fraction to keep; "sparsity"; "mass"; "score", the log of a threshold
    config: SqueezeConfig
    sinks: int = SINKS
    asked: float | None = None  # a setting at which it is measured as it comes, whatever that keeps


# ---- Every method that benchmarks.quality knows


@functools.cache  # one function for each, so that what is compiled is shared
def _heads(choose):
    """A method's choice for one selection of one head, for all heads and tokens of a layer."""

    def all_heads(index, knob, layer, q):
        here = jax.tree.map(lambda x: x[layer], (index, knob))
        K = jax.tree.leaves(here)[0].shape[0]
        R, N, H = q.shape
        rows = q.reshape(R, K, N // K, H).swapaxes(0, 1)
        tokens = jax.vmap(choose, in_axes=(None, 0, None, None))
        valid = jnp.ones(N // K, bool)
        choice = jax.lax.map(lambda lane: tokens(lane[0][0], lane[1], valid, lane[0][1]), (here, rows))
        S = choice.mask.shape[-1]
        read = jnp.broadcast_to(choice.index_read, (K, R)) / (2.0 * S)
        return Chosen(jnp.broadcast_to(choice.mask, (K, R, S)), read, choice.rest)

    return all_heads


def from_quality(method: Method, sinks: int = SINKS, name: str | None = None) -> Entry:
    """A method of benchmarks.quality; every token selects for itself."""
    return Entry(
        name=name or method.name,
        build=lambda fixed, material: method.build(fixed),
        choose=_heads(method.choose),
        knob=method.knob,
        kind=method.kind,
        config=method.config,
        sinks=sinks,
    )


# ---- Exact keys, the ceiling: the library's rule with every key a cluster of its own, and an index that costs nothing


def _exact(index, log_T, layer, q):
    keys = index["keys"][layer]  # [K S H]
    always = index["always"][layer]  # [K 0|sinks H], in the denominator
    (R, N, H), K = q.shape, len(keys)
    rows = q.reshape(R, K, N // K, H).swapaxes(0, 1)

    def one_head(lane):
        keys, always, q = lane
        M = q.shape[0] * q.shape[1]
        flat = q.reshape(M, H) / jnp.sqrt(jnp.float32(H))
        scores = flat @ keys.T
        total = jax.nn.logsumexp(scores, axis=1)
        if always.shape[0]:
            total = jnp.logaddexp(total, jax.nn.logsumexp(flat @ always.T, axis=1))
        shares = jnp.exp(scores - total[:, None]).reshape(*q.shape[:2], -1)
        return jnp.mean(shares, axis=1) > jnp.exp(log_T)

    # Blocks of tokens, so that scores stay in cache.
    size = math.gcd(R, 64)
    lanes = jax.tree.map(lambda x: jnp.repeat(x, R // size, axis=0), (keys, always))
    mask = jax.lax.map(one_head, (*lanes, rows.reshape(-1, size, N // K, H)))
    return Chosen(mask.reshape(K, R, -1), jnp.zeros((K, R)))


def exact(name: str, sinks: int = SINKS, in_denominator: bool = True) -> Entry:
    """Single keys by their exact share of attention, averaged over a group's heads, above one global threshold."""

    def build(fixed, material):
        always = fixed.cache.window_keys[:, :, : sinks if in_denominator else 0]
        return {"keys": fixed.cache.keys, "always": always}

    return Entry(name, build, _exact, lambda fixed, index, log_T: jnp.float32(log_T), "score", quality.CONFIG, sinks)


# ---- The library


TOKENS = 64  # selected for at once


@functools.cache
def _library(estimate: bool):
    def choose(tree, log_T, layer, q):
        S, H, R = tree.num_keys, tree.keys.shape[3], len(q)

        def some(q):
            mask, looked, missed = look(tree, q, layer, log_T, estimate)
            kept = jnp.mean(mask.astype(jnp.float32), axis=2)
            return mask, index_bytes(tree, looked) / (4.0 * S * H) - kept * spared(tree), missed

        blocks = q.reshape(-1, math.gcd(R, TOKENS), *q.shape[1:])
        found = jax.lax.map(some, blocks)
        by_head = lambda x: jnp.swapaxes(x.reshape(R, *x.shape[2:]), 0, 1)
        mask, read, missed = jax.tree.map(by_head, found)
        return Chosen(mask, read, missed=missed)

    return choose


def library(name: str, config: SqueezeConfig, estimate: bool = True) -> Entry:
    """What the library does with a configuration, by its public functions alone."""

    def build(fixed, material):
        context, sinks = material.context, config.sinks
        weights = dimension_weights(material.params.key_frequencies(), len(material.ids))
        tree = build_tree(context.keys, context.values, config, weights=weights)
        # The sinks leave the clusters where the configuration says so; here it is only checked that they did.
        if tree.num_keys != context.keys.shape[2] - sinks - config.observation_window:
            raise ValueError(f"{name}: the tree has {tree.num_keys} clustered keys, not those of this configuration")
        return calibrate(tree, fixed.queries)

    knob = lambda fixed, tree, sparsity: log_thresholds(tree, sparsity)
    sinks = config.sinks
    return Entry(name, build, _library(estimate), knob, "sparsity", config, sinks, asked=config.sparsity)


# ---- KVzip (Kim et al., arXiv 2505.23416)


def _by_score(index, log_T, layer, q):
    mask = index[layer] > log_T  # [K S]
    K, S = mask.shape
    return Chosen(jnp.broadcast_to(mask[:, None], (K, len(q), S)), jnp.zeros((K, len(q))))


KVZIP = Entry(
    name="kvzip",
    build=lambda fixed, material: material.repeated()[:, :, SINKS : SINKS + fixed.cache.keys.shape[2]],
    choose=_by_score,
    knob=lambda fixed, index, log_T: jnp.float32(log_T),
    kind="score",
    config=quality.CONFIG,
)


# ---- All of them

EXACT = exact("exact")
DEFAULT = library("library default", SqueezeConfig())


def entries() -> dict[str, Entry]:
    """Every entry by name."""
    found = [
        EXACT,
        exact("exact, sinks in no denominator", in_denominator=False),
        exact("exact, sinks like any key", sinks=0, in_denominator=False),
        DEFAULT,
        library("library paper", SqueezeConfig.paper()),
        library("library paper, flat 5 %", SqueezeConfig.paper(cluster_fractions=(0.05,))),
        KVZIP,
    ]
    found += [
        from_quality(method, name=f"{name} (top keys)" if name == "exact" else None) for name, method in QUALITY.items()
    ]
    found += [from_quality(QUALITY[name], 0, f"{name}, sinks like any key") for name in ("squeezed", "squeezed_flat")]
    found += [
        from_quality(method)
        for name in ("score", "bits", "centroids", "thresholds", "coarse_margin", "depth")
        for method in ABLATIONS[name]
        if method.name not in QUALITY
    ]
    return {entry.name: entry for entry in found}


__all__ = ["DEFAULT", "EXACT", "KVZIP", "Entry", "entries", "everywhere", "exact", "from_quality", "library"]
