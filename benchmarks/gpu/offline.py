"""What `benchmarks.gpu_visit` learns of the offline half: K-means on the device, checked, then timed."""

import time

import jax
import jax.numpy as jnp
import numpy as np

import squeezejax
from benchmarks.gpu.trees import compare
from squeezejax.offline.build import build_layer, clustering_of
from squeezejax.pallas_kernels.hopper import kmeans_assign
from squeezejax.pallas_kernels.hopper.mosaic import HEAD_DIMS
from squeezejax.pallas_kernels.oracle import kmeans as reference_kmeans

LAYERS = 32  # of the model that a time is given for: 8 key/value heads of 128, 128K keys, 5 % clusters


def suites() -> dict:
    """name -> what to run, in order of value."""
    return {"time clustering": time_clustering}


def checks() -> dict:
    """name -> what has to be right before any time means something."""
    return {"check assignment": check_assignment}


def unit_rows(rng, *shape):
    x = rng.standard_normal(shape, dtype=np.float32)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.bfloat16)


def check_assignment(dry: bool, seed: int, note):
    """Nearest two centres against float64, and whether two runs agree to the last bit."""
    worst, rng = 0.0, np.random.default_rng(seed)
    for H in HEAD_DIMS[:1] if dry else HEAD_DIMS:
        U, S, C = (1, 200, 140) if dry else (4, 5000, 30 * kmeans_assign.TILE + 7)  # 31 tiles
        rows, centres = unit_rows(rng, U, S, H), unit_rows(rng, U, C, H)
        run = jax.jit(lambda x, c: kmeans_assign.nearest(x, c, with_second=True))
        found, again = (jax.device_get(run(rows, centres)) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True)), f"two runs differ, H {H}"
        for u in range(U):
            scores = np.asarray(rows[u], np.float64) @ np.asarray(centres[u], np.float64).T
            _, best, _, second = reference_kmeans.nearest(rows[u], centres[u])
            for number, score, want in ((found.labels, found.best, best), (found.fallback, found.second, second)):
                chosen = np.take_along_axis(scores, number[u][:, None], axis=1)[:, 0]
                worst = max(worst, np.abs(score[u] - want).max(), (want - chosen).max())
            assert (found.labels[u] != found.fallback[u]).all(), f"one centre twice, H {H}"
        assert worst < 1e-4, f"error {worst}, H {H}"
        note(f"largest error, heads of {H}", float(worst))


def time_clustering(dry: bool, seed: int, note):
    """One layer of the whole hierarchical clustering, seeding to sorted keys; twice, to the same bits."""
    heads, S, H = (1, 400, 64) if dry else (8, 2**17, 128)
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((heads, S // 40, H), dtype=np.float32)
    of = rng.integers(0, S // 40, (heads, S, 1))
    keys = np.take_along_axis(centres, of, axis=1) + 0.6 * rng.standard_normal((heads, S, H), dtype=np.float32)
    keys = jnp.asarray(keys, jnp.bfloat16)
    config = squeezejax.SqueezeConfig.paper(cluster_fractions=(0.05,) if dry else (0.01, 0.05), observation_window=0)
    name = "xla" if dry else "mosaic"  # the interpreter's callbacks cannot be mapped over heads inside jit
    some, centres = unit_rows(rng, 1000, H), unit_rows(rng, S // 20, H)
    nearest = lambda rows, centres: kmeans_assign.nearest(rows, centres).best
    plain = jnp.max(jnp.einsum("sh,ch->sc", some, centres, preferred_element_type=jnp.float32), axis=1)
    compare(note, jax.jit(nearest)(some, centres), plain, 2e-4)
    build = lambda: jax.block_until_ready(
        build_layer(keys, keys, config, jax.random.key(seed), clustering_of(config), name)
    )
    start = time.perf_counter()
    first = build()
    note("first call, with compilation", time.perf_counter() - start)
    times = []
    for _ in range(1 if dry else 3):
        start = time.perf_counter()
        again = build()
        times.append(time.perf_counter() - start)
    same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
    assert same, "two builds differ"
    seconds = float(np.median(times))
    note("a layer", seconds)
    note("32 layers", LAYERS * seconds)
