"""The public `attend` for one token a user, its kernels interpreted, against plain XLA: a program, a check a name."""

import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import squeezejax
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.hopper import decode, mosaic, self_check
from squeezejax.pallas_kernels.oracle import decode as reference_decode

TOLERANCE = {"bfloat16": 8e-3, "float16": 1e-3}


def random_cache(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def random_tree(rng, fractions, K, G, H, S, W, L, dtype, ours=False):
    make = squeezejax.SqueezeConfig if ours else squeezejax.SqueezeConfig.paper
    config = make(cluster_fractions=fractions, observation_window=W)
    keys, values = (random_cache(rng, (L, K, S + config.always_read, H), dtype) for _ in range(2))
    clusters = config.num_clusters(S)  # labels at random: K-means would take longer to compile than the kernels
    labels = [rng.integers(0, C, (L, K, below)) for C, below in zip(clusters, (*clusters[1:], S), strict=True)]
    for entry, C in zip(labels, clusters, strict=True):
        entry[:, :, :C] = np.arange(C)
    tree = squeezejax.build_tree(keys, values, config, labels=tuple(labels))
    return squeezejax.calibrate(tree, random_cache(rng, (L, K * G, W or 9, H), dtype))


def check(
    fractions, sparsities=(0.8,), B=1, K=2, G=2, H=64, S=403, W=20, L=2, room=5, dtype="bfloat16", seed=0, ours=False
):
    """Kernels and plain XLA, users with tokens of different number, the last of them inactive."""
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, fractions, K, G, H, S, W, L, dtype, ours)
    q = 2 * random_cache(rng, (B, 1, K * G, H), dtype)
    k, v = (random_cache(rng, (B, room, K, H), dtype) for _ in range(2))
    lengths = jnp.asarray(rng.integers(1, room + 1, B), jnp.int32)
    for sparsity in sparsities:
        arguments = {"layer": jnp.int32(L - 1), "sparsity": sparsity, "start": lengths - 1, "lengths": lengths}
        with mosaic.interpret(), registry.force_mosaic():
            out, lse = squeezejax.attend(tree, q, k, v, implementation="mosaic", **arguments)
        want_out, want_lse = squeezejax.attend(tree, q, k, v, implementation="xla", **arguments)
        np.testing.assert_allclose(out, want_out, atol=TOLERANCE[dtype], rtol=0)
        np.testing.assert_allclose(lse, want_lse, atol=1e-3, rtol=0)


def attend_flat():
    check((0.2,), sparsities=(0.8, 0.0, 1.0), B=2)  # one program: the sparsity is traced


def attend_hierarchical():
    check((0.08, 0.3), B=2, dtype="float16", W=0, room=70)


def attend_default():
    """The default index: codes of centroids and keys, spreads, the sinks' denominator."""
    check((0.1,), sparsities=(0.8, 0.0, 1.0), B=2, ours=True)


def same_keys():
    """By the default index in two levels, exactly the keys that plain XLA keeps; `attend_default` has one level."""
    rng = np.random.default_rng(3)
    tree = random_tree(rng, (0.05, 0.2), 2, 4, 64, 403, 20, 2, "float16", ours=True)
    q = 2 * random_cache(rng, (1, 8, 64), "float16")
    log_T = squeezejax.log_thresholds(tree, 0.7)
    want = squeezejax.select(tree, q, layer=1, log_thresholds=log_T).key_mask(tree)
    with mosaic.interpret():
        step = decode.Step(jnp.ones(1, jnp.int32), log_T, jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32))
        found = decode.select(q.reshape(1, 2, 4, 64), decode.Index.of(tree), step, tree.keys.shape[2])
    for k in range(2):
        rows = reference_decode.rows_of(found.lists, k)
        positions = np.asarray(tree.order)[1, k, rows]
        np.testing.assert_array_equal(np.sort(positions), np.flatnonzero(want[k]))
        assert 0 < len(rows) < 403


def equal_keys():
    """All scores tie with the threshold: only the window is kept, to the last bit (docs/method.md, Numerical traps)."""
    config = squeezejax.SqueezeConfig.paper(cluster_fractions=(0.2,), observation_window=8)
    keys = jnp.ones((1, 2, 400 + 8, 64), jnp.bfloat16)
    values = random_cache(np.random.default_rng(0), keys.shape, "bfloat16")
    labels = (np.tile(np.arange(400) % 80, (1, 2, 1)),)
    tree = squeezejax.build_tree(keys, values, config, labels=labels)
    tree = squeezejax.calibrate(tree, jnp.ones((1, 4, 8, 64), jnp.bfloat16))
    log_T = squeezejax.log_thresholds(tree, 0.5)
    q = jnp.ones((1, 2, 2, 64), jnp.bfloat16)
    with mosaic.interpret():
        step = decode.Step(jnp.zeros(1, jnp.int32), log_T, jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32))
        found = decode.select(q, decode.Index.of(tree), step, tree.keys.shape[2])
    assert (np.asarray(found.num_kept) == 0).all()


def padded_in_the_middle():
    """A tree whose padding rows are not all at the end keeps every key by listing them."""
    rng = np.random.default_rng(0)
    tree = squeezejax.split_context(random_tree(rng, (0.2,), 2, 2, 64, 403, 8, 1, "bfloat16"), 2)
    assert tree.keys.shape[2] >= 403 + 8
    q, k = random_cache(rng, (1, 1, 4, 64), "bfloat16"), random_cache(rng, (1, 8, 2, 64), "bfloat16")
    step = lambda name: squeezejax.attend(tree, q, k, k, layer=0, sparsity=0.0, implementation=name)
    with mosaic.interpret(), registry.force_mosaic():
        out, _ = step("mosaic")
    np.testing.assert_allclose(out, step("xla")[0], atol=TOLERANCE["bfloat16"], rtol=0)


def self_checked():
    """The check that lets `None` choose the kernels passes with them, and fails with wrong ones, cheap to interpret."""
    self_check.TILES, self_check.TIES = 1, 4  # rings wrap in other checks
    everything = lambda q, cache, index, step: (*decode.attend_all(q, cache, step), 0 * step.start)
    select = decode.select
    with mosaic.interpret():
        self_check.decode_step(64, 2, "bfloat16", 4, 2)
        decode.attend_kept = everything
        with pytest.raises(ArithmeticError):
            self_check.attention(64, 2, "bfloat16")
        decode.select = lambda q, *rest: select(q * 1.1, *rest)
        with pytest.raises(ArithmeticError):
            self_check.selection_by_codes(64, 2, "bfloat16", 4, 2)


if __name__ == "__main__":
    warnings.simplefilter("error")
    globals()[sys.argv[1]]()
