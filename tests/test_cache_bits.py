"""Keys and values in 8 bits: rounding, attention over the rounded numbers, files, parts, growth and plans."""

import dataclasses
import functools
import itertools
import re

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import squeezejax
from squeezejax import SqueezeConfig
from squeezejax.models import Llama, LlamaConfig
from squeezejax.online.estimate import add_value_centroids
from squeezejax.pallas_kernels.interface import Own
from squeezejax.pallas_kernels.keys_values import KeysValues, in_8_bits
from squeezejax.pallas_kernels.xla.backend import Xla
from squeezejax.plan import tree_shapes

L, K, G, H, S, W, SINKS = 2, 2, 2, 12, 64, 5, 3
RULES = {
    "codes": SqueezeConfig(cluster_fractions=(0.2,), sinks=SINKS, observation_window=W, query_block=2, cache_bits=8),
    "paper": SqueezeConfig.paper(
        cluster_fractions=(0.1, 0.2), sinks=SINKS, observation_window=W, query_block=2, cache_bits=8
    ),
}
LAYER = 1


def context(dtype=jnp.float32):
    """keys, values [L K sinks+S+W H] whose rows differ much in length, and calibration queries [L N W H]."""
    rng = np.random.default_rng(0)
    keys, values = (
        rng.normal(size=(L, K, SINKS + S + W, H)) * np.exp(rng.normal(size=(L, K, SINKS + S + W, 1))) for _ in range(2)
    )
    return *(jnp.asarray(x, dtype) for x in (keys, values)), jnp.asarray(rng.normal(size=(L, K * G, W, H)), dtype)


@functools.cache
def make(rule="codes", dtype=jnp.float32, bits=8):
    """A calibrated tree."""
    keys, values, queries = context(dtype)
    config = dataclasses.replace(RULES[rule], cache_bits=bits)
    sizes = (*config.num_clusters(S), S)
    labels = [np.broadcast_to(np.arange(below) * 7 % C, (L, K, below)) for C, below in itertools.pairwise(sizes)]
    return squeezejax.calibrate(squeezejax.build_tree(keys, values, config, labels=tuple(labels)), queries)


def meant(tree):
    """keys, values f64[L K R H] that the whole numbers of a tree stand for."""
    pairs = (tree.keys, tree.key_scales), (tree.values, tree.value_scales)
    return [np.asarray(x, np.float64) * np.asarray(scales, np.float64)[..., None] for x, scales in pairs]


def in_floats(tree):
    """The same tree with these numbers in place of whole ones."""
    keys, values = (jnp.asarray(x, jnp.float32) for x in meant(tree))
    config = dataclasses.replace(tree.config, cache_bits=16)
    return dataclasses.replace(tree, keys=keys, values=values, key_scales=None, value_scales=None, config=config)


def tokens(T=3, dtype=jnp.float32):
    """q [2 T N H] and users' own k, v [2 7 K H]."""
    rng = np.random.default_rng(T)
    return [jnp.asarray(rng.normal(size=size), dtype) for size in ((2, T, K * G, H), (2, 7, K, H), (2, 7, K, H))]


# ---- Rounding


def test_a_row_by_hand():
    """The largest number becomes 127 steps, half of it 63 or 64, by how the scale was rounded."""
    rows = jnp.asarray([[2.0, -1.0, 0.0, 0.01], [0.0, 0.0, 0.0, 0.0]])
    step = float(jnp.bfloat16(2 / 127))
    found = in_8_bits(KeysValues(rows, rows / 2))  # a power of two, which changes the scale alone
    np.testing.assert_array_equal(found.keys, [[127, -round(1 / step), 0, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(found.values, found.keys)
    np.testing.assert_array_equal(found.value_scales * 2, found.key_scales)
    chex.assert_type(
        [found.keys, found.values, found.key_scales, found.value_scales], [jnp.int8] * 2 + [jnp.bfloat16] * 2
    )
    np.testing.assert_allclose(found.key_scales.astype(jnp.float32), [step, 0.0])
    np.testing.assert_allclose(found.wide().keys, np.asarray(found.keys) * np.float32([[step], [0.0]]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_no_number_is_off_by_more_than_half_a_step(dtype):
    keys, values, _ = context(dtype)
    found = in_8_bits(KeysValues(keys, values))
    for x, rounded in ((keys, found.wide().keys), (values, found.wide().values)):
        x = np.asarray(x, np.float64)
        largest = np.abs(x).max(axis=-1, keepdims=True)
        # The largest one is cut off where the scale, of 8 bits itself, was rounded down: by up to 1/256.
        assert np.all(
            np.abs(rounded - x) <= largest * (0.5 / 127 * (1 + 2**-8)) + (np.abs(x) == largest) * largest / 256
        )
        assert np.linalg.norm(rounded - x) < 0.006 * np.linalg.norm(x)


# ---- The tree


@pytest.mark.parametrize("rule", RULES)
def test_clusters_are_those_of_the_keys_as_given_and_rows_are_rounded(rule):
    tree, plain = make(rule), make(rule, bits=16)
    chex.assert_trees_all_equal((tree.order, tree.levels, tree.key_codes), (plain.order, plain.levels, plain.key_codes))
    chex.assert_trees_all_equal(tree.cache, in_8_bits(plain.cache))
    chex.assert_trees_all_equal(tree.window, plain.window)
    assert tree.window.key_scales is None


@pytest.mark.parametrize("rule", RULES)
def test_calibration_and_means_read_the_rounded_numbers(rule):
    tree, queries = make(rule), context()[2]
    plain = squeezejax.calibrate(in_floats(tree), queries)
    for name in ("thresholds", "block_thresholds", "denominators", "missed_masses"):
        chex.assert_trees_all_close(getattr(tree, name), getattr(plain, name), atol=1e-5)
    for ours, theirs in zip(add_value_centroids(tree).levels, add_value_centroids(plain).levels, strict=True):
        chex.assert_trees_all_close(ours.value_centroids, theirs.value_centroids, atol=1e-5)
    exact = squeezejax.calibrate(make(rule, bits=16), queries)
    if rule == "codes":  # the test sees the difference
        assert np.max(np.abs(exact.denominators - tree.denominators)) > 1e-4


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_attention_is_exact_over_the_kept_rounded_rows(rule, sparsity):
    """Against float64 sums, block by block of query tokens, as a list and, with sparsity 0, in order."""
    tree = make(rule)
    q, k, v = tokens()
    keys, values = meant(tree)
    # log_thresholds, which never fall back to dense attention
    log_T = squeezejax.log_thresholds(tree, sparsity)
    out, lse = squeezejax.attend(tree, q, k, v, layer=LAYER, log_thresholds=log_T, implementation="xla")
    some = []
    for user, block in np.ndindex(2, 2):
        here = range(2 * block, min(2 * block + 2, 3))
        mask = squeezejax.select(tree, q[user, here[0] : here[-1] + 1], layer=LAYER, log_thresholds=log_T).key_mask(
            tree
        )
        some.append(np.mean(mask))
        for t in here:
            for n in range(K * G):
                head = n // G
                rows = np.asarray(mask)[head][np.asarray(tree.order)[LAYER, head]]
                seen = lambda rows_of, always, own: np.concatenate(
                    [rows_of[LAYER, head][rows], always[LAYER, head], own[user, : 4 + t + 1, head]]  # noqa: B023
                )
                expected, expected_lse = oracle.attention(
                    q[user, t, n], seen(keys, tree.window_keys, k), seen(values, tree.window_values, v)
                )
                np.testing.assert_allclose(out[user, t, n], expected, atol=1e-5, rtol=1e-5)
                np.testing.assert_allclose(lse[user, t, n], expected_lse, atol=1e-5)
    assert (sparsity == 0.5) == (0 < np.mean(some) < 1)


def test_the_loss_is_small():
    """Attention with rounded rows, some of them very long, is within 5 % of that with the rows as given, not equal."""
    q, k, v = tokens()
    outs = [
        squeezejax.attend(make(bits=bits), q, k, v, layer=LAYER, log_thresholds=jnp.full(2, -jnp.inf))[0]
        for bits in (8, 16)
    ]
    error = np.linalg.norm(outs[0] - outs[1]) / np.linalg.norm(outs[1])
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_rows_are_read_in_place(dtype, sparsity):
    """No part of the compiled step widens a layer of the cache, by list or in order, with one query head a key head."""
    rows, heads = 65536, 3
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make(dtype=dtype))
    grow = lambda x: jax.ShapeDtypeStruct((*x.shape[:2], rows, *x.shape[3:]), x.dtype)
    tree = dataclasses.replace(tree, **jax.tree.map(grow, tree.row_arrays()), num_keys=rows)
    q = jax.ShapeDtypeStruct((1, 1, K, 1, H), dtype)
    own = Own(*[jax.ShapeDtypeStruct((1, heads, K, H), dtype)] * 2, *[jax.ShapeDtypeStruct((1,), jnp.int32)] * 2)
    reading = squeezejax.online.reading.reading_of(make(dtype=dtype), sparsity=sparsity, implementation="xla")
    tree = dataclasses.replace(tree, denominators=None)  # of two query heads a key head
    program = jax.jit(Xla().decode).lower(tree, q, own, 1, reading).compile()
    # Arrays with the axes [… R H], by their dtype.
    assert set(re.findall(rf"\b(\w+)\[[\d,]*{rows},{H}\]", program.as_text())) == {"s8"}


# ---- Elsewhere


@pytest.mark.parametrize("rule", RULES)
def test_files(tmp_path, rule):
    tree = dataclasses.replace(make(rule), fingerprint="01234567")
    squeezejax.save(tmp_path / "a", tree)
    loaded = squeezejax.load(tmp_path / "a")
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    chex.assert_trees_all_equal(loaded, tree)
    sizes = []
    for bits in (8, 16):
        squeezejax.save(tmp_path / "b", make(rule, jnp.bfloat16, bits))
        tensors = squeezejax.read_header(tmp_path / "b").tensors
        sizes.append(
            sum(tensors[name].nbytes for name in ("keys", "values", "key_scales", "value_scales") if name in tensors)
        )
    assert sizes[0] * 2 * H == sizes[1] * (H + 2)  # a byte a number, two a row


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_scales": None}, "key_scales"),
        ({"value_scales": jnp.zeros((L, K, S - 1), jnp.bfloat16)}, "value_scales"),
        ({"key_scales": jnp.full((L, K, S), jnp.nan, jnp.bfloat16)}, "keys are not finite"),
        ({"keys": jnp.zeros((L, K, S, H), jnp.float32)}, "keys has dtype"),
        ({"config": dataclasses.replace(RULES["codes"], cache_bits=16)}, "scales"),
    ],
    ids=["no scales", "a row without one", "a scale that is no number", "floating point", "16 bits"],
)
def test_damaged_trees_are_not_saved(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        squeezejax.save(tmp_path / "a", dataclasses.replace(make(), **changes))


def test_flax_serialization():
    tree = make()
    restored = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, tree), flax.serialization.to_bytes(tree))
    chex.assert_trees_all_equal(restored, tree)


@pytest.mark.parametrize("rule", RULES)
def test_parts(rule):
    """Rows and their scales move together."""
    tree, (q, k, v) = make(rule), tokens()
    moved = squeezejax.split_context(tree, 3)
    assert moved.key_scales.shape == moved.order.shape
    attend = functools.partial(squeezejax.attend, q=q, k=k, v=v, layer=LAYER, sparsity=0.5, implementation="xla")
    chex.assert_trees_all_close(attend(moved), attend(tree), atol=1e-5)


def test_squeeze_append_generate_and_explain():
    """What was appended is as it would be in a tree of the model's own numbers, rounded; answers go through."""
    params = oracle.make_model()
    config = SqueezeConfig.paper(cluster_fractions=(0.2,), observation_window=6, kmeans_iterations=1, cache_bits=8)
    ids = np.random.default_rng(0).integers(0, 31, 126)
    trees = {}
    for bits in (8, 16):
        tree = squeezejax.squeeze(params, ids[:66], dataclasses.replace(config, cache_bits=bits))
        trees[bits] = tree, squeezejax.append(params, tree, ids[66:])
    for tree, plain in zip(trees[8], trees[16], strict=True):
        # The first layer reads nothing that is rounded.
        chex.assert_trees_all_equal(tree.layer(0).cache, in_8_bits(plain.layer(0).cache))
        chex.assert_trees_all_equal(tree.layer(0).order, plain.layer(0).order)
    grown = trees[8][1]
    assert grown.dtype == jnp.float32
    question = ids[:5]
    answer = squeezejax.generate(params, grown, question, max_new_tokens=4, sparsity=0.5, implementation="xla")
    same = squeezejax.generate(params, in_floats(grown), question, max_new_tokens=4, sparsity=0.5, implementation="xla")
    np.testing.assert_array_equal(answer.tokens, same.tokens)
    np.testing.assert_allclose(answer.log_probabilities, same.log_probabilities, atol=1e-4)
    from squeezejax.explain.answer import explain

    told = [
        explain(params, tree, question, answer.tokens[0], sparsity=0.5, implementation="xla")
        for tree in (grown, in_floats(grown))
    ]
    np.testing.assert_array_equal(told[0].token_kept, told[1].token_kept)
    np.testing.assert_allclose(told[0].token_attended, told[1].token_attended, atol=1e-5)


def test_plan_counts_what_is_stored():
    model = LlamaConfig(
        vocab_size=10, model_dim=8, mlp_dim=6, num_layers=L, num_heads=K * G, num_kv_heads=K, head_dim=H
    )
    params = jax.eval_shape(lambda: Llama(model, key=jax.random.key(0), dtype="bfloat16"))
    make_plan = lambda bits: squeezejax.plan(params, 1000, SqueezeConfig(cache_bits=bits), sparsity=0.9)
    small, large = make_plan(8), make_plan(16)
    shapes = tree_shapes(params, 1000, SqueezeConfig(cache_bits=8))
    names = ("keys", "values", "key_scales", "value_scales")
    assert small.memory.keys_values == sum(
        getattr(shapes, name).size * getattr(shapes, name).dtype.itemsize for name in names
    )
    assert small.memory.keys_values * 2 * H == large.memory.keys_values * (H + 2)
    assert small.squeezed.keys_values == pytest.approx(large.squeezed.keys_values * (H + 2) / (2 * H), abs=2)
    assert small.memory.state == large.memory.state
    assert small.memory.window == large.memory.window
    assert small.memory.build_peak - small.memory.build_floor == large.memory.build_peak - large.memory.build_floor


def test_other_numbers_of_bits_are_refused():
    for wrong in (4, 32, "8", True):
        with pytest.raises(ValueError, match="cache_bits must be one of 16, 8"):
            SqueezeConfig(cache_bits=wrong)
