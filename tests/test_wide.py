"""The backend for accelerators, on a CPU: the keys and the answers of plain XLA, whatever room they need."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_cache_bits
from test_common_scale import L, make, tokens

import squeezejax
from squeezejax import Estimate, SqueezeConfig
from squeezejax.online.attention import attend_user
from squeezejax.online.reading import reading_of
from squeezejax.online.select import kept_rows
from squeezejax.pallas_kernels import codes, cudnn, registry
from squeezejax.pallas_kernels.interface import Own, Reading
from squeezejax.pallas_kernels.layout import split_heads, to_lanes
from squeezejax.pallas_kernels.wide import attend, backend, select
from squeezejax.pallas_kernels.xla import backend as xla
from squeezejax.pallas_kernels.xla.lists import attend_lists
from squeezejax.pallas_kernels.xla.softmax import partial_attention


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """As on an accelerator."""
    monkeypatch.setattr(attend, "ROOMS", (1.0,))  # a room is a program; `test_whatever_the_room` has more
    with registry.force_wide():
        yield


TREES = {
    "codes": lambda: make(1, 4, 2, calibrated=True).tree,
    "three levels, rows anywhere": lambda: oracle.spread_rows(make(3, 4, 2, calibrated=True).tree),
    "whole clusters, plain": lambda: make(2, 32, 0, calibrated=True).tree,
    "no sinks": lambda: make(1, 8, 1, calibrated=True, sinks=0).tree,
    "paper, flat": lambda: oracle.make_case(clusters=(12,)).tree,
    "8 bits": lambda: test_cache_bits.make("codes"),
    "paper, two levels, 8 bits": lambda: test_cache_bits.make("paper"),
}


@functools.cache
def tree_of(kind):
    return TREES[kind]()


@functools.partial(jax.jit, static_argnames="implementation")
def answer(tree, q, own, sparsity, implementation):
    """Out, lse of `attend`, and the kept fraction."""
    reading = reading_of(tree, sparsity=sparsity, implementation=implementation)
    found = attend_user(tree, q, own, 1, reading)
    return found.out, found.lse, found.kept


def step(tree, *, B=2, T=1, G=2, seed=0):
    """One token each of B users, of whom the second has said nothing before and the third takes no part."""
    H = tree.keys.shape[3]
    q, k, v = (jnp.asarray(x, tree.dtype) for x in tokens(seed, B=B, T=T, G=G, H=H))
    start = jnp.asarray([6, 0, 3])[:B] if T == 1 else jnp.zeros(B, jnp.int32)
    return q, Own(k, v, start, start + jnp.asarray([T, T, 0])[:B])


@functools.partial(jax.jit, static_argnames="implementation")
def mask(tree, q, valid, layer, sparsity, implementation):
    """bool[B K R], the rows that are kept."""
    reading = reading_of(tree, sparsity=sparsity, implementation=implementation)
    rows = to_lanes(split_heads(q, 2))
    if implementation == "wide":
        return select.keep_rows(tree, rows, valid, 2, layer, reading)
    return kept_rows(tree, xla.select(tree, rows, valid, 2, layer, reading), layer)


SPARSITIES = np.float32([0.7, 0.95, 0.0])


@pytest.mark.parametrize("kind", TREES)
def test_same_keys_and_same_attention(kind):
    tree = tree_of(kind)
    q, own = step(tree, B=3)
    want, found = (answer(tree, q, own, SPARSITIES, name) for name in ("xla", "wide"))
    np.testing.assert_array_equal(want[2], found[2])
    assert 0.05 < want[2][0] < 0.9
    for one, other in zip(found[:2], want[:2], strict=True):
        np.testing.assert_allclose(one[:2], other[:2], atol=3e-6)
    valid = jnp.asarray([[True], [False], [True]]) & jnp.ones((1, 2), bool)
    for layer in range(L):
        want, found = (mask(tree, q, valid, layer, SPARSITIES, name) for name in ("xla", "wide"))
        np.testing.assert_array_equal(found, want)
        assert 0 < np.mean(found[0]) < 1
        assert not np.any(found[1])


@pytest.mark.parametrize("rooms", [(1 / 90, 1 / 4, 1.0), (1 / 90,)], ids=str)
def test_whatever_the_room(monkeypatch, rooms):
    """The same keys are attended to in the room that holds them, or by list where none does."""
    monkeypatch.setattr(attend, "ROOMS", rooms)
    if rooms[-1] < 1:  # the largest, which holds everything, would take too much memory
        monkeypatch.setattr(attend, "ROOMS", (*rooms, 1.0))
        monkeypatch.setattr(backend, "MOST_BYTES", attend.room_bytes(attend.rooms(4, 90)[0], 2, 6))
        monkeypatch.setattr(select, "temporaries", lambda *_: 0)
    listed = []
    monkeypatch.setattr(backend, "attend_lists", lambda *of: listed.append(of) or attend_lists(*of))
    jax.clear_caches()
    tree = tree_of("codes")
    q, own = step(tree, seed=1)
    for sparsity in (0.99, 0.6, 0.05, 0.0, 1.0):  # the last two: all keys, and none
        want, found = (answer(tree, q, own, sparsity, name) for name in ("xla", "wide"))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-6), found, want)
    assert bool(listed) == (len(rooms) == 1)
    jax.clear_caches()


def test_kept_rows_in_pieces():
    """By hand: two lanes, one of them with more than a piece, and the places of what they keep."""
    mask = np.zeros((2, 70), bool)
    mask[0, [3, 69]] = True
    mask[1, 2:40] = True
    kept = attend.Kept.of(jnp.asarray(mask))
    np.testing.assert_array_equal(kept.num_rows, [2, 38])
    np.testing.assert_array_equal(kept.num_pieces, [1, 2])
    rows, lane = kept.in_room(5)
    np.testing.assert_array_equal(rows[0], [3, 69, *[-1] * (attend.PIECE - 2)])
    np.testing.assert_array_equal(np.ravel(rows[1:3])[:38], np.arange(2, 40))
    assert np.all(np.ravel(rows[1:])[38:] == -1)
    np.testing.assert_array_equal(lane[:3], [0, 1, 1])
    lists = kept.lists()
    np.testing.assert_array_equal(lists.rows[1, :38], np.arange(2, 40))
    np.testing.assert_array_equal(lists.num_rows, [2, 38])


@pytest.mark.parametrize("R", [1, 2, 63, 64, 1000])
def test_counting(R):
    mask = np.random.default_rng(R).random((3, R)) < 0.4
    kept = attend.Kept.of(jnp.asarray(mask))
    upto = (kept.within + kept.before[:, :, None]).reshape(3, -1)[:, :R]
    np.testing.assert_array_equal(upto, np.cumsum(mask, axis=1))


def test_many_rows_and_half_precision():
    """More query rows than sums are for, in a tree of 16 bits."""
    tree = make(1, 4, 2, calibrated=True, dtype=jnp.bfloat16, G=6).tree
    q, own = step(tree, B=3, G=6)
    for sparsity in (0.0, 0.7):
        want, found = (answer(tree, q, own, sparsity, name) for name in ("xla", "wide"))
        for one, other in zip(found[:2], want[:2], strict=True):
            np.testing.assert_allclose(one[:2], other[:2], atol=2e-2)


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_blocks_of_tokens(sparsity):
    """A question's tokens: every key at once, or what plain XLA selects."""
    tree = make(1, 4, 2, calibrated=True, block=2).tree
    q, own = step(tree, T=5)
    own = own._replace(lengths=jnp.asarray([5, 3]))
    want, found = (answer(tree, q, own, sparsity, name) for name in ("xla", "wide"))
    np.testing.assert_allclose(found[2], want[2])
    np.testing.assert_allclose(found[0][0], want[0][0], atol=3e-6)
    np.testing.assert_allclose(found[0][1, :3], want[0][1, :3], atol=3e-6)


def test_own_tokens_in_pieces_of_a_question(monkeypatch):
    monkeypatch.setattr(backend, "SCORE_BYTES", 4 * 2 * 4 * 7 * 2)  # two tokens of two users at once
    tree = make(1, 4, 2, calibrated=True).tree
    q, own = step(tree, T=5)
    want = xla.Xla().prefill(tree, split_heads(q, 2), own, 1, Reading())
    found = backend.Wide().prefill(tree, split_heads(q, 2), own, 1, Reading())
    np.testing.assert_allclose(found.out, want.out, atol=3e-6)
    np.testing.assert_allclose(found.lse, want.lse, atol=3e-6)


def test_gradients():
    tree = tree_of("codes")
    q, own = step(tree)

    def loss(q, k, v, name):
        out, lse = squeezejax.attend(
            tree, q, k, v, layer=1, start=own.start, lengths=own.lengths, sparsity=0.6, implementation=name
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

    want, found = (jax.grad(loss, (0, 1, 2))(q, own.keys, own.values, name) for name in ("xla", "wide"))
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.abs(other).max() > 1e-2


def test_what_it_leaves_to_others(monkeypatch):
    tree = tree_of("codes")
    q, own = step(tree)
    q = split_heads(q, 2)
    reading = reading_of(tree, sparsity=0.5)
    choose = lambda name, reading: registry.choose(name, "decode", tree, q, own, reading, None).name
    assert reading.implementation == registry.AUTO
    assert choose(registry.AUTO, reading) == "wide"
    estimating = dataclasses.replace(reading, missed_mass=True)
    assert choose(registry.AUTO, estimating) == "xla"
    with pytest.raises(NotImplementedError, match="estimate nothing"):
        choose("wide", estimating)
    monkeypatch.setattr(backend, "MOST_BYTES", 1000)
    assert choose(registry.AUTO, reading) == "xla"
    with pytest.raises(NotImplementedError, match="would take 0 MiB"):
        choose("wide", reading)
    assert reading_of(tree, estimate=Estimate()).implementation == "xla"


def test_a_cpu_does_without():
    registry._wide.forced = False
    assert registry.resolve(None) == "xla"
    with pytest.raises(NotImplementedError, match="is for GPUs and TPUs, and this is a CPU"):
        registry.resolve("wide")


@pytest.mark.parametrize("kind", ["codes", "paper"])
def test_the_same_tokens(kind):
    params = oracle.make_model(num_heads=4, num_kv_heads=2)
    make = SqueezeConfig.paper if kind == "paper" else functools.partial(SqueezeConfig, sinks=3)
    config = make(cluster_fractions=(0.1, 0.3), observation_window=6, sparsity=0.6, query_block=4)
    rng = np.random.default_rng(3)
    tree = oracle.model_tree(params, rng.integers(0, 31, 50), config)
    questions, lengths = rng.integers(0, 31, (2, 5)).astype(np.int32), np.array([5, 3])
    for sparsity in (np.array([0.6, 0.2]), 0.0):
        ask = functools.partial(
            squeezejax.generate, params, tree, questions, lengths=lengths, sparsity=sparsity, max_new_tokens=6
        )
        want, found = ask(implementation="xla"), ask(implementation="wide")
        np.testing.assert_array_equal(found.tokens, want.tokens)
        for name in ("log_probabilities", "kept_fraction", "prefill_kept_fraction"):
            np.testing.assert_allclose(getattr(found, name), getattr(want, name), atol=2e-5)


def test_a_layer_by_the_library():
    """What cuDNN would be asked: heads as a batch."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, 2, 3, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 17, 8)).astype(np.float32)
    found = jax.jit(functools.partial(cudnn.attend_layer, implementation="xla"))(q, k, v)
    rows = lambda x: jnp.broadcast_to(x.swapaxes(0, 1)[None], (2, 17, 2, 8))
    want = partial_attention(q, rows(k), rows(v), jnp.ones((2, 3, 17), bool))
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_sums_over_codes_are_products():
    """The form that a GPU takes of products with few rows."""
    rng = np.random.default_rng(1)
    for bits, H in ((1, 12), (2, 72), (4, 32), (8, 20)):
        levels = rng.integers(0, 2**bits, (3, 17, H))
        packed = codes._pack(jnp.asarray(levels, jnp.uint8), bits)
        rows = rng.normal(size=(3, 4, H)).astype(np.float32)
        exact = np.einsum("UMH,UJH->UMJ", np.float64(rows), levels - (2**bits - 1) / 2)
        np.testing.assert_allclose(codes._dots_by_sums(packed, rows), exact, atol=2e-6 * 2**bits * H)
