"""The rule "variance": building, calibration, selection, attention and estimates against sums in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import CommonScale

import squeezejax
from squeezejax import Estimate, SqueezeConfig
from squeezejax.online.attention import attend_user
from squeezejax.online.reading import reading_of
from squeezejax.pallas_kernels.interface import Own, Reading
from squeezejax.pallas_kernels.xla import common_scale

L, K, G, H, S, W, SINKS = 2, 2, 2, 6, 90, 7, 3
LEVELS = {1: (12,), 2: (4, 12), 3: (3, 6, 12)}
RELIABLE = 2e-5  # float32 scores further than this from a threshold fall on the same side of it as the oracle's


@dataclasses.dataclass(frozen=True)
class Context:
    """Keys and values [L K sinks+S+W H] in their order, and a tree of them."""

    keys: np.ndarray
    values: np.ndarray
    tree: squeezejax.Tree


@functools.cache
def make(levels=1, index_bits=4, key_bits=2, *, calibrated=False, block=128, dtype=jnp.float32, G=G, H=H, sinks=SINKS):
    """A context of random clusters, some of them empty."""
    rng = np.random.default_rng([levels, index_bits, key_bits])
    to_dtype = lambda x: np.asarray(jnp.asarray(x, dtype), np.float32)
    keys = to_dtype(1 + rng.normal(size=(L, K, 1, H)) + rng.normal(size=(L, K, sinks + S + W, H)))
    values = to_dtype(rng.normal(size=keys.shape))
    labels = []
    for C, below in zip(LEVELS[levels], (*LEVELS[levels][1:], S), strict=True):
        used = rng.permutation(C)[: max(1, round(C * 0.8))]
        entry = used[rng.integers(0, len(used), (L, K, below))]
        entry[0, 0, 0] = C - 1
        labels.append(entry)
    config = SqueezeConfig(
        cluster_fractions=tuple((i + 1) / (levels + 1) for i in range(levels)),
        observation_window=W,
        sinks=sinks,
        index_bits=index_bits,
        key_bits=key_bits,
        query_block=block,
    )
    tree = squeezejax.build_tree(jnp.asarray(keys, dtype), jnp.asarray(values, dtype), config, labels=tuple(labels))
    if calibrated:
        tree = squeezejax.calibrate(tree, rng.normal(size=(L, K * G, W, H)).astype(np.float32))
    return Context(keys, values, tree)


def tokens(seed=0, *, B=2, T=3, room=7, G=G, H=H):
    """Random q [B T N H] and users' own k, v [B room K H]."""
    rng = np.random.default_rng([seed, T, B])
    sizes = ((B, T, K * G, H), (B, room, K, H), (B, room, K, H))
    return [rng.normal(size=size).astype(np.float32) for size in sizes]


def heads(q):
    """q [T N H] -> for every key/value head the rows [T·G H], tokens first."""
    G = q.shape[1] // K
    return [np.float64(q[:, head * G : (head + 1) * G]).reshape(-1, q.shape[2]) for head in range(K)]


def cutting(tree, layer, q, fractions):
    """log T f32[…] that cut every level's scores for q [T N H], each where they lie far apart."""
    found = []
    scores = [CommonScale(tree, layer, head).log_A(rows, q.shape[1] // K) for head, rows in enumerate(heads(q))]
    live = [np.concatenate([np.asarray(level.counts[layer, head]) > 0 for head in range(K)]) for level in tree.levels]
    for depth, fraction in enumerate(fractions):
        pool = np.concatenate([of_head[depth] for of_head in scores])
        pool = np.sort(pool[live[depth] if depth < len(live) else np.isfinite(pool)]).astype(np.float64)
        at = int(fraction * (len(pool) - 2))
        near = range(max(0, at - 2), min(len(pool) - 1, at + 3))
        widest = max(near, key=lambda i: pool[i + 1] - pool[i])
        found.append((pool[widest] + pool[widest + 1]) / 2)
    return np.float32(found)


# ---- Building


@pytest.mark.parametrize("bits", [(32, 0), (16, 1), (8, 2), (4, 4)], ids=str)
def test_what_is_stored_is_what_the_description_says(bits):
    """Centroids near the means of their keys, spreads around the rounded ones, codes near what is left of keys."""
    context = make(2, *bits)
    tree, turn = context.tree, oracle.rotation(H)
    within = {32: 1e-6, 16: 2**-8, 8: 0.01, 4: 0.15}[tree.config.index_bits]
    for layer, head in np.ndindex(L, K):
        order = np.asarray(tree.order[layer, head])
        keys = context.keys[layer, head, SINKS : SINKS + S].astype(np.float64)
        for depth, level in enumerate(tree.levels):
            rounded = oracle.rounded_centroids(tree, depth, layer, head)
            if tree.config.index_bits < 16:
                np.testing.assert_allclose(level.offset[layer, head], (keys @ turn.T).mean(axis=0), atol=1e-5)
                assert level.centroids is None
            for c, rows in enumerate(CommonScale(tree, layer, head).rows_of(depth)):
                if not len(rows):
                    continue
                own = keys[order[list(rows)]]
                size = np.abs((own.mean(axis=0) - keys.mean(axis=0)) @ turn.T).max() + np.abs(own.mean(axis=0)).max()
                np.testing.assert_allclose(rounded[c], own.mean(axis=0), atol=within * size * np.sqrt(H))
                spread = np.mean((own - rounded[c]) ** 2)
                np.testing.assert_allclose(float(level.spreads[layer, head, c]), spread, rtol=2**-8, atol=1e-9)
        if tree.config.key_bits:
            residual = (
                oracle.decode(tree.key_codes[layer, head], tree.key_steps[layer, head], tree.config.key_bits, H) @ turn
            )
            for c, rows in enumerate(CommonScale(tree, layer, head).rows_of(1)):
                own = keys[order[list(rows)]] - rounded[c]
                error = np.linalg.norm(residual[list(rows)] - own, axis=1)
                most = {1: 0.85, 2: 0.6, 4: 0.12}[tree.config.key_bits]  # of the length; a row has 6 numbers only
                assert np.all(error <= most * np.linalg.norm(own, axis=1) + 1e-6)


def test_sinks_come_first_of_what_is_always_read():
    context = make()
    always = np.concatenate([context.keys[:, :, :SINKS], context.keys[:, :, SINKS + S :]], axis=2)
    np.testing.assert_array_equal(context.tree.window_keys, always)
    always = np.concatenate([context.values[:, :, :SINKS], context.values[:, :, SINKS + S :]], axis=2)
    np.testing.assert_array_equal(context.tree.window_values, always)
    assert (context.tree.num_keys, context.tree.context_length) == (S, SINKS + S + W)


# ---- Selection


@pytest.mark.parametrize(
    ("levels", "index_bits", "key_bits", "calibrated"),
    [
        (1, 32, 0, False),
        (1, 16, 4, False),
        (1, 4, 2, True),
        (2, 8, 1, False),
        (2, 4, 0, True),
        (2, 4, 2, True),
        (3, 16, 0, False),
        (3, 4, 2, True),
    ],
)
def test_selection_equals_the_oracle(levels, index_bits, key_bits, calibrated):
    tree = make(levels, index_bits, key_bits, calibrated=calibrated).tree
    assert (tree.denominators is not None) == calibrated
    checked = 0
    for seed, T in enumerate((1, 3, 1, 3)):
        q = tokens(seed, B=1, T=T)[0][0]
        for layer in range(L):
            low = 0.25 + 0.1 * seed
            fractions = [low] * levels + [0.5 + 0.1 * seed] * bool(key_bits)
            log_T = cutting(tree, layer, q, fractions)
            mask, gap = oracle.selected_mask(tree, layer, q, log_T)
            if gap < RELIABLE:
                continue
            checked += 1
            assert 0.02 < mask.mean() < 0.95
            np.testing.assert_array_equal(oracle.mask_jit(tree, q, layer, log_T), mask)
            infinite = np.full_like(log_T, -np.inf)
            assert np.all(oracle.mask_jit(tree, q, layer, infinite))
            assert not np.any(oracle.mask_jit(tree, q, layer, -infinite))
    assert checked >= 5


@pytest.mark.parametrize(("G", "H"), [(1, 5), (4, 33), (3, 16)])
def test_groups_and_head_sizes(G, H):
    tree = make(2, calibrated=True, G=G, H=H).tree
    q = tokens(3, B=1, T=2, G=G, H=H)[0][0]
    log_T = cutting(tree, 1, q, (0.2, 0.3, 0.6))
    mask, gap = oracle.selected_mask(tree, 1, q, log_T)
    assert gap > RELIABLE
    assert 0.02 < mask.mean() < 0.95
    np.testing.assert_array_equal(oracle.mask_jit(tree, q, 1, log_T), mask)


@pytest.mark.parametrize("kind", ["spread", 2, 3])
def test_rows_may_lie_anywhere(kind):
    """Padding between clusters, or a tree in parts: the same keys."""
    tree = make(2, calibrated=True).tree
    moved = oracle.spread_rows(tree) if kind == "spread" else squeezejax.split_context(tree, kind)
    assert moved.keys.shape[2] > S
    q = tokens(4, B=1, T=2)[0][0]
    log_T = cutting(tree, 0, q, (0.2, 0.3, 0.6))
    mask, gap = oracle.selected_mask(tree, 0, q, log_T)
    assert gap > RELIABLE
    np.testing.assert_array_equal(oracle.mask_jit(moved, q, 0, log_T), mask)
    arguments = tokens(4, B=1, T=2)
    found, wanted = (oracle.attend_jit(t, *arguments, layer=0, log_thresholds=log_T) for t in (moved, tree))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_long_lists_go_block_by_block():
    """More clusters and candidates than are scored at once, and heads that keep very different numbers of them."""
    rng = np.random.default_rng(0)
    shape = (1, 2, 2600, 4)
    keys = rng.normal(size=shape).astype(np.float32)
    keys[:, 1] *= 0.2
    labels = (rng.integers(0, 1200, (1, 2, 1500)) % 20, rng.integers(0, 1500, (1, 2, 2600)))
    labels[1][..., 0] = 1499
    config = SqueezeConfig(cluster_fractions=(0.1, 0.5), sinks=0, observation_window=0)
    tree = squeezejax.build_tree(keys, keys, config, labels=labels)
    q = rng.normal(size=(2, 4, 4)).astype(np.float32)
    for fractions in ((0.0, 0.0, 0.3), (0.1, 0.2, 0.7)):
        log_T = cutting(tree, 0, q, fractions)
        mask, gap = oracle.selected_mask(tree, 0, q, log_T)
        found = np.asarray(oracle.mask_jit(tree, q, 0, log_T))
        # With thousands of scores some lie within rounding of the threshold.
        assert np.sum(found != mask) <= (2 if gap < RELIABLE else 0)
        assert np.all(found.sum(axis=1) > 0)


def test_thresholds_between_one_token_and_a_window():
    tree = make(2, calibrated=True).tree
    one = squeezejax.log_thresholds(tree, 0.6)
    block = np.asarray(jax.jit(lambda t: reading_of(t, sparsity=0.6, implementation="xla").block_log_T)(tree))
    assert not np.allclose(one, block)
    # By hand: in proportion to the log of the number of tokens.
    reading = Reading(jnp.array([-2.0, -4.0]), jnp.array([-5.0, -1.0]))
    found = reading.log_T_of(jnp.array([1.0, 3.0, 9.0, 20.0, 0.0]), 9)
    np.testing.assert_allclose(found, [[-2, -4], [-3.5, -2.5], [-5, -1], [-5, -1], [-2, -4]], atol=1e-6)
    infinite = Reading(jnp.array([-jnp.inf, jnp.inf, -3.0]), jnp.array([-jnp.inf, jnp.inf, -jnp.inf]))
    np.testing.assert_array_equal(infinite.log_T_of(jnp.array([2.0]), 9)[0], [-np.inf, np.inf, -np.inf])
    assert Reading(jnp.array([-2.0])).log_T_of(jnp.array([5.0]), 9)[0, 0] == -2
    for T in (1, 3, W, W + 3):
        q = tokens(6, B=1, T=T)[0][0]
        share = np.log(min(T, W)) / np.log(W)
        log_T = (1 - share) * np.float64(one) + share * np.float64(block)
        mask, gap = oracle.selected_mask(tree, 1, q, log_T)
        if gap > RELIABLE:
            np.testing.assert_array_equal(
                oracle.select_jit(tree, q, layer=1, sparsity=0.6).key_mask(tree), mask, err_msg=f"{T} tokens"
            )


# ---- Attention


def attention(context, layer, q, k, v, start, masks, rest=None):
    """(out [N H], lse [N]) of one token q [N H] over kept keys, sinks, window and own rows up to `start`."""
    keys, values = (np.float64(x[layer]) for x in (context.keys, context.values))
    always = np.ones(keys.shape[1], bool)
    always[SINKS : SINKS + S] = False
    out, lse = np.zeros(q.shape), np.zeros(len(q))
    for n in range(len(q)):
        head = n // (len(q) // K)
        seen = always.copy()
        seen[SINKS : SINKS + S] = masks[head]
        all_keys = np.concatenate([keys[head][seen], k[: start + 1, head]])
        all_values = np.concatenate([values[head][seen], v[: start + 1, head]])
        out[n], lse[n] = oracle.attention(q[n], all_keys, all_values)
    return out, lse


@pytest.mark.parametrize("options", ["explicit", "sparsity"])
def test_attention_is_exact_over_what_is_kept_and_always_read(options):
    """Ragged users, blocks of two query tokens with selections of their own."""
    context = make(2, calibrated=True, block=2)
    tree = context.tree
    q, k, v = tokens(T=5, room=9)
    start, lengths = np.array([4, 0], np.int32), np.array([9, 3], np.int32)
    layer = 1
    asked = {"sparsity": 0.55}
    if options == "explicit":
        asked = {"log_thresholds": cutting(tree, layer, q[0, :2], (0.1, 0.2, 0.5))}
    out, lse = oracle.attend_jit(tree, q, k, v, layer=layer, start=start, lengths=lengths, **asked)
    for user in range(2):
        valid = lengths[user] - start[user]
        for first in range(0, valid, 2):
            block = slice(first, min(first + 2, valid))
            mask = np.asarray(oracle.select_jit(tree, q[user, block], layer=layer, **asked).key_mask(tree))
            assert 0 < mask.mean() < 1
            for t in range(block.start, block.stop):
                wanted = attention(context, layer, q[user, t], k[user], v[user], start[user] + t, mask)
                np.testing.assert_allclose(out[user, t], wanted[0], atol=1e-5)
                np.testing.assert_allclose(lse[user, t], wanted[1], atol=1e-5)


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 1), (-1.0, 1), (1.0, 0), (2.0, 0), (np.nan, 1)])
def test_ends_of_the_scale_when_traced(sparsity, kept):
    context = make(2, calibrated=True)
    tree, (q, k, v) = context.tree, tokens(B=1, T=1, room=2)
    mask = oracle.select_jit(tree, q[0], layer=0, sparsity=jnp.float32(sparsity)).key_mask(tree)
    assert np.all(np.asarray(mask) == bool(kept))
    out, lse = oracle.attend_jit(tree, q, k, v, layer=0, sparsity=jnp.float32(sparsity))
    wanted = attention(context, 0, q[0, 0], k[0], v[0], 1, np.full((K, S), bool(kept)))
    np.testing.assert_allclose(out[0, 0], wanted[0], atol=1e-5)
    np.testing.assert_allclose(lse[0, 0], wanted[1], atol=1e-5)


# ---- Calibration


@functools.cache
def calibrated_context(levels, key_bits, loss=0.05):
    """A tree whose clusters are of keys near each other, and the queries [L N W H] that calibrated it."""
    rng = np.random.default_rng(levels)
    shape = (2, 2, 300 + 4, 8)
    keys = (rng.normal(size=(2, 2, 12, 8))[:, :, rng.integers(0, 12, shape[2])] + 0.6 * rng.normal(size=shape)).astype(
        np.float32
    )
    fractions = {1: (0.1,), 2: (0.03, 0.1)}[levels]
    config = SqueezeConfig(
        cluster_fractions=fractions, observation_window=0, key_bits=key_bits, coarse_loss=loss, cluster_segment=None
    )
    nearest = lambda x, centres: np.argmin(np.sum((x[:, :, :, None] - centres[:, :, None]) ** 2, axis=-1), axis=-1)
    labels, rows = [], keys[:, :, 4:]  # without the sinks; K-means would take long to compile
    for C in config.num_clusters(300)[::-1]:
        labels.insert(0, nearest(rows, rows[:, :, :C]))
        rows = rows[:, :, :C]
    tree = squeezejax.build_tree(keys, keys, config, labels=tuple(labels))
    queries = 1.5 * rng.normal(size=(2, 4, 24, 8)).astype(np.float32)
    return squeezejax.calibrate(tree, queries), queries


def scores_of(tree, queries):
    """Of every layer, head and query: log A of the row by every level, coarse → fine, [n levels (+ 1)]."""
    found = []
    for layer, head in np.ndindex(2, 2):
        here = CommonScale(tree, layer, head)
        owner = np.zeros((len(tree.levels), tree.keys.shape[2]), int)
        for depth in range(len(tree.levels)):
            for c, rows in enumerate(here.rows_of(depth)):
                owner[depth][list(rows)] = c
        live = np.asarray(tree.order[layer, head]) >= 0
        for t in range(queries.shape[2]):
            log_A = here.log_A(np.float64(queries[layer, 2 * head : 2 * head + 2, t]), 2)
            by_row = [x[owner[depth]] for depth, x in enumerate(log_A[: len(tree.levels)])]
            found.append(np.stack([*by_row, *log_A[len(tree.levels) :]])[:, live].T.astype(np.float64))
    return np.concatenate(found)


def num_kept(tree, q, layer, sparsity):
    return squeezejax.select(tree, q, layer=layer, sparsity=sparsity).num_kept(tree)


@pytest.mark.parametrize(("levels", "key_bits"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_calibration(levels, key_bits):
    """The finest threshold is a quantile, levels above lose what they may, and 1 − p of the keys are kept."""
    tree, queries = calibrated_context(levels, key_bits)
    above = levels - 1 + bool(key_bits)
    scores = scores_of(tree, queries)
    for p in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95):
        log_T = np.float64(squeezejax.log_thresholds(tree, p))
        if not above:
            # In the tail scores lie further apart than that; anywhere between two of them the same keys are kept.
            low, high = (np.quantile(scores[:, -1], p, method=way) for way in ("lower", "higher"))
            assert low - 1e-3 <= log_T[-1] <= high + 1e-3
            if p >= 0.3:
                quantile = np.log(np.quantile(np.exp(scores[:, -1]), p))
                np.testing.assert_allclose(log_T[-1], quantile, atol=1e-3)
        best = scores[:, -1] > log_T[-1]
        for depth in range(above):
            lost = np.mean(scores[best, depth] <= log_T[depth])
            assert lost <= 0.05 * 1.02, (p, depth)
        kept = np.all(scores > log_T[None], axis=1)
        np.testing.assert_allclose(np.mean(kept), 1 - p, atol=1e-2)
        # As the library selects: one query at a time.
        if p == 0.7:
            select = jax.jit(jax.vmap(functools.partial(num_kept, tree), (0, None, None)))
            counts = [select(queries[layer].swapaxes(0, 1)[:, None], layer, p) for layer in range(2)]
            np.testing.assert_allclose(np.mean(counts) / tree.num_keys, np.mean(kept), atol=1e-3)


def test_blocks_of_a_window_keep_what_is_asked_too():
    """Tokens that select together, as many as calibrated: their mean's quantile is another."""
    tree, queries = calibrated_context(1, 2)
    for p in (0.5, 0.8):
        masks = [tree_mask(tree, queries[layer].swapaxes(0, 1), layer, p, 24) for layer in range(2)]
        np.testing.assert_allclose(np.mean(masks), 1 - p, atol=0.02)


def tree_mask(tree, q, layer, sparsity, num_tokens):
    """As `select` has it for a block of as many tokens as calibrated."""
    window = dataclasses.replace(tree, config=dataclasses.replace(tree.config, observation_window=num_tokens))
    return np.asarray(squeezejax.select(window, q, layer=layer, sparsity=sparsity).key_mask(tree))


def test_denominators_are_fitted_by_least_squares():
    tree, queries = calibrated_context(2, 2)
    for layer, head in np.ndindex(2, 2):
        here = CommonScale(tree, layer, head)
        for g in range(2):
            q = np.float64(queries[layer, 2 * head + g])
            x, y = np.float64(here.plain_denominator(q)), np.float64(here.true_denominator(q))
            b = (np.mean((x - x.mean()) * (y - y.mean())) + 0.02) / (np.var(x) + 0.02)
            a = y.mean() - b * x.mean()
            np.testing.assert_allclose(tree.denominators[layer, head, g], [a, b], atol=2e-4)


def test_less_loss_costs_more_candidates():
    few, _ = calibrated_context(2, 2)
    many, _ = calibrated_context(2, 2, 0.01)
    low, high = (np.float64(squeezejax.log_thresholds(tree, 0.8)) for tree in (many, few))
    assert np.all(low[:2] < high[:2])
    assert squeezejax.log_thresholds(calibrated_context(2, 2, 0.0)[0], 0.8)[0] <= low[0]


def test_queries_without_a_window_and_trees_without_sinks_calibrate():
    tree = make(1, calibrated=False, sinks=0).tree
    tree = squeezejax.calibrate(tree, np.random.default_rng(0).normal(size=(L, K * G, 1, H)).astype(np.float32))
    log_T = np.asarray([squeezejax.log_thresholds(tree, p) for p in np.linspace(0.01, 0.99, 50)])
    finite = log_T[np.isfinite(log_T[:, -1])]
    assert len(finite) > 40
    assert np.all(np.diff(finite[:, -1]) >= 0)
    assert np.all(np.isfinite(np.asarray(tree.denominators)))


# ---- What is not read


@jax.jit
def run(tree, q, k, v, layer, start, lengths, log_T, estimate):
    reading = reading_of(tree, log_thresholds=log_T, estimate=estimate, implementation="xla")
    return attend_user(tree, q, Own(k, v, start, lengths), layer, reading)


@pytest.mark.parametrize(("levels", "key_bits"), [(1, 2), (2, 0), (3, 2)])
def test_missed_mass_and_tail_are_those_of_exact_sums(levels, key_bits):
    context = make(levels, 4, key_bits, calibrated=True)
    tree = squeezejax.add_value_centroids(context.tree)
    q, k, v = tokens(T=3)
    start, lengths, layer = np.array([4, 0], np.int32), np.array([7, 2], np.int32), 1
    fractions = [0.2] * levels + [0.6] * bool(key_bits)
    log_T = cutting(tree, layer, q[0], fractions)
    plain, whole = (
        run(tree, q, k, v, jnp.int32(layer), start, lengths, log_T, Estimate(tail=tail)) for tail in (False, True)
    )
    for user in range(2):
        valid = lengths[user] - start[user]
        rows = heads(q[user, :valid])
        selected = [CommonScale(tree, layer, head).select(rows[head], G, log_T) for head in range(K)]
        masks = np.zeros((K, S), bool)
        for head in range(K):
            masks[head][np.asarray(tree.order[layer, head])[selected[head][0]]] = True
        assert min(found[3] for found in selected) > RELIABLE
        missed = []
        for t in range(valid):
            out, lse = attention(context, layer, q[user, t], k[user], v[user], start[user] + t, masks)
            np.testing.assert_allclose(plain.out[user, t], out, atol=1e-5)
            for n in range(K * G):
                head, row = n // G, q[user, t, n].astype(np.float64)[None]
                here = CommonScale(tree, layer, head)
                _, given_up, dropped, _ = selected[head]
                logs, values = [], []
                for depth, lost in enumerate(given_up):
                    scores = here.cluster_scores(depth, row)[0][:, 0]
                    means = np.float64(tree.levels[depth].value_centroids[layer, head])
                    logs += [scores[c] + np.log(len(here.rows_of(depth)[c])) for c in lost]
                    values += [means[c] for c in lost]
                if key_bits:
                    scores = here.key_scores(row)[:, 0]
                    for c, members in enumerate(here.rows_of(levels - 1)):
                        mine = [i for i in members if dropped[i]]
                        logs += [scores[i] for i in mine]
                        values += [np.float64(tree.levels[-1].value_centroids[layer, head, c])] * len(mine)
                weights = np.exp(np.array(logs))
                total = np.exp(lse[n]) + weights.sum()
                missed.append(weights.sum() / total)
                expected = (out[n] * np.exp(lse[n]) + weights @ np.array(values)) / total
                np.testing.assert_allclose(whole.out[user, t, n], expected, atol=2e-5)
                np.testing.assert_allclose(whole.lse[user, t, n], np.log(total), atol=2e-5)
        np.testing.assert_allclose(plain.missed[user], np.mean(missed), rtol=1e-4)
        np.testing.assert_allclose(plain.kept[user], masks.mean(), rtol=1e-6)
        assert 0.005 < np.mean(missed) < 0.9


def test_mass_chooses_whole_clusters():
    tree = make(2, calibrated=True).tree
    q, k, v = tokens(B=1, T=1, room=2)
    start, lengths = np.array([1], np.int32), np.array([2], np.int32)
    found = [
        run(tree, q, k, v, jnp.int32(0), start, lengths, None, Estimate(jnp.float32(mass))) for mass in (0.3, 0.8, 1.0)
    ]
    kept = [float(one.kept[0]) for one in found]
    assert kept[0] < kept[1] < kept[2] == 1
    missed = [float(one.missed[0]) for one in found]
    assert missed[0] > missed[1] > missed[2] == 0


def test_exceeding_a_threshold_is_what_the_mean_says():
    """Rows that take no part, infinite thresholds, and scores far beyond what exp can hold."""
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(size=(4, 50)) * np.array([[1], [30], [1], [900]]), jnp.float32)
    lse = jnp.asarray([3.0, 60.0, 2.0, -5.0], jnp.float32)
    for valid in ([True] * 4, [True, False, True, False], [False] * 4):
        valid = jnp.asarray(valid)
        log_A = common_scale.log_mean(scores.T, lse, valid)
        for log_t in (-np.inf, -8.0, -2.5, 0.0, 200.0, np.inf):
            found = common_scale.exceeds(scores, lse, valid, jnp.float32(log_t))
            near = np.isclose(log_A, log_t, atol=1e-5)
            np.testing.assert_array_equal(np.asarray(found)[~near], np.asarray(log_A > log_t)[~near])
