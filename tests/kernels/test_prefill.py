"""The prefill kernels interpreted against float64, from lists of granules to the public `attend`; compiled for an H200.

Each group of checks runs in a process of its own (`python test_prefill.py NAME …`): a kernel with a wrong barrier
hangs, and then ends with its timeout.
"""

import dataclasses
import functools
import importlib.util
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import run_checks, run_python

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

import squeezejax
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.hopper import mosaic, prefill, self_check, sparse_prefill
from squeezejax.pallas_kernels.oracle import prefill as reference_prefill

TOLERANCE = {"bfloat16": 8e-3, "float16": 1e-3}


def random(rng, *shape, dtype="bfloat16"):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def check_attention(counts, M=20, K=2, H=64, L=1, R=256, dtype="bfloat16", config=None, seed=0, masks=None):
    """Random lists, `counts` items a lane, against float64; granules that no lane of a head lists are NaN."""
    rng = np.random.default_rng(seed)
    counts = np.asarray(counts, np.int32)
    U, layer = len(counts), L - 1
    q = random(rng, U, M, H, dtype=dtype)
    keys, values = (np.array(random(rng, L, K, R, H, dtype=dtype)) for _ in range(2))
    granules = np.stack([rng.permutation(R // 8) for _ in range(U)])
    masks = rng.integers(1, 256, granules.shape) if masks is None else np.full(granules.shape, masks)
    items = (granules * 256 + masks).astype(np.int32)
    for k in range(K):
        read = np.zeros((R // 8, 8), bool)
        for u in range(k, U, K):
            read[granules[u, : counts[u]]] = True
        for cache in (keys, values):
            cache[layer, k, ~read.reshape(R)] = np.nan
            cache[:layer] = np.nan
    with mosaic.interpret():
        run = jax.jit(sparse_prefill.attend_items, static_argnames="config")
        out, lse = run(q, keys, values, items, counts, jnp.int32(layer), config=config)
    want, want_lse = reference_prefill.attend_items(q, keys, values, items, counts, layer)
    np.testing.assert_allclose(out, want, atol=TOLERANCE[dtype], rtol=0)
    np.testing.assert_allclose(np.asarray(lse)[counts > 0], want_lse[counts > 0], atol=2e-4, rtol=0)
    assert (np.asarray(lse)[counts == 0] < -1e29).all()


def head_sizes():
    for H in mosaic.HEAD_DIMS:
        check_attention([19, 0], H=H, L=2, dtype="float16" if H == 64 else "bfloat16")
    with pytest.raises(NotImplementedError, match="head sizes"):
        prefill.check(jnp.zeros((1, 2, 4, 80), jnp.bfloat16), jnp.zeros((1, 2, 8, 80), jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        prefill.check(jnp.zeros((1, 2, 4, 64)), jnp.zeros((1, 2, 8, 64)))


def uneven():
    check_attention([0, 32, 1, 0, 17, 5])  # empty lanes first and between
    check_attention([0, 0])  # nothing at all
    check_attention([1], K=1, masks=1)  # one key, more CTAs than work
    check_attention([32, 32, 31], K=1, M=130, masks=255)  # everything kept; rows past 128 are a unit of their own


def deep():
    """Rings that wrap again and again: 30 tiles a CTA, lanes of very different length, probabilities of every kind."""
    for H, keys in ((64, 64), (192, 64)):
        config = dataclasses.replace(sparse_prefill.CONFIGS[H], keys=keys, stages=2)
        check_attention([200, 0, 500, 21], H=H, R=4000, config=config)


def drawn():
    """Hypothesis draws lists, rows and tunings."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attention(data):
        K, granules = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40))
        lanes = K * data.draw(st.integers(1, 3))
        counts = data.draw(st.lists(st.integers(0, granules), min_size=lanes, max_size=lanes))
        config = sparse_prefill.Config(data.draw(st.sampled_from((64, 128))), data.draw(st.integers(1, 3)))
        M = data.draw(st.sampled_from((1, 64, 200)))
        check_attention(counts, M, K, R=8 * granules, config=config, seed=data.draw(st.integers(0, 99)))

    attention()


def lists():
    """Granules and masks name exactly the rows of kept clusters, wherever these lie."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        K, U, C, R = 2, 4, 30, 240
        starts, counts = np.zeros((2, K, C), np.int32)
        for k in range(K):  # runs in any order, with rows between them that are in none, and clusters of no key
            sizes = np.where(rng.random(C) < 0.2, 0, rng.integers(1, 9, C))
            gaps = rng.integers(0, 2, C) * (seed % 2)
            order = rng.permutation(C)
            starts[k, order] = (np.cumsum((sizes + gaps)[order]) - sizes[order]).astype(np.int32)
            counts[k] = sizes
        assert (starts + counts).max() <= R
        kept = rng.random((U, C)) < (0, 0.3, 0.7, 1)[seed]
        owner = jax.vmap(functools.partial(prefill.cluster_of_rows, num_rows=R))(starts, counts)
        items, num_items = jax.jit(prefill.list_granules)(kept, owner)
        for u in range(U):
            listed = np.asarray(items)[u, : num_items[u]]
            want = reference_prefill.kept_rows(kept[u], starts[u % K], counts[u % K])
            np.testing.assert_array_equal(reference_prefill.rows_of(listed), want)
            assert len(set(listed >> 8)) == len(listed)


def make_tree(rng, fractions, block, K=2, G=2, H=64, S=403, W=20, L=2):
    config = squeezejax.SqueezeConfig.paper(cluster_fractions=fractions, observation_window=W, query_block=block)
    clusters = config.num_clusters(S)
    labels = [rng.integers(0, C, (L, K, below)) for C, below in zip(clusters, (*clusters[1:], S), strict=True)]
    for entry, C in zip(labels, clusters, strict=True):
        entry[:, :, :C] = np.arange(C)
    tree = squeezejax.build_tree(random(rng, L, K, S + W, H), random(rng, L, K, S + W, H), config, labels=tuple(labels))
    return squeezejax.calibrate(tree, random(rng, L, K * G, max(W, 4), H))


def check_attend(fractions, lengths, T, block, sparsity=0.6, W=20):
    """The public attend, ragged and in blocks, kernels against plain XLA."""
    rng = np.random.default_rng(T)
    tree = make_tree(rng, fractions, block, W=W)
    B = len(lengths)
    q, k, v = random(rng, B, T, 4, 64), random(rng, B, T + 5, 2, 64), random(rng, B, T + 5, 2, 64)
    arguments = {"layer": 1, "start": jnp.zeros(B, jnp.int32), "lengths": jnp.asarray(lengths), "sparsity": sparsity}
    attend = lambda name: squeezejax.attend(tree, q, k, v, implementation=name, **arguments)
    with mosaic.interpret(), registry.force_mosaic():
        found = attend("mosaic")
    want = attend("xla")
    for user, length in enumerate(lengths):
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a[user, :length], b[user, :length], atol=1e-2, rtol=0)


def attend():
    check_attend((0.2,), [37], T=40, block=16)  # blocks of one user
    check_attend((0.05, 0.2), [18, 21], T=21, block=None, W=0)  # ragged users, one selection each, no window


def self_checked():
    """The check that lets `None` choose the kernel passes with it, and fails where its answer is a little off."""
    self_check.TILES = 2  # rings wrap in `deep`
    with mosaic.interpret():
        self_check.prefill_blocks(64, "bfloat16")
        attend_items = sparse_prefill.attend_items
        sparse_prefill.attend_items = lambda q, *rest: attend_items(q * 1.1, *rest)
        with pytest.raises(ArithmeticError):
            self_check.prefill_blocks(64, "bfloat16")


CHECKS = (("lists", "head_sizes", "uneven"), ("deep",), ("drawn", "attend", "self_checked"))


@pytest.mark.parametrize("checks", CHECKS, ids=" ".join)
def test_interpreted(checks):
    run_checks(__file__, *checks, timeout=500)


COMPILE = """
import json, re
from benchmarks.gpu import compile_kernels, deviceless
import jax, jax.numpy as jnp, squeezejax
from squeezejax.pallas_kernels import registry
case, T = compile_kernels.Case(128, 4, num_keys=32768, fractions=(0.01, 0.05)), 512
tree, shape = compile_kernels.tree_shapes(case), jax.ShapeDtypeStruct
q, own = (shape((1, T, heads, 128), jnp.bfloat16) for heads in (32, 8))
def attend(tree, q, k, v, layer, log_T):
    return squeezejax.attend(tree, q, k, v, layer=layer, log_thresholds=log_T, implementation="mosaic")
with registry.force_mosaic():
    arguments = tree, q, own, own, shape((), jnp.int32), shape((2,), jnp.float32)
    program = deviceless.compile_program(attend, *deviceless.on_device(arguments))
copies = [line for line in program.text.splitlines() if re.search(r" = bf16\\[[0-9,]*32768", line)
          and (" copy(" in line or " dynamic-slice(" in line)]
scores = 4 * 32 * T * tree.levels[-1].counts.shape[2]
print(json.dumps([[kernel.name for kernel in program.kernels], sum(kernel.spilled for kernel in program.kernels),
                  program.temporaries / scores, copies]))
"""


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="compiling for an H200 needs jax[cuda13]")
def test_compiled():
    """A layer's prefill in four blocks: one launch a pass, no scores in memory, no copy of keys or values."""
    run = run_python("-c", COMPILE)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels, spilled, temporaries, copies = json.loads(run.stdout.splitlines()[-1])
    assert kernels == ["score_statistics", "score_sums"] * 2 + ["sparse_prefill", "sparse_prefill_merge"]
    assert spilled == 0
    assert temporaries < 0.35, "of what the scores would take"
    assert not copies


if __name__ == "__main__":
    warnings.simplefilter("error")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for name in sys.argv[1:]:
        globals()[name]()
