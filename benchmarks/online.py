"""Online speed of the XLA path: one attention step, its look-up, the prefill of a question, and a whole model.

    python -m benchmarks.online [--only decode index prefill look_up auto model] [--quick]

Every time is a median of interleaved runs; a ratio is the median over rounds of baseline / ours within the round.
Best dense is the fastest of several formulations, measured in the same run. Thresholds are found by bisection, so
that the kept fraction is the one named. Writes benchmarks/results/online-<date>.json and prints one table a part.
Needs a quiet machine; the model part also times transformers where PyTorch is installed.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import os
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.synthetic import synthetic_tree, thresholds_for
from benchmarks.timing import interleaved, machine
from squeezejax import SqueezeConfig, build_tree, calibrate, log_thresholds
from squeezejax.models import Llama, LlamaConfig
from squeezejax.online.attention import attend_user
from squeezejax.online.fallback import dense_if_cheaper
from squeezejax.pallas_kernels.interface import Own, Reading
from squeezejax.pallas_kernels.layout import split_heads, to_lanes
from squeezejax.pallas_kernels.xla.backend import select
from squeezejax.pallas_kernels.xla.lists import cluster_of_rows
from squeezejax.tree import Tree

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
K_ = 1024


@dataclasses.dataclass(frozen=True)
class Step:
    """The operands of one layer's attention for T user tokens over a tree, the last of them real."""

    tree: Tree
    q: jax.Array
    k: jax.Array
    v: jax.Array

    @functools.cached_property
    def start(self):
        return jnp.full(1, self.k.shape[1] - self.q.shape[1], jnp.int32)

    @functools.cached_property
    def lengths(self):
        return jnp.full(1, self.k.shape[1], jnp.int32)

    def squeezed(self, log_T):
        return _attend(self.tree, self.q, self.k, self.v, self.start, self.lengths, log_T)

    def dense(self):
        return _attend(self.tree, self.q, self.k, self.v, self.start, self.lengths, None)

    def kept(self, log_T) -> float:
        return float(self.squeezed(log_T).kept[0])


@jax.jit
def _attend(tree, q, k, v, start, lengths, log_T):
    return attend_user(tree, q, Own(k, v, start, lengths), 0, Reading(log_T))


@jax.jit
def _dense_einsum(tree, q):
    """Head-major einsum over the fixed keys alone: q [1 T N H]."""
    groups = split_heads(q, tree.num_kv_heads)[0]
    scores = jnp.einsum("TKGH,KSH->KTGS", groups, tree.keys[0], preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1).astype(q.dtype)
    return jnp.einsum("KTGS,KSH->TKGH", weights, tree.values[0], preferred_element_type=jnp.float32)


@jax.jit
def _dense_reduce(tree, q):
    """Multiply and reduce over the fixed keys alone, for one token q [1 1 N H]."""
    groups = split_heads(q, tree.num_kv_heads)[0, 0].astype(jnp.float32)
    keys, values = (x[0].astype(jnp.float32)[:, None] for x in (tree.keys, tree.values))
    weights = jax.nn.softmax(jnp.sum(groups[:, :, None] * keys, axis=-1) / math.sqrt(q.shape[-1]), axis=-1)
    return jnp.sum(weights[..., None] * values, axis=2)


def make_step(tree: Tree, T: int, *, room: int = 64, heads: int = HEADS, seed: int = 1) -> Step:
    K, H = tree.num_kv_heads, tree.keys.shape[-1]
    keys = jax.random.split(jax.random.key(seed, impl="unsafe_rbg"), 3)
    rows = max(T, room)
    q = 1.5 * jax.random.normal(keys[0], (1, T, heads, H))
    k, v = (jax.random.normal(key, (1, rows, K, H)) for key in keys[1:])
    return Step(tree, *(x.astype(tree.dtype) for x in (q, k, v)))


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, reads and writes counted, of copying 256 MB."""
    x = jnp.ones(64 * K_ * K_, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / interleaved({"copy": lambda: copy(x)}, rounds)["copy"].median


def attention_bytes(tree: Tree, kept: float) -> float:
    """Bytes that one decode step has to read: kept keys and values, window, centroids."""
    row = 2 * tree.num_kv_heads * tree.keys.shape[-1] * tree.keys.dtype.itemsize
    centroids = sum(level.centroids[0].nbytes for level in tree.levels)
    return (kept * tree.num_keys + tree.window_keys.shape[2]) * row + centroids


def decode(args) -> list[dict]:
    """One token over one layer: squeezed against the best dense formulation."""
    rows = []
    for dtype, size in (
        (jnp.float32, 8 * K_),
        (jnp.float32, 32 * K_),
        (jnp.float32, 128 * K_),
        (jnp.bfloat16, 128 * K_),
    ):
        step = make_step(synthetic_tree(size, dtype=dtype), 1)
        bandwidth = copy_bandwidth(args.rounds)
        for target in (0.1, 0.3):
            log_T = thresholds_for(step.kept, step.tree, target)
            calls = {
                "squeezed": functools.partial(step.squeezed, log_T),
                "chunked": step.dense,
                "reduce": functools.partial(_dense_reduce, step.tree, step.q),
            }
            if dtype == jnp.float32:  # XLA's CPU backend refuses this product in bf16
                calls["einsum"] = functools.partial(_dense_einsum, step.tree, step.q)
            else:
                calls |= _torch_dense(size)
            kept = step.kept(log_T)
            limit = attention_bytes(step.tree, kept) / bandwidth
            rows.append(_versus({"dtype": jnp.dtype(dtype).name, "keys": size, "kept": kept}, calls, args, limit))
    return rows


def _torch_dense(size: int) -> dict:
    """PyTorch's fused attention in bf16 over as many random keys, as a call; empty without PyTorch."""
    return _elsewhere("pytorch", _torch_attention, size)


@functools.cache
def _torch_operands(size: int):
    import torch

    q, keys, values = (torch.randn(1, K, S, HEAD_DIM) for K, S in ((HEADS, 1), (KV_HEADS, size), (KV_HEADS, size)))
    return [x.to(torch.bfloat16) for x in (q, keys, values)]


def _torch_attention(size: int):
    import torch

    # The group's heads as query rows: its fastest form here (grouped heads are repeated in memory by enable_gqa).
    q, keys, values = _torch_operands(size)
    torch.nn.functional.scaled_dot_product_attention(q.view(1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM), keys, values)


def prefill(args) -> list[dict]:
    """A question's tokens over one layer, a selection for every 128 of them."""
    rows = []
    for size in (32 * K_, 128 * K_):
        tree = synthetic_tree(size)
        for T in (16, 128, 1024):
            step = make_step(tree, T)
            # Selections are of 128 tokens at most, so a first block of them finds the threshold.
            log_T = thresholds_for(make_step(tree, min(T, 128)).kept, tree, 0.1, steps=12)
            calls = {"squeezed": functools.partial(step.squeezed, log_T), "chunked": step.dense}
            if T * HEADS * size * 4 < 2**31:  # else its scores alone are gigabytes
                calls["einsum"] = functools.partial(_dense_einsum, step.tree, step.q)
            rows.append(_versus({"keys": size, "user tokens": T, "kept": step.kept(log_T)}, calls, args))
    return rows


def look_up(args) -> list[dict]:
    """Only finding the clusters to keep (5 % of keys), by levels of the hierarchy."""
    rows = []
    depths = {1: (0.05,), 2: (0.002, 0.05), 3: (0.0002, 0.004, 0.05)}
    for size in (8 * K_, 32 * K_, 128 * K_, 512 * K_, 1024 * K_):
        calls, read = {}, {}
        for depth, fractions in depths.items():
            tree = synthetic_tree(size, num_kv_heads=4, fractions=fractions, window=0)
            tree = dataclasses.replace(tree, keys=tree.keys[..., :0, :], values=tree.values[..., :0, :])
            q = make_step(tree, 1, heads=16).q
            rows = to_lanes(split_heads(q, 4))
            share = lambda log_T, tree=tree, rows=rows, size=size: _find(tree, rows, log_T).num_rows.mean() / size
            log_T = thresholds_for(share, tree, 0.05)
            calls[f"{depth} levels"] = functools.partial(_find, tree, rows, log_T)
            read[f"{depth} levels"] = _centroids_read(tree, rows, log_T)
        timings = interleaved(calls, args.rounds)
        row = {"keys": size}
        for name, timing in timings.items():
            row |= {f"{name} ms": 1e3 * timing.median, f"{name} MB": read[name] / 1e6}
            row |= {f"{name} against 1": timings["1 levels"].ratio(timing)}
        rows.append(row)
    return rows


@jax.jit
def _find(tree: Tree, rows, log_T):
    """What rows [1 K G H] of one token keep, without reading any of it."""
    G = rows.shape[2]
    found = select(tree, rows, jnp.ones((1, G), bool), G, 0, Reading(log_T))
    return found._replace(rest=())


def _centroids_read(tree: Tree, rows, log_T) -> float:
    """Bytes of centroids that the look-up reads: the coarsest level, and below it children of kept clusters."""
    row = 4 * rows.shape[-1]
    total = tree.levels[0].counts[0].size * row
    for depth, level in enumerate(tree.levels[:-1], 1):
        above = dataclasses.replace(tree, levels=tree.levels[:depth])
        clusters = _find(above, rows, log_T[:depth]).clusters[0]
        total += int(jnp.sum(jnp.where(clusters, level.child_counts[0], 0))) * row
    return float(total)


def _versus(row: dict, calls: dict, args, limit: float | None = None) -> dict:
    """Squeezed against the fastest of the other calls."""
    timings = interleaved(calls, args.rounds)
    ours = timings.pop("squeezed")
    best = min(timings, key=lambda name: timings[name].median)
    row |= {"squeezed ms": 1e3 * ours.median, "spread": ours.spread, "best dense": best}
    row |= {"dense ms": 1e3 * timings[best].median, "times": timings[best].ratio(ours)}
    if limit:
        row["of byte limit"] = limit / ours.median
    return row


def index(args) -> list[dict]:
    """One token over one layer at sparsity 0.9, by index: the paper's in one level, and the default with and without
    codes of keys, all over the same clusters."""
    rows = []
    kinds = {
        "paper's": SqueezeConfig.paper(cluster_fractions=(0.05,), observation_window=0),
        "clusters": SqueezeConfig(cluster_fractions=(0.05,), sinks=0, observation_window=0, key_bits=0),
        "codes": SqueezeConfig(cluster_fractions=(0.05,), sinks=0, observation_window=0),
    }
    queries = 1.5 * jax.random.normal(jax.random.key(2), (1, HEADS, 16, HEAD_DIM))
    for size in (8 * K_, 32 * K_, 128 * K_):
        plain = synthetic_tree(size, window=0)
        fine = plain.levels[0]
        of_head = jax.vmap(functools.partial(cluster_of_rows, num_rows=size))
        labels = (of_head(fine.starts[0], fine.counts[0])[None].astype(jnp.int32),)
        calls, kept = {}, {}
        for name, config in kinds.items():
            tree = calibrate(build_tree(plain.keys, plain.values, config, labels=labels), queries)
            step, log_T = make_step(tree, 1), log_thresholds(tree, 0.9)
            calls[name], kept[name] = functools.partial(step.squeezed, log_T), step.kept(log_T)
        step = make_step(plain, 1)
        dense = {"chunked": step.dense, "reduce": functools.partial(_dense_reduce, step.tree, step.q)}
        timings = interleaved(calls | dense, args.rounds)
        best = min(dense, key=lambda name: timings[name].median)
        row = {"keys": size, "dense ms": 1e3 * timings[best].median}
        for name in kinds:
            row |= {f"{name} kept": kept[name], f"{name} ms": 1e3 * timings[name].median}
            row |= {f"{name} times": timings[best].ratio(timings[name])}
        rows.append(row)
    return rows


def auto(args) -> list[dict]:
    """implementation=None against dense: the rule that falls back must never lose much."""
    rows = []
    for size in (512, 2 * K_, 8 * K_, 32 * K_, 128 * K_):
        step = make_step(synthetic_tree(size), 1)
        for sparsity in (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
            log_T = thresholds_for(step.kept, step.tree, 1 - sparsity) if sparsity else jnp.full(1, -jnp.inf)
            log_T = dense_if_cheaper(step.tree, jnp.float32(sparsity), log_T)
            calls = {"squeezed": functools.partial(step.squeezed, log_T), "chunked": step.dense}
            row = {"keys": size, "sparsity": sparsity, "fell back": bool(log_T[-1] == -jnp.inf)}
            rows.append(_versus(row, calls, argparse.Namespace(rounds=3 * args.rounds)))
    return rows


MODEL = LlamaConfig(
    vocab_size=8192,
    model_dim=1024,
    mlp_dim=2816,
    num_layers=4,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    tie_embeddings=True,
)


def model(args) -> list[dict]:
    """Tokens a second of generate, dense_generate and transformers' generate with a cache: 16 tokens in, 32 out."""
    import squeezejax

    params = jax.jit(lambda key: Llama(MODEL, key=key))(jax.random.key(0, impl="unsafe_rbg"))
    question, new = jnp.arange(16)[None], 32
    rows = []
    for size in (4 * K_, 16 * K_):
        tree = synthetic_tree(size, num_layers=4, num_kv_heads=4, head_dim=64)
        ask = functools.partial(squeezejax.generate, params, max_new_tokens=new, implementation="xla")

        def at(log_T, tree=tree):
            return dataclasses.replace(
                tree, sparsities=jnp.asarray([0.0, 1.0]), thresholds=jnp.broadcast_to(log_T[:, None], (len(log_T), 2))
            )

        kept = lambda log_T, at=at, ask=ask: float(ask(at(log_T), question, sparsity=0.5).kept_fraction[0])
        log_T = thresholds_for(kept, tree, 0.1, steps=16)
        calls = {
            "squeezed": lambda at=at, ask=ask, log_T=log_T: ask(at(log_T), question, sparsity=0.5),
            "dense_generate": lambda tree=tree: squeezejax.dense_generate(params, tree, question, max_new_tokens=new),
        } | _transformers_decode(size, new)
        timings = interleaved(calls, max(3, args.rounds // 2))
        row = {"keys": size, "kept": kept(log_T)}
        row |= {f"{name} tokens/s": new / timing.median for name, timing in timings.items()}
        ours = timings.pop("squeezed")
        row |= {f"times over {name}": timing.ratio(ours) for name, timing in timings.items()}
        rows.append(row)
    return rows


def _transformers_decode(size: int, new: int) -> dict:
    """transformers' generate from a random cache of `size` tokens, as a call; empty without PyTorch."""
    return _elsewhere("transformers", _transformers_generate, size, new)


def _elsewhere(name: str, function, *args) -> dict:
    """{name: call} of a function of PyTorch's in a process of its own; empty without PyTorch.

    In one process the threads of PyTorch and of XLA spin against each other.
    """
    if importlib.util.find_spec("torch") is None:
        return {}
    os.environ["OMP_WAIT_POLICY"] = "passive"
    pool = multiprocessing.get_context("spawn").Pool(1)
    return {name: functools.partial(pool.apply, function, args)}


@functools.cache
def _transformers_model(size: int):
    import torch
    from transformers import LlamaConfig as TorchConfig
    from transformers import LlamaForCausalLM

    config = TorchConfig(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.model_dim,
        intermediate_size=MODEL.mlp_dim,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_kv_heads,
        max_position_embeddings=32 * K_,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    caches = [torch.randn(2, 1, MODEL.num_kv_heads, size, MODEL.head_dim) for _ in range(MODEL.num_layers)]
    return LlamaForCausalLM(config).eval(), caches


def _transformers_generate(size: int, new: int):
    import torch
    from transformers import DynamicCache

    llama, caches = _transformers_model(size)
    ids = torch.arange(size + 16)[None] % MODEL.vocab_size
    with torch.no_grad():
        cache = DynamicCache(config=llama.config)
        for i, (keys, values) in enumerate(caches):
            cache.update(keys, values, i)
        llama.generate(ids, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False)


PARTS = {part.__name__: part for part in (decode, index, prefill, look_up, auto, model)}


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table; every row has the same columns."""
    show = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([show(x) for x in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved runs that count")
    args = parser.parse_args()
    path = Path(__file__).parent / "results" / f"online-{date.today()}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in args.only:
        rows = PARTS[part](args)
        results[part] = {"machine": machine("jaxlib", "torch", "transformers"), "rows": rows}
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{part}: {PARTS[part].__doc__}\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
