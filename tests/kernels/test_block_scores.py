"""Scoring and selection of blocks of query rows, interpreted, against float64; compiled by `test_prefill.py`.

Each group of checks runs in a process of its own (`python test_block_scores.py NAME …`): a kernel with a wrong barrier
hangs, and then ends with its timeout.
"""

import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import run_checks

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

from squeezejax.pallas_kernels.hopper import block_scores, mosaic, prefill
from squeezejax.pallas_kernels.hopper.centroid_tiles import Read, Walk, split
from squeezejax.pallas_kernels.oracle import prefill as reference_prefill

ROWS, CLUSTERS = 256, 256  # of most checks, so that they share their compiled programs


def random_levels(rng, K, H, sizes, num_keys, dead=0.15):
    """[L=1 K C …] of a hierarchy, coarse → fine: clusters of uneven size, some of no key, their centroids NaN."""
    levels, below = [], rng.multinomial(num_keys, np.full(sizes[-1], 1 / sizes[-1]), size=(1, K))
    for depth in reversed(range(len(sizes))):
        C = sizes[depth]
        counts = np.where(rng.random((1, K, C)) < dead, 0, below)
        centroids = rng.standard_normal((1, K, C, H)).astype(np.float32)
        centroids[counts == 0] = np.nan
        parents = np.zeros((1, K, C), np.int32)
        if depth:
            parents = np.sort(rng.integers(0, sizes[depth - 1], (1, K, C)), axis=2).astype(np.int32)
            below = np.zeros((1, K, sizes[depth - 1]), int)
            for k in range(K):
                np.add.at(below[0, k], parents[0, k], counts[0, k])
        levels.insert(0, types.SimpleNamespace(centroids=centroids, counts=counts.astype(np.int32), parents=parents))
    return levels


def of_head(level, k):
    return types.SimpleNamespace(**{name: x[0, k] for name, x in vars(level).items()})


def reference(q, valid, levels, log_T):
    """`reference_prefill.kept_clusters` of every lane."""
    K = levels[0].counts.shape[1]
    return [
        reference_prefill.kept_clusters(lane, valid[u // K], [of_head(level, u % K) for level in levels], log_T)
        for u, lane in enumerate(np.asarray(q, np.float64))
    ]


def thresholds(q, valid, levels, fraction):
    """log T of every level that keeps about `fraction` of what reaches it, in the widest gap near by."""
    log_T = []
    for depth in range(len(levels)):
        found = reference(q, valid, levels[: depth + 1], [*log_T, 0.0])
        scores = np.sort(np.concatenate([lane[-1][0] for lane in found]))
        scores = scores[np.isfinite(scores)]
        if not scores.size:
            return [*log_T, *[0.0] * (len(levels) - depth)]
        at = int((1 - fraction) * (len(scores) - 1))
        near = range(max(0, at - 5), min(len(scores) - 1, at + 6))
        at = max(near, key=lambda i: scores[i + 1] - scores[i]) if near else 0
        middle = float(scores[at : at + 2].mean())
        is_near_one = np.abs(scores - middle).min() < 5e-3  # few scores, or equal ones: nothing is kept
        log_T.append(float(scores[-1]) + 0.1 if is_near_one else middle)
    return log_T


@jax.jit
def select(q, valid, levels, log_T):
    levels = [types.SimpleNamespace(**level) for level in levels]
    return prefill.select(q, valid, levels, jnp.int32(0), log_T)


def check_select(
    sizes, M=40, blocks=2, K=2, H=64, dtype="bfloat16", fraction=0.4, seed=0, scale=2.0, log_T=None, dead=0.15
):
    """Exactly the reference's clusters, in a block with few valid rows as well."""
    rng = np.random.default_rng(seed)
    levels = random_levels(rng, K, H, sizes, 20 * sizes[-1], dead)
    q = jnp.asarray(scale * rng.standard_normal((blocks * K, M, H)), dtype)
    valid = np.arange(M)[None, :] < rng.integers(1, M + 1, blocks)[:, None]
    log_T = thresholds(q, valid, levels, fraction) if log_T is None else log_T
    with mosaic.interpret():
        kept = np.asarray(select(q, valid, [vars(level) for level in levels], jnp.asarray(log_T, jnp.float32)))
    for u, lane in enumerate(reference(q, valid, levels, log_T)):
        np.testing.assert_array_equal(kept[u], lane[-1][1])
    return kept


def sums():
    """What the kernels compute, number by number: centroids' low part, ragged rows, positions that take no part."""
    rng = np.random.default_rng(0)
    for H, dtype, tolerance in ((64, "float16", 1e-5), *((H, "bfloat16", 3e-5) for H in (96, 128, 192, 256))):
        U, M, C = 2, ROWS, 150
        q = jnp.asarray(2 * rng.standard_normal((U, M, H)), dtype)
        weights = np.zeros((U, CLUSTERS), np.float32)
        weights[:, :C] = rng.integers(0, 9, (U, C))
        centroids = rng.standard_normal((U, CLUSTERS, H)).astype(np.float32)
        centroids[weights == 0] = np.nan
        valid = rng.random((U, M)) < 0.8
        with mosaic.interpret():
            read = Read(*split(jnp.asarray(centroids), dtype), jnp.asarray(weights))
            found = np.asarray(jax.jit(block_scores.sum_scores)(q, valid, read, jnp.float32(-6.5)))
        assert found.shape == (U, M // 128, CLUSTERS)
        for u in range(U):
            alive = weights[u] > 0
            scores = np.asarray(q[u], np.float64) @ centroids[u][alive].T / np.sqrt(H)
            shares = np.exp(scores) / (np.exp(scores) @ weights[u][alive])[:, None] / np.exp(-6.5)
            want = np.where(valid[u][:, None], shares, 0).reshape(M // 128, 128, -1).sum(1)
            np.testing.assert_allclose(found[u][:, alive], want, rtol=tolerance)


def deep():
    """Rings that wrap again and again, in both passes: one part of 40 tiles."""
    rng = np.random.default_rng(4)
    U, C = 1, 5120
    q = jnp.asarray(2 * rng.standard_normal((U, 128, 64)), jnp.bfloat16)
    weights = rng.integers(0, 9, (U, C)).astype(np.float32)
    centroids = rng.standard_normal((U, C, 64)).astype(np.float32)
    order = rng.permutation(C // 8).astype(np.int32)[None]
    parts, Walk.parts = Walk.parts, lambda walk, units: 1
    try:
        with mosaic.interpret():
            read = Read(
                *split(jnp.asarray(centroids), q.dtype), jnp.asarray(weights), order, np.full(U, C // 8, np.int32)
            )
            found = np.asarray(block_scores.sum_scores(q, np.ones((U, 128), bool), read, jnp.float32(-9)))
    finally:
        Walk.parts = parts
    rows = (order[0, :, None] * 8 + np.arange(8)).reshape(-1)
    scores = np.exp(np.asarray(q[0], np.float64) @ centroids[0][rows].T / 8)
    want = (scores / (scores @ weights[0])[:, None]).sum(0) * np.exp(9)
    alive = weights[0] > 0
    np.testing.assert_allclose(found[0, 0, alive], want[alive], rtol=3e-5)


def flat():
    check_select((150,))
    assert check_select((150,), log_T=[-np.inf]).any()  # everything with a key
    assert not check_select((150,), log_T=[0.0]).any()  # a share is less than 1
    check_select((150,), scale=60.0)  # logits of several hundred: shares far below the smallest float


def hierarchy():
    check_select((4, 20, 200), M=200, fraction=0.5)  # more rows than a chunk; blocks whose last rows are padding
    assert not check_select((4, 20, 200), M=200, log_T=[-3.0, 0.0, -5.0]).any()  # no survivor


def unread():
    """Below the coarsest level a granule of clusters without a survivor is not read: their centroids may be NaN."""
    rng = np.random.default_rng(3)
    levels = random_levels(rng, 1, 64, (10, 200), 4000, dead=0.0)
    q = jnp.asarray(2 * rng.standard_normal((1, 40, 64)), jnp.bfloat16)
    valid = np.ones((1, 40), bool)
    log_T = thresholds(q, valid, levels, 0.4)
    want = reference(q, valid, levels, log_T)[0]
    alive = want[0][1][levels[1].parents[0, 0]]
    read = np.repeat(alive.reshape(-1, 8).any(axis=1), 8)
    assert not read.all()
    levels[1].centroids[0, 0, ~read] = np.nan
    with mosaic.interpret():
        kept = select(q, valid, [vars(level) for level in levels], jnp.asarray(log_T, jnp.float32))
    np.testing.assert_array_equal(kept[0], want[-1][1])


def ties():
    """A share that equals T is not above it: one cluster, and equal centroids, at the score that calibration gives."""
    rng = np.random.default_rng(1)
    q = jnp.asarray(7 * rng.standard_normal((2, 40, 64)), jnp.bfloat16)
    valid = np.ones((1, 40), bool)
    for C in (1, 150):
        centroids = np.broadcast_to(rng.standard_normal(64).astype(np.float32), (1, 2, C, 64)).copy()
        counts = rng.integers(1, 9, (1, 2, C)).astype(np.int32)
        counts[:] = counts[:, :1]  # of both heads, which share log T
        level = types.SimpleNamespace(centroids=centroids, counts=counts, parents=np.zeros_like(counts))
        log_T = -jnp.log(jnp.float32(counts[0, 0].sum()))[None]
        with mosaic.interpret():
            kept = select(q, valid, [vars(level)], log_T)
            below = select(q, valid, [vars(level)], jnp.nextafter(log_T, jnp.float32(-jnp.inf)) - 1e-5)
        assert not kept.any()
        assert below.all()


def no_row():
    """A block of padding keeps nothing, its neighbours what they would without it."""
    rng = np.random.default_rng(2)
    levels = random_levels(rng, 2, 64, (150,), 3000)
    q = jnp.asarray(2 * rng.standard_normal((4, 40, 64)), jnp.bfloat16)
    valid = np.array([[True] * 40, [False] * 40])
    for log_T in (thresholds(q[:2], valid[:1], levels, 0.4), [-np.inf]):
        with mosaic.interpret():
            kept = select(q, valid, [vars(level) for level in levels], jnp.asarray(log_T, jnp.float32))
        assert not kept[2:].any()
        for u, lane in enumerate(reference(q[:2], valid, levels, log_T)):
            np.testing.assert_array_equal(kept[u], lane[-1][1])


def groups():
    """Blocks that are too many for one launch go in several."""
    most, prefill.MOST_CHUNKS = prefill.MOST_CHUNKS, 4
    try:
        select.clear_cache()
        check_select((150,), blocks=3)
    finally:
        prefill.MOST_CHUNKS = most


def drawn():
    """Hypothesis draws what is kept, which rows are valid, how large scores are and how many clusters have no key."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.floats(0, 1), st.integers(0, 99), st.floats(0.1, 30), st.floats(0, 1))
    def selection(fraction, seed, scale, dead):
        check_select((3, 70), M=60, blocks=2, K=1, fraction=fraction, seed=seed, scale=scale, dead=dead)

    selection()


CHECKS = (("sums", "flat", "ties"), ("hierarchy", "unread"), ("deep",), ("no_row", "groups", "drawn"))


@pytest.mark.parametrize("checks", CHECKS, ids=" ".join)
def test_interpreted(checks):
    run_checks(__file__, *checks, timeout=500)


def test_a_block_by_hand():
    """The reference itself: two clusters of one and three keys, two query rows, shares worked out on paper."""
    level = types.SimpleNamespace(centroids=np.log([[2.0], [1.0]]), counts=np.array([1, 3]), parents=None)
    ((log_A, kept),) = reference_prefill.kept_clusters([[1.0], [0.0]], np.array([True, True]), [level], [np.log(0.3)])
    # Row one: e^s is 2 and 1, Σ n e^s = 5, shares 2/5 and 1/5; row two: 1 and 1, Σ = 4, shares 1/4 and 1/4.
    np.testing.assert_allclose(np.exp(log_A), [(2 / 5 + 1 / 4) / 2, (1 / 5 + 1 / 4) / 2])
    np.testing.assert_array_equal(kept, [True, False])


if __name__ == "__main__":
    warnings.simplefilter("error")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for name in sys.argv[1:]:
        globals()[name]()
