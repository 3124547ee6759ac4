"""What `benchmarks.gpu_visit` learns of a whole model of 8B shape, random weights: the first token, and decoding."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import squeezejax
from benchmarks.gpu.trees import compare, device_tree, find_thresholds
from squeezejax.models.config import LlamaConfig
from squeezejax.models.llama import Llama
from squeezejax.online.generate import _prefill, empty_state
from squeezejax.pallas_kernels import cudnn
from squeezejax.pallas_kernels.interface import Reading
from squeezejax.pallas_kernels.xla.softmax import merge

SHAPE_8B = LlamaConfig(
    vocab_size=128_256, model_dim=4096, mlp_dim=14_336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128
)
TINY = LlamaConfig(vocab_size=64, model_dim=64, mlp_dim=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64)
SAME = 0.2  # largest difference of logits from plain XLA's, of their spread: 32 layers of 16-bit numbers
CONTEXTS = {"32K": (2**15, (0.05,)), "128K": (2**17, (0.05,)), "384K": (3 * 2**17, (0.01, 0.05))}


def suites() -> dict:
    """name -> what to run, in order of value."""
    decode = {f"model 8B, {name}": functools.partial(time_model, *context) for name, context in CONTEXTS.items()}
    return decode | {"first token 8B, 1K over 128K": functools.partial(time_first_token, *CONTEXTS["128K"], 1024)}


def checks() -> dict:
    """Nothing of its own: what a model runs is checked by itself."""
    return {}


def time_model(num_keys: int, fractions: tuple[float, ...], dry: bool, seed: int, note):
    """Seconds a token of `generate`, a tenth of the keys kept, and of `dense_generate`; bytes that a token reads."""
    params, tree = _model(num_keys, fractions, dry, seed)
    fractions = tree.config.cluster_fractions
    few, many = (1, 2) if dry else (8, 72)

    def at(log_T):
        """The tree with the same thresholds for every sparsity."""
        table = jnp.broadcast_to(log_T[:, None], (len(fractions), 2))
        return dataclasses.replace(tree, sparsities=jnp.array([0.0, 1.0]), thresholds=table)

    def run(generate, tree, num_tokens: int):
        # One token of the user's, so that reading it is a decode step as well.
        question = jnp.ones((1, 1), jnp.int32)
        return generate(params, tree, question, max_new_tokens=num_tokens, sparsity=0.5, implementation="mosaic")

    kept_fraction = lambda log_T: run(squeezejax.generate, at(log_T), few).kept_fraction[0]
    log_T, kept = find_thresholds(kept_fraction, len(fractions), 0.5 if dry else 0.10, coarse=dry)
    note("kept fraction", kept)
    logits = _logits(params, tree, jnp.ones((1, 1), jnp.int32), log_T)
    compare(note, logits("mosaic"), logits("xla"), SAME)
    for name, generate in (("ours", squeezejax.generate), ("dense", squeezejax.dense_generate)):
        timed = lambda n, generate=generate: _seconds(lambda: run(generate, at(log_T), n), 1 if dry else 3)
        note(f"{name}, seconds a token", (timed(many) - timed(few)) / (many - few))
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - params.embedding[...].nbytes  # one row of which is read
    centroids = sum(level.centroids.nbytes for level in tree.levels)  # an upper bound below the coarsest level
    cache = tree.keys.nbytes + tree.values.nbytes
    note("weight bytes", weights)
    note("kept bytes", kept * cache)
    note("centroid bytes", centroids)


def _logits(params, tree, tokens, log_T):
    """A function of the implementation: logits after the tokens, in units of their spread."""
    lengths = jnp.full(1, tokens.shape[1], jnp.int32)

    def run(name):
        state = empty_state(params, tree, *tokens.shape)
        found = np.asarray(
            _prefill(params, tree, state, tokens, lengths, Reading(log_T, implementation=name)).logits, np.float32
        )
        return found / found.std()

    return run


def time_first_token(num_keys: int, fractions: tuple[float, ...], num_tokens: int, dry: bool, seed: int, note):
    """Seconds from a user's tokens to the next one's logits, a tenth of the keys kept, and with dense attention."""
    params, tree = _model(num_keys, fractions, dry, seed)
    T = 40 if dry else num_tokens
    tokens = jax.random.randint(jax.random.key(seed), (1, T), 0, params.config.vocab_size)
    state, lengths = empty_state(params, tree, 1, T), jnp.full(1, T, jnp.int32)
    prefill = lambda log_T: _prefill(params, tree, state, tokens, lengths, Reading(log_T, implementation="mosaic"))
    log_T, kept = find_thresholds(
        lambda log_T: prefill(log_T).kept_fraction[0], len(tree.levels), 0.5 if dry else 0.10, coarse=dry
    )
    note("kept fraction", kept)
    logits = _logits(params, tree, tokens[:, :128], log_T)  # as many as plain XLA does in good time
    compare(note, logits("mosaic"), logits("xla"), SAME)
    timed = lambda call: _seconds(call, 1 if dry else 5)
    ours = timed(lambda: prefill(log_T).logits)
    note("first token, ours", ours)
    dense = {"first token, our dense kernel": timed(lambda: prefill(None).logits)}
    note("first token, our dense kernel", dense["first token, our dense kernel"])
    cache = [x[:, :, : tree.num_keys].swapaxes(1, 2) for x in (tree.keys, tree.values)]  # [L S K H], as cuDNN reads it
    library = jax.jit(functools.partial(_dense_logits, implementation="xla" if dry else "cudnn"))
    try:
        dense["first token, cuDNN"] = timed(lambda: library(params, cache, tokens))
        note("first token, cuDNN", dense["first token, cuDNN"])
    except Exception as error:  # a missing contender must not hide the others, nor go unsaid
        note("first token, cuDNN", f"{type(error).__name__}: {error}"[:200])
    note("times over best dense", min(dense.values()) / ours)


def _dense_logits(params, cache, tokens, implementation: str):
    """Logits f32[1 V] after tokens i32[1 T] that attend by a library to keys, values [L S K H] and to one another."""
    T, S = tokens.shape[1], cache[0].shape[1]
    start = jnp.zeros(1, jnp.int32)

    def attend(carry, layer, q, k, v):
        fixed = cudnn.attend_rows(q, *(x[layer][None] for x in cache), implementation)
        own = cudnn.attend_own(q, k, v, start, implementation=implementation)
        return carry, merge(fixed, own)[0].reshape(q.shape)

    x, _ = params.run_layers(params.embed(tokens), S + jnp.arange(T)[None, :], attend, None)
    return params.unembed(x[:, -1:])[:, 0]


def _model(num_keys: int, fractions: tuple[float, ...], dry: bool, seed: int):
    """(params, tree of a context); tiny ones for a rehearsal."""
    config, num_keys, fractions = (TINY, 640, (0.2,)) if dry else (SHAPE_8B, num_keys, fractions)
    params = jax.jit(lambda key: Llama(config, key=key, dtype=jnp.bfloat16))(jax.random.key(seed))
    shape = {"layers": config.num_layers, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    return params, device_tree(num_keys, fractions, **shape, seed=seed)


def _seconds(call, rounds: int) -> float:
    """Median of several calls after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))
