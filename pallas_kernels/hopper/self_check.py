"""Whether the kernels compute the right thing on this machine: one small run of each, twice, against float64.

A kernel that hangs cannot be caught here; everything else that a new machine or a new compiler may do wrong can.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.pallas_kernels.hopper import decode, kmeans_assign, prefill, sparse_prefill
from squeezejax.pallas_kernels.oracle import decode as reference_decode
from squeezejax.pallas_kernels.oracle import kmeans as reference_kmeans
from squeezejax.pallas_kernels.oracle import prefill as reference_prefill

CLUSTERS, CHILDREN, MEMBERS = 24, 5, 11  # coarse clusters, children of each, keys of each child
OUT_TOLERANCE, LSE_TOLERANCE, SCORE_TOLERANCE = 2e-2, 2e-3, 1e-4


def decode_step(head_dim: int, group: int, dtype: str):
    """Raises ArithmeticError unless a step over a random two-level tree comes out right, and twice the same."""
    rng = np.random.default_rng(0)
    K, H, C = 2, head_dim, CLUSTERS * CHILDREN
    S = C * MEMBERS
    random = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    coarse = types.SimpleNamespace(
        centroids=random(1, K, CLUSTERS, H), **_runs(K, CLUSTERS, CHILDREN * MEMBERS, ("starts", "counts")),
        **_runs(K, CLUSTERS, CHILDREN, ("child_starts", "child_counts")),
    )  # fmt: skip
    fine = types.SimpleNamespace(
        centroids=random(1, K, C, H), **_runs(K, C, MEMBERS, ("starts", "counts")), child_starts=None, child_counts=None
    )
    q = jnp.asarray(2 * random(1, K, group, H), dtype)
    keys, values = (jnp.asarray(random(1, K, -(-S // 8) * 8, H), dtype) for _ in range(2))
    window, own = (jnp.asarray(random(*shape), dtype) for shape in ((1, K, 20, H), (1, 9, K, H)))
    cache = decode.Cache(keys, values, S, window, window, own, own)
    log_T, found = _thresholds(np.asarray(q, np.float64), coarse, fine)

    row = jnp.full(1, 6, jnp.int32)
    step = decode.Step(jnp.zeros(1, jnp.int32), jnp.asarray(log_T, jnp.float32), row, row + 1)
    attend = jax.jit(lambda q, cache, step: decode.attend_kept(q, cache._replace(num_keys=S), (coarse, fine), step))
    first, second = (jax.device_get(attend(q, cache, step)) for _ in range(2))
    _require(all(map(np.array_equal, first, second)), "two runs differ")
    out, lse, kept = first
    kept_rows = [reference_decode.kept_rows(found[k], fine.starts[0, k], fine.counts[0, k]) for k in range(K)]
    wanted = sum(map(len, kept_rows))
    _require(int(kept[0]) == wanted, f"{kept[0]} keys kept instead of {wanted}")
    for k, rows in enumerate(kept_rows):
        used = [
            np.concatenate([np.asarray(x, np.float64) for x in (fixed[0, k][rows], window[0, k], own[0, :7, k])])
            for fixed in (keys, values)
        ]
        want, want_lse = reference_decode.attend_rows(np.asarray(q[0, k], np.float64), *used)
        _require(np.abs(out[0, k] - want).max() < OUT_TOLERANCE, "outputs are wrong")
        _require(np.abs(lse[0, k] - want_lse).max() < LSE_TOLERANCE, "log-sum-exps are wrong")


def prefill_blocks(head_dim: int, dtype: str):
    """Raises ArithmeticError unless a few blocks select and attend right, and twice the same."""
    block_attention(head_dim, dtype)
    block_selection(head_dim, dtype)


def block_attention(head_dim: int, dtype: str):
    """The same for attention alone, over random lists."""
    rng = np.random.default_rng(0)
    U, M, K, R = 4, 70, 2, 512
    random = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    q, keys, values = random(U, M, head_dim), random(1, K, R, head_dim), random(1, K, R, head_dim)
    granules = np.stack([rng.permutation(R // 8) for _ in range(U)])
    items = (granules * 256 + rng.integers(1, 256, granules.shape)).astype(np.int32)
    counts = np.array([R // 8, 0, 3, 21], np.int32)
    attend = jax.jit(lambda *arguments: sparse_prefill.attend_items(*arguments))
    first, second = (jax.device_get(attend(q, keys, values, items, counts, jnp.int32(0))) for _ in range(2))
    _require(all(map(np.array_equal, first, second)), "two runs differ")
    want, want_lse = reference_prefill.attend_items(*map(np.asarray, (q, keys, values)), items, counts, 0)
    _require(np.abs(first[0] - want).max() < OUT_TOLERANCE, "outputs are wrong")
    _require(np.abs(first[1] - want_lse)[counts > 0].max() < LSE_TOLERANCE, "log-sum-exps are wrong")


def block_selection(head_dim: int, dtype: str):
    """Raises ArithmeticError unless blocks keep the right clusters of a random two-level tree, and twice the same."""
    rng = np.random.default_rng(0)
    K, H, C = 2, head_dim, CLUSTERS * CHILDREN
    random = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    level = lambda counts, parents: types.SimpleNamespace(
        centroids=random(*counts.shape, H),
        counts=counts.astype(np.int32),
        parents=np.broadcast_to(parents, counts.shape),
    )
    counts = rng.integers(0, 2 * MEMBERS, (1, K, C))
    fine = level(counts, np.arange(C, dtype=np.int32) // CHILDREN)
    coarse = level(counts.reshape(1, K, CLUSTERS, CHILDREN).sum(axis=3), np.int32(0))
    q = jnp.asarray(2 * random(2 * K, 150, H), dtype)
    valid = np.arange(150)[None, :] < np.array([[150], [70]])

    def reference(u, levels, log_T):
        of_head = [types.SimpleNamespace(**{name: x[0, u % K] for name, x in vars(x).items()}) for x in levels]
        return reference_prefill.kept_clusters(q[u], valid[u // K], of_head, log_T)[-1]

    log_T = []
    for depth in range(2):
        levels = (coarse, fine)[: depth + 1]
        log_T.append(_in_widest_gap(np.concatenate([reference(u, levels, [*log_T, 0.0])[0] for u in range(len(q))])))
    select = jax.jit(lambda q, log_T: prefill.select(q, valid, (coarse, fine), jnp.int32(0), log_T))
    first, second = (jax.device_get(select(q, jnp.asarray(log_T, jnp.float32))) for _ in range(2))
    _require(np.array_equal(first, second), "two runs differ")
    for u, kept in enumerate(first):
        _require(np.array_equal(kept, reference(u, (coarse, fine), log_T)[1]), "the clusters kept are wrong")
    # A share that equals its threshold is not above it.
    one = level(np.full((1, K, 1), 7), np.int32(0))
    kept = jax.jit(lambda q, log_T: prefill.select(q, valid, (one,), jnp.int32(0), log_T))(
        q, -jnp.log(jnp.full(1, 7.0))
    )
    _require(not kept.any(), "a share equal to its threshold was kept")


def assignment(head_dim: int):
    """Raises ArithmeticError unless the nearest two centres of random rows are right, and twice the same."""
    rng = np.random.default_rng(0)
    rows, centres = (rng.standard_normal((number, head_dim)) for number in (300, 200))
    rows, centres = (jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.bfloat16) for x in (rows, centres))
    nearest = jax.jit(lambda rows, centres: kmeans_assign.nearest(rows, centres, with_second=True))
    first, second = (jax.device_get(nearest(rows, centres)) for _ in range(2))
    _require(all(map(np.array_equal, first, second)), "two runs differ")
    _, best, _, next_best = reference_kmeans.nearest(rows, centres)
    scores = np.asarray(rows, np.float64) @ np.asarray(centres, np.float64).T
    for number, score, want in ((first.labels, first.best, best), (first.fallback, first.second, next_best)):
        chosen = np.take_along_axis(scores, number[:, None], axis=1)[:, 0]
        _require(np.abs(score - want).max() < SCORE_TOLERANCE, "scores are wrong")
        _require((want - chosen).max() < SCORE_TOLERANCE, "centres are wrong")
    _require((first.labels != first.fallback).all(), "one centre is nearest twice")


def _runs(K: int, C: int, length: int, names) -> dict:
    starts = np.broadcast_to(np.arange(C, dtype=np.int32) * length, (1, K, C))
    return dict(zip(names, (starts, np.full((1, K, C), length, np.int32)), strict=True))


def _thresholds(q, coarse, fine):
    """(log T, kept bool[K C]): half of the coarse clusters, half of their children, in the widest gaps near by."""
    log_T, K = [], q.shape[1]
    for depth in range(2):
        heads = [
            [
                types.SimpleNamespace(**{name: None if x is None else x[0, k] for name, x in vars(level).items()})
                for level in (coarse, fine)[: depth + 1]
            ]
            for k in range(K)
        ]
        scores = [reference_decode.descend(q[0, k], heads[k], [*log_T, 0.0])[-1][0] for k in range(K)]
        log_T.append(_in_widest_gap(np.concatenate(scores)))
    return log_T, np.array([score > log_T[-1] for score in scores])


def _in_widest_gap(scores) -> float:
    """A threshold that keeps about half of the scores that are finite, and is near none of them."""
    scores = np.sort(scores[np.isfinite(scores)])
    middle = len(scores) // 2
    at = middle + int(np.argmax(np.diff(scores[middle : middle + 6])))
    return float(scores[at : at + 2].mean())


def _require(condition, message: str):
    if not condition:
        raise ArithmeticError(message)
