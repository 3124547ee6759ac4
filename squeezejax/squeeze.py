"""Offline: a fixed context's tokens become a calibrated tree, layer by layer (spec.md, Offline 1-4).

Each layer in turn reads the hidden states of the whole context in chunks of tokens (dense causal attention over the
keys so far), then its keys are clustered and written into the tree. Beside the tree and the hidden states only one
layer's keys and values are alive, and scores of one chunk.
"""

import dataclasses
import functools
import hashlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.arguments import check_tokens
from squeezejax.attention import attend_cached
from squeezejax.calibrate import calibrate
from squeezejax.config import SqueezeConfig
from squeezejax.tree import Tree, build_layer, check_context_length

CHUNK = 512  # context tokens in one forward step
FALLBACK_QUERIES = 100  # calibration queries when there is no observation window


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a build has come; `done` and `total` are estimated floating-point operations."""

    stage: str
    done: float
    total: float
    elapsed: float  # seconds

    @property
    def remaining(self) -> float:
        """Seconds to go, were the rest as fast as what is done; ∞ before anything is."""
        return self.elapsed * (self.total - self.done) / self.done if self.done else float("inf")


def squeeze(
    params,
    tokens,
    config: SqueezeConfig = SqueezeConfig(),  # noqa: B008 - frozen
    *,
    key=None,
    progress: Callable[[Progress], None] | bool | None = None,
) -> Tree:
    """Prefills, clusters and calibrates a fixed context once, for any number of questions (paper section 3.1).

    tokens i32[S+W], the context from its first token on. `key` seeds K-means (default `jax.random.key(0)`): the same
    key gives the same tree. `progress`: True draws a bar on standard error, a function receives `Progress`.

    Raises ValueError for token ids out of range, a context no longer than the observation window, and a model whose
    keys are not finite.
    """
    tokens = check_tokens(np.asarray(tokens), params.config.vocab_size)
    if tokens.shape[0] != 1:
        raise ValueError(f"squeeze takes one context, tokens i32[S+W], got shape {tokens.shape}")
    length = tokens.shape[1]
    check_context_length(length, config)
    report = _Reporter(params.config, length, config, progress)
    L = params.config.num_layers
    seeds = jax.random.split(jax.random.key(0) if key is None else key, L)
    num_queries = config.observation_window or min(FALLBACK_QUERIES, length)

    x = params.embed(_padded(tokens, -length % min(CHUNK, length)))
    tree, queries = None, []
    for i in range(L):
        x, keys, values, q = _prefill_layer(params, i, x, length, num_queries, report)
        if not bool(jnp.all(jnp.isfinite(keys))):
            raise ValueError(
                f"the keys of layer {i} hold values that are not finite: check the model's weights and dtype"
            )
        layer = build_layer(keys, values, config, seeds[i])
        tree = _write_layer(_allocate(layer, L) if tree is None else tree, layer, i)
        queries.append(q)
        report.clustered(i, tree)
    digest = np.frombuffer(hashlib.sha256(np.asarray(tokens).tobytes()).digest(), np.uint8)
    tree = dataclasses.replace(tree, fingerprint=params.config.fingerprint, context_hash=jnp.asarray(digest))
    tree = calibrate(tree, jnp.stack(queries))
    report.finish()
    return tree


def _prefill_layer(params, index: int, x, length: int, num_queries: int, report):
    """One layer over the whole context x [1 T D] -> (x, keys, values [K S+W H], last queries [N W H])."""
    config = params.config
    layer = params.layer(index)
    chunk = min(CHUNK, length)
    cache = jnp.zeros((2, 1, x.shape[1], config.num_kv_heads, config.head_dim), x.dtype)
    queries = []
    for start in range(0, x.shape[1], chunk):
        x, cache, q = _prefill_chunk(params, layer, x, cache, start, chunk)
        if start + chunk > length - num_queries:
            queries.append(q)
        report.prefilled(index, min(start + chunk, length), cache)
    end = x.shape[1] - length
    q = jnp.concatenate(queries, axis=0)
    q = q[len(q) - end - num_queries : len(q) - end].swapaxes(0, 1)
    keys, values = (cache[i, 0, :length].swapaxes(0, 1) for i in (0, 1))
    return x, keys, values, q


@functools.partial(jax.jit, static_argnames="chunk", donate_argnames=("x", "cache"))
def _prefill_chunk(params, layer, x, cache, start, chunk: int):
    """Tokens [start, start + chunk) of one layer -> (x with them updated, cache with them written, q [chunk N H])."""

    def attend(q, k, v):
        new = jnp.stack([k, v])
        written = jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis=2)
        return (written, q[0]), attend_cached(q, written[0], written[1], start)

    part = jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
    positions = (start + jnp.arange(chunk))[None, :]
    part, (cache, q) = params.apply_layer(layer, part, positions, attend)
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=1), cache, q


def _padded(tokens, rows: int):
    """tokens [1 T] with `rows` tokens appended, so that chunks divide it; causality keeps them from mattering."""
    return jnp.pad(tokens, ((0, 0), (0, rows)))


def _allocate(layer: Tree, L: int) -> Tree:
    return jax.tree.map(lambda leaf: jnp.zeros((L, *leaf.shape), leaf.dtype), layer)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(tree: Tree, layer: Tree, index) -> Tree:
    return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, index, 0), tree, layer)


class _Reporter:
    """Turns finished work into `Progress`, weighing attention by how many keys it reads."""

    def __init__(self, model, length: int, config: SqueezeConfig, progress):
        self._show = _draw_bar if progress is True else progress or None
        self._started = time.monotonic()
        D, H, K, N = model.model_dim, model.head_dim, model.num_kv_heads, model.num_heads
        self._per_token = 2 * D * (2 * N * H + 2 * K * H + 3 * model.mlp_dim)
        self._per_pair = 4 * N * H / 2  # causal: half the pairs
        clusters = config.num_clusters(length - config.observation_window)
        self._cluster = 2 * config.kmeans_iterations * length * clusters[-1] * K * H
        self._layers, self._length = model.num_layers, length
        self._layer = self._prefill(length) + self._cluster

    def _prefill(self, tokens: int) -> float:
        return tokens * self._per_token + tokens * tokens * self._per_pair

    def _tell(self, stage: str, done: float, wait_for=None):
        if self._show is None:
            return
        jax.block_until_ready(wait_for)  # else the clock would measure the dispatch of work, not the work
        self._show(Progress(stage, done, self._layers * self._layer, time.monotonic() - self._started))

    def prefilled(self, layer: int, tokens: int, wait_for):
        self._tell(f"layer {layer + 1}/{self._layers}", layer * self._layer + self._prefill(tokens), wait_for)

    def clustered(self, layer: int, wait_for):
        self._tell(f"layer {layer + 1}/{self._layers}", (layer + 1) * self._layer, wait_for)

    def finish(self):
        self._tell("calibrated", self._layers * self._layer)


def _draw_bar(progress: Progress):
    if progress.stage != "calibrated" and not sys.stderr.isatty():
        return  # a file wants the last line only, not every state of a bar
    fraction = progress.done / progress.total
    bar = "█" * round(30 * fraction)
    end = "\n" if progress.stage == "calibrated" else ""
    rest = f"{progress.remaining:.0f} s left" if not end else f"{progress.elapsed:.1f} s"
    print(f"\rsqueezing {bar:░<30} {fraction:4.0%}  {progress.stage}, {rest}   ", end=end, file=sys.stderr, flush=True)
