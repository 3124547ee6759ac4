"""Attention over kept keys ∪ window ∪ user tokens equals exact attention over exactly the keys that key_mask names."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squeezejax import attend, log_thresholds
from squeezejax.pallas_kernels.xla import dense
from squeezejax.pallas_kernels.xla.dense import attend_cached, causal_attention
from squeezejax.pallas_kernels.xla.softmax import MASKED, merge, partial_attention

IMPLEMENTATIONS = ["xla", None]
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2, jnp.float16: 4e-3}


def check(case, q, k, v, *, tree=None, start=None, lengths=None, log_T=None, layer=1, implementation=None, **options):
    """`attend` against the oracle for every user, with one selection for each block of query tokens."""
    tree = case.tree if tree is None else tree
    cast = lambda x: jnp.asarray(x, case.dtype)
    B, T = q.shape[:2]
    log_T = log_thresholds(tree, options["sparsity"]) if log_T is None else log_T
    # A named implementation never falls back to dense attention; without one only explicit thresholds do not.
    implementation = "xla" if options else implementation
    options = options or {"log_thresholds": jnp.asarray(log_T, jnp.float32)}
    start = np.full(B, k.shape[1] - T, np.int32) if start is None else np.asarray(start, np.int32)
    lengths = np.full(B, k.shape[1], np.int32) if lengths is None else np.asarray(lengths, np.int32)
    options |= {"layer": layer, "start": start, "lengths": lengths, "implementation": implementation}
    out, lse = oracle.attend_jit(tree, cast(q), cast(k), cast(v), **options)
    chex.assert_shape([out, lse], [q.shape, q.shape[:3]])
    chex.assert_type([out, lse], jnp.float32)
    assert np.all(np.isfinite(out))
    block = case.config.query_block or T
    for user in range(B):
        valid = int(np.clip(lengths[user] - start[user], 0, T))
        masks = []
        for first in range(0, valid, block):
            tokens = q[user, first : min(first + block, valid)]
            mask = np.asarray(oracle.mask_jit(tree, cast(tokens), layer, jnp.asarray(log_T, jnp.float32)))
            masks += [mask] * len(tokens)
        expected, expected_lse = oracle.attend(case, layer, q[user, :valid], k[user], v[user], start[user], masks)
        tolerance = TOLERANCE[case.dtype] * (1 + np.abs(case.values).max())
        np.testing.assert_allclose(out[user, :valid], expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(lse[user, :valid], expected_lse, rtol=1e-6, atol=TOLERANCE[case.dtype])
    return out, lse


LEVELS = {1: (10,), 2: (4, 10), 3: (3, 5, 10)}


@functools.cache
def base_case(levels=2, **options):
    return oracle.make_case(seed=20, clusters=LEVELS[levels], **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    levels=st.sampled_from(sorted(LEVELS)),
    seed=st.integers(0, 10**6),
    empty=st.sampled_from([0.0, 0.5, 0.8]),
    scale=st.sampled_from([0.3, 1.0, 8.0]),
    fractions=st.lists(st.floats(0.0, 0.95), min_size=3, max_size=3),
    layer=st.integers(0, 1),
    ragged=st.lists(st.integers(0, 4), min_size=2, max_size=2),
)
def test_attend_equals_the_oracle(implementation, levels, seed, empty, scale, fractions, layer, ragged):
    case = oracle.make_case(seed, clusters=LEVELS[levels], empty=empty, scale=scale)
    q, k, v = oracle.user_tokens(case, seed)
    log_T = oracle.cutting_thresholds(case, layer, q[0], fractions[:levels])
    start = np.array(ragged, np.int32)
    check(
        case, q, k, v, tree=case.uncalibrated, log_T=log_T, layer=layer, implementation=implementation,
        start=start, lengths=start + 3,
    )  # fmt: skip


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_sparsity_reads_the_table(sparsity):
    case = base_case()
    check(case, *oracle.user_tokens(case), sparsity=jnp.float32(sparsity))


@pytest.mark.parametrize("G", [1, 3, 8])
def test_gqa_groups_from_1_to_8(G):
    case = base_case(G=2, K=1, L=1)
    check(case, *oracle.user_tokens(case, G=G, T=2), log_T=[-np.inf, -4.2], layer=0)


@pytest.mark.parametrize(
    "options",
    [
        {"H": 33, "W": 1},
        {"W": 0, "Q": 3},
        {"S": 1, "clusters": (1,)},
        {"S": 10, "clusters": (10,), "empty": 0.0, "L": 1, "K": 5},
        {"scale": 200.0},
    ],
    ids=[
        "odd head size, window of one",
        "no window",
        "one key",
        "one key per cluster, heads > layers",
        "logits of several hundred",
    ],
)
def test_trap(options):
    case = oracle.make_case(seed=21, **{"clusters": (4, 10)} | options)
    q, k, v = oracle.user_tokens(case, T=3, room=12)
    for sparsity in (0.0, 0.6, 1.0):
        check(case, q, k, v, sparsity=jnp.float32(sparsity), layer=case.keys.shape[0] - 1)


def test_trap_no_survivor_leaves_window_and_user_tokens():
    case = base_case()
    q, k, v = oracle.user_tokens(case)
    for log_T in ([0.0, -np.inf], [-np.inf, 0.0], [np.inf, np.inf]):
        check(case, q, k, v, log_T=log_T)


def test_trap_no_window_and_no_survivor_leave_the_token_itself():
    case = oracle.make_case(seed=21, clusters=(4, 10), W=0, Q=3)
    q, k, v = oracle.user_tokens(case, T=3, room=12)
    out, _ = check(case, q, k, v, sparsity=jnp.float32(1.0), start=np.array([0, 0]), lengths=np.array([3, 1]))
    np.testing.assert_allclose(out[:, 0], np.repeat(v[:, 0], 2, axis=1), rtol=1e-6)


def test_trap_user_input_longer_than_the_context_keeps_the_window():
    """The paper's code gives the window a score of 1/T, so that a long question loses it."""
    case = oracle.make_case(seed=22, clusters=(4, 10), S=20, W=4)
    values = case.values.copy()
    values[:, :, -4:] = 1e3
    case = dataclasses.replace(case, values=values)
    q, k, v = oracle.user_tokens(case, T=40, room=40, B=1)
    out, _ = check(case, q, k, v, sparsity=jnp.float32(0.9))
    assert np.abs(out).min(axis=-1).max() > 1


def test_trap_low_precision():
    """Rounded keys, values and weights; scores, sums and results stay float32. Queries may be of another dtype."""
    case = oracle.make_case(seed=23, clusters=(4, 10), dtype=jnp.bfloat16, H=34)
    q, k, v = oracle.user_tokens(case)
    low = check(case, q, k, v, log_T=[-np.inf, -4.2])
    high = oracle.attend_jit(case.tree, q, k, v, layer=1, log_thresholds=jnp.array([-jnp.inf, -4.2]))
    chex.assert_trees_all_close(low, high, atol=2e-2)


def test_blocks_of_query_tokens_share_a_selection():
    case = base_case(query_block=2)
    q, k, v = oracle.user_tokens(case, T=5, room=8)
    check(case, q, k, v, log_T=[-np.inf, -4.15])
    lengths = np.array([8, 6], np.int32)  # the second user's last block holds padding, which must not enter its mean
    check(case, q, k, v, log_T=[-np.inf, -4.15], lengths=lengths)


def test_defaults_of_start_and_lengths():
    """q are the last tokens of a cache without unused room."""
    case = base_case()
    q, k, v = oracle.user_tokens(case, T=3, room=7)
    default = oracle.attend_jit(case.tree, q, k, v, layer=1, log_thresholds=jnp.array([-jnp.inf, -4.2]))
    explicit = check(case, q, k, v, log_T=[-np.inf, -4.2], start=np.array([4, 4]), lengths=np.array([7, 7]))
    chex.assert_trees_all_close(default, explicit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("garbage", [1e4, -1e4])
def test_unused_room_is_not_read(garbage):
    case = base_case()
    q, k, v = oracle.user_tokens(case, T=3, room=7)
    start, lengths = np.array([0, 2], np.int32), np.array([3, 4], np.int32)
    expected, _ = check(case, q, k, v, log_T=[-np.inf, -4.2], start=start, lengths=lengths)
    unused = np.arange(7)[None, :, None, None] >= lengths[:, None, None, None]
    k, v = np.where(unused, np.float32(garbage), k), np.where(unused, np.float32(garbage), v)
    out, _ = check(case, q, k, v, log_T=[-np.inf, -4.2], start=start, lengths=lengths)
    np.testing.assert_array_equal(out[0], expected[0])
    np.testing.assert_array_equal(out[1, :2], expected[1, :2])


def test_padding_queries_enter_no_mean():
    """A user whose tokens 2 and 3 are padding gets for token 1 what it gets alone, whatever the padding holds."""
    case = base_case()
    q, k, v = oracle.user_tokens(case)
    lengths = np.array([1, 3], np.int32)
    q = np.where(np.arange(3)[:, None, None] < lengths[:, None, None, None], q, np.float32(50.0))
    out, lse = check(case, q, k, v, log_T=[-np.inf, -4.2], start=np.zeros(2), lengths=lengths)
    alone = oracle.attend_jit(
        case.tree, q[:1, :1], k[:1, :1], v[:1, :1], layer=1, log_thresholds=jnp.array([-jnp.inf, -4.2])
    )
    chex.assert_trees_all_close((out[:1, :1], lse[:1, :1]), alone, rtol=1e-5, atol=1e-6)


def test_users_do_not_see_each_other():
    case = base_case()
    q, k, v = oracle.user_tokens(case)
    both = check(case, q, k, v, log_T=[-np.inf, -4.2])
    changed = check(case, *(np.concatenate([x[:1], x[1:] + 1]) for x in (q, k, v)), log_T=[-np.inf, -4.2])
    np.testing.assert_array_equal(both[0][0], changed[0][0])
    assert not np.allclose(both[0][1], changed[0][1])


def test_layer_sparsity_start_and_lengths_may_be_traced_and_compile_nothing_again():
    case = base_case()
    q, k, v = oracle.user_tokens(case)
    check(case, q, k, v, sparsity=0.6)  # through a jit of which all of these are arguments
    with oracle.count_compilations() as compiled:
        for layer, p, start in [(0, -1.0, 4), (1, 0.0, 0), (1, 0.6, 2), (0, 1.0, 1), (0, 2.0, 4)]:
            rows = np.array([start, 4], np.int32)
            check(case, q, k, v, sparsity=p, layer=layer, start=rows, lengths=rows + 3)
    assert "jit(attend)" not in compiled


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_without_a_named_implementation_attend_reads_what_select_names(sparsity):
    """Where a cost rule falls back to dense attention, selections say so too."""
    case = base_case()
    q, k, v = oracle.user_tokens(case)
    out, _ = oracle.attend_jit(case.tree, q, k, v, layer=0, sparsity=jnp.float32(sparsity))
    for user in range(2):
        mask = np.asarray(
            oracle.select_jit(case.tree, q[user], layer=0, sparsity=jnp.float32(sparsity)).key_mask(case.tree)
        )
        expected, _ = oracle.attend(case, 0, q[user], k[user], v[user], 4, [mask] * 3)
        np.testing.assert_allclose(out[user], expected, atol=1e-4)
        exact = case.key_mask(0, q[user], np.asarray(log_thresholds(case.tree, sparsity)))[0]
        assert np.all(mask) or np.array_equal(mask, exact)


def test_calls_outside_jit_compile_once():
    """A loop over layers in plain Python must not compile attention again at every call."""
    case = base_case()
    q, k, v = oracle.user_tokens(case)
    attend(case.tree, q, k, v, layer=0, sparsity=0.5)
    with oracle.count_compilations() as compiled:
        attend(case.tree, q, k, v, layer=1, sparsity=0.7)
    assert not compiled


def test_readers_take_rows_where_starts_and_order_say():
    """Padding rows of garbage between clusters in any order: every reader attends to exactly the same keys."""
    case = base_case()
    q, k, v = oracle.user_tokens(case)
    moved = oracle.spread_rows(case.tree)
    for sparsity in (0.0, 0.5, 0.9):
        expected = check(case, q, k, v, sparsity=jnp.float32(sparsity))
        chex.assert_trees_all_close(
            check(case, q, k, v, tree=moved, sparsity=jnp.float32(sparsity)), expected, rtol=1e-5, atol=1e-5
        )


def test_long_contexts_cross_every_chunk():
    """Kept rows of 9,000 keys in 700 clusters, and heads that keep very different numbers of them."""
    case = oracle.make_case(seed=24, clusters=(700,), S=9000, H=2, L=1, K=2, empty=0.1)
    q, k, v = oracle.user_tokens(case, T=1, room=1)
    for log_T in ([-np.inf], [-9.1], [-8.6], [-8.0]):
        check(case, q, k, v, tree=case.uncalibrated, log_T=log_T, layer=0)


def test_by_hand():
    """One head of size 1, scores log 1, log 2 (clusters), log 3 (window), log 4 (user): lse log 10."""
    case = oracle.make_case(clusters=(2,), L=1, K=1, G=1, S=2, W=1, H=1)
    keys = np.log(np.array([1.0, 2.0, 3.0], np.float32))[None, None, :, None]
    values = np.array([10.0, 20.0, 30.0], np.float32)[None, None, :, None]
    case = dataclasses.replace(case, keys=keys, values=values, labels=(np.array([[[0, 1]]]),))
    one, user_key, user_value = (np.full((1, 1, 1, 1), x, np.float32) for x in (1.0, np.log(4.0), 40.0))
    out, lse = attend(case.uncalibrated, one, user_key, user_value, layer=0, log_thresholds=[-np.inf])
    assert (float(out.item()), float(lse.item())) == pytest.approx((30.0, np.log(10.0)), rel=1e-6)
    out, lse = attend(case.uncalibrated, one, user_key, user_value, layer=0, log_thresholds=[np.log(0.5)])
    assert (float(out.item()), float(lse.item())) == pytest.approx((290 / 9, np.log(9.0)), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------------
def test_merged_partials_are_attention_over_the_union():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, 1, 2, 5)).astype(np.float32)
    k, v = (rng.normal(size=(2, 9, 1, 5)).astype(np.float32) for _ in range(2))
    sets = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]])[rng.integers(0, 2, 9)].T.astype(bool)  # two and an empty one
    masks = [np.broadcast_to(s, (2, 3, 9)) for s in sets]
    parts = [partial_attention(q, k, v, mask) for mask in masks]
    assert np.all(parts[2][0] == 0)
    assert np.all(parts[2][1] == np.float32(MASKED))
    whole = partial_attention(q, k, v, np.ones((2, 3, 9), bool))
    chex.assert_trees_all_close(merge(*parts), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("T", [1, 7, 8, 9])
def test_causal_attention_equals_the_oracle(T):
    rng = np.random.default_rng(T)
    q, k, v = (rng.normal(size=(1, T, heads, 5)).astype(np.float32) for heads in (4, 2, 2))
    out = causal_attention(q, k, v, block=4)
    for t in range(T):
        for n in range(4):
            expected, _ = oracle.attention(q[0, t, n], k[0, : t + 1, n // 2], v[0, : t + 1, n // 2])
            np.testing.assert_allclose(out[0, t, n], expected, atol=1e-5)


attend_cached_jit = jax.jit(attend_cached, static_argnames="chunk")


@pytest.mark.parametrize("start", [0, 2, 3, 13])
def test_attend_cached_equals_causal_attention(start):
    """Chunks of keys up to the last one visible; rows beyond hold garbage."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 16, heads, 5)).astype(np.float32) for heads in (4, 2, 2))
    expected = causal_attention(q, k, v)[:, start : start + 3]
    k[:, start + 3 :], v[:, start + 3 :] = 1e3, 1e3
    for chunk in (5, 16):
        out = attend_cached_jit(q[:, start : start + 3], k, v, start, chunk=chunk)
        np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_dense_attention_over_the_tree_reads_valid_rows_once(chunk):
    """The baseline's reader, in chunks that do not divide the rows, over a tree with padding rows."""
    case = base_case()
    tree = oracle.spread_rows(case.tree)
    q = np.random.default_rng(0).normal(size=(2, 2, 3, 6)).astype(np.float32)
    out, lse = dense.attend_all(q, tree.cache, tree.order[1] >= 0, 1, chunk=chunk)
    for b, head, row in np.ndindex(2, 2, 3):
        expected, expected_lse = oracle.attention(q[b, head, row], case.clustered[1, head], case.values[1, head, :60])
        np.testing.assert_allclose(out[b, head, row], expected, atol=1e-5)
        np.testing.assert_allclose(lse[b, head, row], expected_lse, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Manners
# ---------------------------------------------------------------------------------------------------------------------
def test_attention_repeats_bit_for_bit():
    case = base_case()
    q, k, v = oracle.user_tokens(case)
    first, second = (check(case, q, k, v, log_T=[-np.inf, -4.2]) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


Q, KV = np.zeros((2, 3, 4, 6), np.float32), np.zeros((2, 7, 2, 6), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q[0], KV, KV), {}, "B T N H"),
        ((Q[..., :5], KV, KV), {}, "H = 6"),
        ((Q[:, :, :3], KV, KV), {}, "multiple of K = 2"),
        ((Q[:, :0], KV, KV), {}, "no query tokens"),
        ((Q, KV[:, :2], KV[:, :2]), {}, "k and v"),
        ((Q, KV[:1], KV[:1]), {}, "k and v"),
        ((Q, KV, KV[:, :6]), {}, "k and v"),
        ((Q, KV[:, :, :1], KV[:, :, :1]), {}, "k and v"),
        ((Q, KV, KV), {"start": np.zeros(3, np.int32)}, "start"),
        ((Q, KV, KV), {"lengths": np.zeros((2, 1), np.int32)}, "lengths"),
        ((Q, KV, KV), {"sparsity": 0.5, "log_thresholds": np.zeros(2)}, "not both"),
        ((Q, KV, KV), {"log_thresholds": np.zeros(3)}, "one a level"),
        ((Q, KV, KV), {"implementation": "cuda"}, "'xla', 'wide', 'mosaic'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        attend(base_case().tree, *arguments, layer=0, **options)


def test_an_uncalibrated_tree_needs_explicit_thresholds():
    with pytest.raises(ValueError, match=r"squeezejax\.calibrate"):
        attend(base_case().uncalibrated, Q, KV, KV, layer=0)
