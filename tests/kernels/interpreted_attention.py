"""The decode attention kernel in interpret mode against float64: run as a program with the name of one check.

A kernel with a wrong barrier hangs, so `test_interpreted.py` runs each check in a process of its own, with a timeout.
"""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.pallas_kernels.hopper import mosaic, sparse_decode
from squeezejax.pallas_kernels.hopper.sources import InOrder, Listed
from squeezejax.pallas_kernels.hopper.step import Step
from squeezejax.pallas_kernels.oracle import decode as reference_decode

TOLERANCE = {"bfloat16": 8e-3, "float16": 1e-3}


def random_cache(rng, *shape, dtype):
    return np.array(jnp.asarray(rng.standard_normal(shape), dtype))


def check(
    counts=((11, 5),), G=4, H=64, L=1, R=256, window=0, room=0, dtype="bfloat16", masks=None, config=None, seed=0,
    listed=True,
):  # fmt: skip
    """Random rows of `counts` i[B K] granules, a window and own rows of random number; granules not read are NaN."""
    rng = np.random.default_rng(seed)
    counts = np.asarray(counts, np.int32)
    B, K = counts.shape
    layer = L - 1
    q = jnp.asarray(rng.standard_normal((B, K, G, H)), dtype)
    granules = np.stack([rng.permutation(R // 8) for _ in range(B * K)])
    chosen = rng.integers(1, 256, granules.shape) if masks is None else np.full(granules.shape, masks)
    kept = np.zeros((B * K, R // 8, 8), bool)
    for u, number in enumerate(counts.reshape(-1)):
        bits = chosen[u, :number, None] >> np.arange(8) & 1
        kept[u, granules[u, :number]] = bits.astype(bool)
    lists = reference_decode.lists_of(kept.reshape(B * K, R), rng)
    keys, values = (random_cache(rng, L, K, R, H, dtype=dtype) for _ in range(2))
    for k in range(K):
        read = np.zeros(R // 8, bool)
        read[[g for b in range(B) for g in granules[b * K + k, : counts[b, k]]]] = True
        for cache in (keys, values):
            cache[:layer] = np.nan
            cache[layer, k].reshape(R // 8, 8, H)[~read] = np.nan
    in_order, rows = [], np.zeros(B, np.int32)
    if window:
        in_order.append(InOrder(*(random_cache(rng, L, K, window, H, dtype=dtype) for _ in range(2)), window))
    if room:
        rows = rng.integers(0, room + 1, B).astype(np.int32)
        own = [random_cache(rng, B, room, K, H, dtype=dtype) for _ in range(2)]
        together = 8 if listed else 64  # rows
        for cache in own:
            for b in range(B):
                cache[b, -(-rows[b] // together) * together :] = np.nan
        in_order.append(InOrder(*own, None))
    step = Step(np.full(1, layer, np.int32), np.zeros(1, np.float32), rows - 1, rows)
    source = Listed(keys, values, lists) if listed else None

    @jax.jit
    def run(q, arrays, source, step):
        sources = tuple(InOrder(*found, one.num_rows) for found, one in zip(arrays, in_order, strict=True))
        listed = source and Listed(*source)
        return sparse_decode.attend(q, sources, listed, step, config=config)

    with mosaic.interpret():
        out, lse = run(q, [one[:2] for one in in_order], source, step)
    want_out, want_lse = reference_decode.attend(q, in_order, source, step)
    np.testing.assert_allclose(out, want_out, atol=TOLERANCE[dtype], rtol=0)
    live = want_lse > -1e29
    np.testing.assert_allclose(np.asarray(lse)[live], want_lse[live], atol=2e-4, rtol=0)
    assert (np.asarray(lse)[~live] < -1e29).all()


def head_sizes():
    for H in mosaic.HEAD_DIMS:
        check([[19]], H=H, window=12, room=9)


def groups():
    for G, dtype in ((1, "float16"), (2, "bfloat16"), (8, "float16"), (9, "bfloat16"), (16, "float16")):
        check([[11]], G=G, dtype=dtype, seed=G)


def uneven_lanes():
    check([[32, 0, 1], [0, 17, 5]])  # users, an empty first lane of the second
    check([[0, 0, 0, 30]])
    check([[30, 0, 0, 0]])
    check([[0, 0], [0, 0]])  # nothing at all
    check(np.arange(64)[None] % 3, R=24)  # as many heads as there may be
    check(np.arange(34).reshape(17, 2) % 9, R=64, room=20)  # lanes found by halving; own tokens of very uneven number


def extremes():
    check([[1]], masks=1)  # a single key, more CTAs than work
    check([[32, 32]], masks=255)  # everything kept
    check([[3]], config=sparse_decode.Config(stages=3, num_ctas=7))
    check([[32]], config=sparse_decode.Config(stages=4, num_ctas=1))
    check([[32, 31]], config=sparse_decode.Config(stages=2, num_ctas=11), window=100, room=130)


def windows():
    """Rows in order beside listed ones: heads that begin inside a granule, later layers, rows of every number."""
    check([[9, 0, 4]], L=3, window=101, room=70)
    check([[0], [0]], window=3)
    check([[2], [0]], window=64, room=64, dtype="float16")


def in_order_only():
    check([[0, 0, 0]], G=3, L=2, window=200, room=64, listed=False)
    check([[0], [0]], window=77, room=1, listed=False)


def deep():
    """Rings that wrap again and again: 30 tiles a CTA, lanes of very different length."""
    check([[190, 3], [0, 70]], R=1600, config=sparse_decode.Config(stages=3, num_ctas=1), window=20, room=9)


def drawn():
    """Hypothesis draws shapes, counts and tunings, within its own time limit."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attention(data):
        B, K = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        R = 8 * data.draw(st.integers(1, 20))
        counts = [[data.draw(st.integers(0, R // 8)) for _ in range(K)] for _ in range(B)]
        config = sparse_decode.Config(stages=data.draw(st.integers(2, 4)), num_ctas=data.draw(st.integers(1, 5)))
        check(
            counts, G=data.draw(st.integers(1, 16)), L=data.draw(st.integers(1, 2)), R=R,
            window=data.draw(st.integers(0, 90)), room=data.draw(st.integers(0, 90)), config=config,
            seed=data.draw(st.integers(0, 99)),
        )  # fmt: skip

    attention()


if __name__ == "__main__":
    warnings.simplefilter("error")
    globals()[sys.argv[1]]()
