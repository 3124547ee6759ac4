"""The decode kernels in interpret mode against float64: run as a program with the name of one check.

A kernel with a wrong barrier hangs, so `test_interpreted.py` runs each check in a process of its own, with a timeout.
"""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import squeezejax
from squeezejax.pallas_kernels import (
    centroid_scores,
    decode,
    dispatch,
    mosaic,
    reference_decode,
    sparse_decode,
    work_list,
)

TOLERANCE = {"bfloat16": 8e-3, "float16": 1e-3}
FEW = sparse_decode.Config(stages=2, num_ctas=3, min_rows=8)


def random_cache(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def check_attention(B=1, K=2, G=4, H=64, L=1, R=256, dtype="bfloat16", counts=None, config=FEW, seed=0, masks=None):
    """Random lists of items, with counts i[B K] of them, against float64; what no item names is NaN."""
    rng = np.random.default_rng(seed)
    q = random_cache(rng, (B, K, G, H), dtype)
    keys, values = (np.array(random_cache(rng, (L, K, R, H), dtype)) for _ in range(2))
    counts = np.asarray(rng.integers(0, R // 8 + 1, (B, K)) if counts is None else counts, np.int32)
    granules = np.stack([[rng.permutation(R // 8) for _ in range(K)] for _ in range(B)])
    masks = rng.integers(1, 256, granules.shape) if masks is None else np.full(granules.shape, masks)
    items = (granules * 256 + masks).astype(np.int32)
    layer = L - 1
    for k in range(K):
        read = np.zeros(R, bool)
        for b in range(B):
            read.reshape(-1, 8)[granules[b, k, : counts[b, k]]] = True
        for cache in (keys, values):
            cache[layer, k, ~read] = np.nan
            cache[:layer] = np.nan
    with mosaic.interpret():
        run = jax.jit(sparse_decode.attend_items, static_argnames="config")
        out, lse = run(q, keys, values, items, counts, jnp.int32(layer), config=config)
    want_out, want_lse = reference_decode.attend_items(q, keys, values, items, counts, layer)
    np.testing.assert_allclose(out, want_out, atol=TOLERANCE[dtype], rtol=0)
    live = counts > 0
    np.testing.assert_allclose(np.asarray(lse)[live], want_lse[live], atol=2e-4, rtol=0)
    assert (np.asarray(lse)[~live] < -1e29).all()


def attention_of_head_sizes():
    for H in sparse_decode.HEAD_DIMS:
        check_attention(H=H, K=1, counts=[[19]])


def attention_of_groups():
    for G, dtype in ((1, "float16"), (2, "bfloat16"), (8, "float16"), (9, "bfloat16"), (16, "float16")):
        check_attention(G=G, dtype=dtype, K=1, counts=[[11]], seed=G)


def attention_of_uneven_lanes():
    check_attention(B=2, K=3, counts=[[32, 0, 1], [0, 17, 5]])  # users, an empty first lane of the second
    check_attention(B=1, K=4, counts=[[0, 0, 0, 30]])
    check_attention(B=1, K=4, counts=[[30, 0, 0, 0]])
    check_attention(B=2, K=2, counts=[[0, 0], [0, 0]])  # nothing at all
    check_attention(B=17, K=2, R=64, counts=np.arange(34).reshape(17, 2) % 9)  # lanes found by halving


def attention_of_extremes():
    check_attention(K=1, counts=[[1]])  # one granule, more CTAs than work
    check_attention(K=1, counts=[[1]], masks=1)  # a single key
    check_attention(K=2, counts=[[32, 32]], masks=255)  # everything kept
    check_attention(K=1, counts=[[3]], config=sparse_decode.Config(stages=3, num_ctas=7, min_rows=8))
    check_attention(K=1, counts=[[32]], config=sparse_decode.Config(stages=4, num_ctas=1, min_rows=64))
    check_attention(
        K=2, counts=[[32, 31]], config=sparse_decode.Config(stages=2, num_ctas=11, min_rows=8, merge_unroll=3)
    )


def attention_of_layers():
    check_attention(L=3, K=2, counts=[[9, 14]])


def attention_dense():
    rng = np.random.default_rng(0)
    for num_rows in (256, 200, 64, 1):
        q = random_cache(rng, (2, 2, 3, 64), "bfloat16")
        keys, values = (np.array(random_cache(rng, (2, 2, 256, 64), "bfloat16")) for _ in range(2))
        keys[:, :, -(-num_rows // 64) * 64 :] = np.nan
        with mosaic.interpret():
            out, lse = decode.attend_all(q, keys, values, num_rows, 1)
        for b, k in np.ndindex(2, 2):
            q64, k64, v64 = (
                np.asarray(x, np.float64) for x in (q[b, k], keys[1, k, :num_rows], values[1, k, :num_rows])
            )
            want = reference_decode.attend_rows(q64, k64, v64)
            np.testing.assert_allclose(out[b, k], want[0], atol=8e-3, rtol=0)
            np.testing.assert_allclose(lse[b, k], want[1], atol=2e-4, rtol=0)


def check_selection(B=1, K=2, G=4, H=64, C=130, L=2, largest=30, quantile=0.8, seed=0, dead=0.1):
    """Scores, marks and work lists of random clusters against float64 and a loop over kept rows."""
    rng = np.random.default_rng(seed)
    q = (3 * rng.standard_normal((B, K, G, H))).astype(np.float32)
    centroids = rng.standard_normal((L, K, C, H)).astype(np.float32)
    sizes = np.where(rng.random((K, C)) < dead, 0, rng.integers(1, largest + 1, (K, C)))
    starts = (np.cumsum(sizes, axis=1) - sizes).astype(np.int32)
    counts = np.where(rng.random((B, K, C)) < dead, 0, sizes).astype(np.int32)  # a user may have more dead ones
    centroids[L - 1][sizes == 0] = 50.0  # however high a dead cluster scores
    layer = L - 1
    scores = np.array(
        [[reference_decode.log_scores(q[b, k], centroids[layer, k], counts[b, k]) for k in range(K)] for b in range(B)]
    )
    finite = np.sort(scores[np.isfinite(scores)])
    at = int(quantile * (len(finite) - 1))
    log_T = np.float32((finite[at] + finite[min(at + 1, len(finite) - 1)]) / 2)
    padded_starts, padded_counts = work_list.pad_clusters(starts), work_list.pad_clusters(counts)
    R = -(-int(sizes.sum(axis=1).max()) // 8) * 8
    with mosaic.interpret():
        kept, chunk_items, chunk_keys = centroid_scores.keep_clusters(
            q, centroids, padded_starts, padded_counts, log_T, jnp.int32(layer)
        )
        items = work_list.list_items(kept, padded_starts, padded_counts, chunk_items, R)
    kept = np.asarray(kept)[:, :, work_list.CHUNK : work_list.CHUNK + C] > 0
    want = reference_decode.keep_clusters(q, centroids, counts, log_T, layer)
    close = np.abs(scores - log_T) < 1e-5 * np.maximum(1, np.abs(scores))
    assert ((kept == want) | close).all(), (kept != want).sum()
    for b, k in np.ndindex(B, K):
        number = int(chunk_items[b, k].sum())
        listed = np.asarray(items)[b, k, :number]
        rows = reference_decode.kept_rows(kept[b, k], starts[k], counts[b, k])
        np.testing.assert_array_equal(np.sort(reference_decode.rows_of(listed)), rows)
        assert int(chunk_keys[b, k].sum()) == rows.size
        chunks = -(-C // work_list.CHUNK)
        assert number <= len(np.unique(rows // 8)) + chunks - 1  # a granule twice only at the border of two chunks


def selection():
    check_selection()
    check_selection(B=2, K=1, G=9, C=70, L=1)
    check_selection(G=1, H=256, C=40)  # fewer clusters than a chunk
    check_selection(K=1, G=16, H=96, C=64, largest=3)  # many clusters to a granule
    check_selection(K=1, C=65, largest=200, quantile=0.0)  # nearly everything kept, long runs


def selection_of_many_clusters():
    check_selection(K=1, G=2, C=4200, L=1, largest=2)  # more chunks than one block of statistics


def random_tree(rng, fractions, K, G, H, S, W, L, dtype):
    config = squeezejax.SqueezeConfig(cluster_fractions=fractions, observation_window=W)
    keys, values = (random_cache(rng, (L, K, S + W, H), dtype) for _ in range(2))
    clusters = config.num_clusters(S)  # labels at random: K-means would take longer to compile than the kernels
    labels = [rng.integers(0, C, (L, K, below)) for C, below in zip(clusters, (*clusters[1:], S), strict=True)]
    for entry, C in zip(labels, clusters, strict=True):
        entry[:, :, :C] = np.arange(C)
    tree = squeezejax.build_tree(keys, values, config, labels=tuple(labels))
    return squeezejax.calibrate(tree, random_cache(rng, (L, K * G, W, H), dtype))


def check_attend(fractions, B=1, K=2, G=2, H=64, S=403, W=20, L=2, dtype="bfloat16", sparsity=0.8, seed=0):
    """The public attend, kernels against plain XLA."""
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, fractions, K, G, H, S, W, L, dtype)
    q = 2 * random_cache(rng, (B, 1, K * G, H), dtype)
    k, v = (random_cache(rng, (B, 5, K, H), dtype) for _ in range(2))
    arguments = {"layer": jnp.int32(L - 1), "sparsity": sparsity}
    with mosaic.interpret(), dispatch.force_mosaic():
        out, lse = squeezejax.attend(tree, q, k, v, implementation="mosaic", **arguments)
    want_out, want_lse = squeezejax.attend(tree, q, k, v, implementation="xla", **arguments)
    np.testing.assert_allclose(out, want_out, atol=TOLERANCE[dtype], rtol=0)
    np.testing.assert_allclose(lse, want_lse, atol=1e-3, rtol=0)


def attend_flat():
    check_attend((0.2,), B=2)
    for sparsity in (0.0, 1.0):
        check_attend((0.2,), sparsity=sparsity)


def attend_hierarchical():
    check_attend((0.08, 0.3), B=2, dtype="float16")


def attend_of_equal_keys():
    """All scores tie with the threshold: only the window is kept, to the last bit (spec.md, traps)."""
    config = squeezejax.SqueezeConfig(cluster_fractions=(0.2,), observation_window=8)
    keys = jnp.ones((1, 2, 400 + 8, 64), jnp.bfloat16)
    values = random_cache(np.random.default_rng(0), keys.shape, "bfloat16")
    labels = (np.tile(np.arange(400) % 80, (1, 2, 1)),)
    tree = squeezejax.build_tree(keys, values, config, labels=labels)
    tree = squeezejax.calibrate(tree, jnp.ones((1, 4, 8, 64), jnp.bfloat16))
    log_T = squeezejax.log_thresholds(tree, 0.5)
    q = jnp.ones((1, 2, 2, 64), jnp.bfloat16)
    with mosaic.interpret():
        found = decode.attend_kept(q, tree.keys, tree.values, tree.levels, jnp.ones(1, bool), 0, log_T)
    assert (np.asarray(found.num_kept) == 0).all()


def inactive_users():
    rng = np.random.default_rng(0)
    tree = random_tree(rng, (0.2,), 2, 2, 64, 403, 8, 1, "bfloat16")
    q = random_cache(rng, (2, 2, 2, 64), "bfloat16")
    with mosaic.interpret():
        found = decode.attend_kept(
            q, tree.keys, tree.values, tree.levels, jnp.array([True, False]), 0, jnp.full(1, -jnp.inf)
        )
    np.testing.assert_array_equal(found.num_kept, [[403, 403], [0, 0]])


def drawn():
    """Hypothesis draws shapes, counts and tunings, within its own time limit."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attention(data):
        B, K = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        R = 8 * data.draw(st.integers(1, 20))
        counts = [[data.draw(st.integers(0, R // 8)) for _ in range(K)] for _ in range(B)]
        config = sparse_decode.Config(
            stages=data.draw(st.integers(2, 4)),
            num_ctas=data.draw(st.integers(1, 5)),
            min_rows=data.draw(st.sampled_from((8, 64))),
        )
        check_attention(
            B, K, data.draw(st.integers(1, 16)), 64, 1, R, "bfloat16", counts, config, data.draw(st.integers(0, 99))
        )

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def selection(data):
        check_selection(
            data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 16)), 64,
            data.draw(st.integers(64, 200)), 1, data.draw(st.integers(1, 50)), data.draw(st.floats(0, 1)),
            data.draw(st.integers(0, 99)), data.draw(st.floats(0, 0.9)),
        )  # fmt: skip

    attention()
    selection()


if __name__ == "__main__":
    warnings.simplefilter("error")
    globals()[sys.argv[1]]()
