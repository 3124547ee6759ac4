"""Variants of the selection: scores worked by hand, thresholds, and the library's choice where nothing is varied."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from benchmarks.quality import measure, methods, rules, variants
from benchmarks.quality.methods import Cache, Fixed, squeezed
from benchmarks.quality.rules import SCORES, Clusters, rule
from squeezejax import SqueezeConfig, add_value_centroids, calibrate, select

PAPER = {
    name: getattr(SqueezeConfig.paper(), name)
    for name in ("sinks", "score", "cluster_metric", "index_bits", "key_bits")
}


def test_scores_of_two_clusters_by_hand():
    # Cluster 0 holds (1, 0) and (3, 0), cluster 1 only (0, 2); q·k/√2 is the sum of a key's numbers.
    keys, q = jnp.array([[1.0, 0], [3, 0], [0, 2]]), jnp.full((1, 2), np.sqrt(2), jnp.float32)
    values, cluster = jnp.array([[3.0, 4], [3, 4], [0, 1]]), jnp.array([0, 0, 1])
    means = jnp.array([[3.0, 4], [0, 1]])
    clusters = Clusters(jnp.array([[2.0, 0], [0, 2]]), jnp.array([2, 1]), means)
    expected = {
        "centroid": (2, 2),
        "variances": (2.5, 2),  # the first dimension of cluster 0 has variance 1, times q² / H = 1
        "deviation": (3, 2),
        "ball": (2 + np.sqrt(2), 2),  # radius 1, times |q| / √H
        "box": (3, 2),
        "value_norm": (2 + np.log(5), 2),
        "value_gap": (2 + np.log(np.sqrt(2)), 2 + np.log(np.sqrt(8))),  # from the mean of all, (2, 3)
    }
    assert set(expected) == set(SCORES)
    for name, wanted in expected.items():
        score = SCORES[name]
        known = None if score.learn is None else score.learn(keys, values, cluster, clusters)
        found = score.logits(clusters._replace(known=known), q)
        np.testing.assert_allclose(found, [wanted], rtol=1e-6, err_msg=name)


def test_a_quantile_of_counted_values():
    values, counts = jnp.array([3.0, 1.0, 2.0, -jnp.inf]), jnp.array([1, 2, 6, 1])
    # Ten keys: −∞, 1, 1, six times 2, 3.
    for fraction, wanted in ((0, -np.inf), (0.1, -np.inf), (0.12, 1), (0.32, 1), (0.34, 2), (0.9, 2), (1, 3)):
        assert float(rules._quantile(values, counts, jnp.float32(fraction))) == wanted, fraction


@functools.cache
def case_and_context():
    case = oracle.make_case(seed=7, clusters=(4, 12), query_block=None, **PAPER)
    built = add_value_centroids(oracle.spread_rows(case.tree))
    tree = calibrate(built, jnp.asarray(case.queries))
    S = case.clustered.shape[2]
    keys, values = (jnp.asarray(x) for x in (case.keys, case.values))
    fixed = Fixed(Cache(keys[:, :, :S], values[:, :, :S], keys[:, :, S:], values[:, :, S:]), jnp.asarray(case.queries))
    vars(fixed).update(config=case.config, built=built, tree=tree)  # else it would build its own
    return case, fixed


def choices(method, fixed, q, sparsity):
    """For every layer and head, what rows q [M H] choose."""
    index = method.build(fixed)
    choose = jax.jit(jax.vmap(jax.vmap(method.choose, in_axes=(0, None, None, 0)), in_axes=(0, None, None, 0)))
    return choose(index, q, jnp.ones(len(q), bool), method.knob(fixed, index, sparsity))


def test_with_nothing_varied_it_chooses_what_the_library_does():
    _, fixed = case_and_context()
    q = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)
    for sparsity in (0.3, 0.6, 0.85):
        ours = choices(rule(""), fixed, q, sparsity)
        theirs = choices(methods.METHODS["squeezed_flat"], fixed, q, sparsity)
        assert 0 < np.mean(ours.mask) < 1
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        np.testing.assert_array_equal(ours.index_read, theirs.index_read)


def test_thresholds_drop_their_fraction_of_each_group():
    case, fixed = case_and_context()
    index = rule("").build(fixed)
    (L, K), W = index.of_key.shape[:2], case.queries.shape[2]
    q = case.queries.reshape(L, K, -1, W, case.queries.shape[3])
    counts = np.asarray(index.clusters.counts)

    def log_scores(queries, clusters, counts):  # [M H], in float64: the formula of docs/method.md
        exp = np.exp(queries.astype(np.float64) @ np.asarray(clusters, np.float64).T / np.sqrt(queries.shape[1]))
        with np.errstate(divide="ignore"):
            return np.log(np.where(counts > 0, (exp / (exp @ counts)[:, None]).mean(axis=0), 0))

    for scope in ("model", "layer", "head"):
        method = rule("", scope=scope)
        log_T = np.asarray(method.knob(fixed, index, 0.7))
        assert len(np.unique(log_T)) == {"model": 1, "layer": L, "head": L * K}[scope]
        above, all_keys = np.zeros((2, L, K))
        for layer, head in np.ndindex(L, K):
            scores = log_scores(
                q[layer, head].reshape(-1, 6), index.clusters.centroids[layer, head], counts[layer, head]
            )
            above[layer, head] += counts[layer, head][scores > log_T[layer, head] + 1e-5].sum()
            all_keys[layer, head] += counts[layer, head].sum()
        axes = {"model": None, "layer": 1, "head": ()}[scope]
        kept = above.sum(axis=axes) / all_keys.sum(axis=axes)
        largest = counts.max() / (all_keys.sum(axis=axes))
        assert np.all((kept <= 0.3 + 0.02) & (kept >= 0.3 - largest - 0.02)), (scope, kept)


def context_of(config):
    """The same keys under another configuration."""
    case, _ = case_and_context()
    keys, values = (jnp.asarray(x) for x in (case.keys, case.values))
    sinks, last = config.sinks, keys.shape[2] - config.observation_window
    always = lambda x: jnp.concatenate([x[:, :, :sinks], x[:, :, last:]], axis=2)
    clustered = lambda x: x[:, :, sinks:last]
    return Fixed(
        Cache(*map(clustered, (keys, values)), *map(always, (keys, values))), jnp.asarray(case.queries), config
    )


def test_what_a_choice_reads_and_keeps():
    """Flat trees of 6 dimensions: a centroid in few bits is filled up to 8 numbers, and has a step in 16 bits."""
    case, _ = case_and_context()
    flat = dataclasses.replace(case.config, cluster_fractions=(0.2,))
    q = jnp.ones((2, 6))

    def found(tail=False, **changes):
        config = dataclasses.replace(flat, **changes)
        fixed = context_of(config)
        live = np.sum(np.asarray(fixed.built.levels[-1].counts) > 0, axis=-1)
        return choices(squeezed("", config, tail=tail), fixed, q, 0.7), live, fixed

    plain, live, _ = found()
    np.testing.assert_allclose(plain.index_read, live)
    four, live, _ = found(index_bits=4, score="variance")
    np.testing.assert_allclose(four.index_read, live * (4 / 12 + 1 / 6 + 1 / 6), rtol=1e-6)  # a step and a variance
    tail, live, _ = found(tail=True, index_bits=4)
    assert np.all((tail.index_read > live * (4 / 12 + 1 / 6)) & (tail.index_read < live * (4 / 12 + 1 / 6 + 1)))
    keys, live, fixed = found(score="variance", key_bits=2)
    # Every key of a cluster that is kept has its code read.
    of_code, of_cluster = 2 / 12 + 1 / 6, 1 + 1 / 6
    number = (np.asarray(keys.index_read) - live * of_cluster) / of_code
    np.testing.assert_allclose(number, np.round(number), atol=1e-3)
    assert np.all(number >= np.asarray(keys.mask).sum(axis=2) - 1e-3)
    assert np.all(number <= fixed.cache.keys.shape[2])
    # Sinks are in nobody's choice: everybody attends to them.
    sinks, _, fixed = found(sinks=4)
    assert sinks.mask.shape[2] == plain.mask.shape[2] - 4
    np.testing.assert_array_equal(fixed.cache.window_keys[:, :, :4], case.keys[:, :, :4])


def test_the_default_chooses_what_the_library_does():
    case, _ = case_and_context()
    config = SqueezeConfig(cluster_fractions=(0.1, 0.3), observation_window=case.config.observation_window)
    fixed = context_of(config)
    q = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)  # two tokens of two heads a group
    method = squeezed("", config)
    for sparsity in (0.3, 0.7):
        ours = choices(method, fixed, q, sparsity)
        reading = method.knob(fixed, None, sparsity)
        for layer in range(case.keys.shape[0]):
            tokens = jnp.tile(q.reshape(2, 1, 2, 6), (1, case.keys.shape[1], 1, 1)).reshape(2, -1, 6)
            two = jax.tree.map(lambda x: x[0, 0], reading).log_T_of(jnp.full(1, 2.0), config.calibration_tokens)[0]
            wanted = select(fixed.tree, tokens, layer=layer, log_thresholds=two).key_mask(fixed.tree)
            np.testing.assert_array_equal(ours.mask[layer], wanted)
        assert 0 < np.mean(ours.mask) < 1


@pytest.mark.parametrize("block", [None, 2])
def test_selections_shared_by_tokens(block):
    """A question of four tokens, the last one padding, and a reply of four."""
    case, fixed = case_and_context()
    S = fixed.cache.keys.shape[2]
    q, k, v = (jnp.asarray(x[0]) for x in oracle.user_tokens(case, B=1, T=8, room=8))
    valid = jnp.array([1, 1, 1, 0, 1, 1, 1, 1], bool)

    def attend(method, longer=0):
        index = method.build(fixed)
        here = jax.tree.map(lambda x: x[1], (fixed.cache, index, method.knob(fixed, index, 0.7)))
        way = measure.Way.of(method)._replace(longer=longer)
        step = jax.jit(functools.partial(measure._attend, way=way, num_question=4))
        return here, step(*here, q, k, v, valid)

    (_, index, log_T), (_, alone) = attend(squeezed("", question_block=block))
    choose = jax.vmap(squeezed("").choose, in_axes=(0, 0, None, 0))
    rows = q.reshape(8, 2, 2, 6).transpose(1, 0, 2, 3)
    selections = [(0, 4)] if block is None else [(0, 2), (2, 4)]
    found = [
        choose(index, rows[:, a:b].reshape(2, -1, 6), jnp.repeat(valid[a:b], 2), log_T).mask for a, b in selections
    ]
    np.testing.assert_allclose(alone.asked[0], np.mean(np.mean(np.array(found), axis=2), axis=0), rtol=1e-5)
    if block:
        return
    _, (_, shared) = attend(squeezed("", steps=2))
    for first in (0, 2):
        np.testing.assert_allclose(
            shared.kept[first : first + 2], np.repeat(alone.kept[first : first + 1], 2, axis=0), rtol=1e-6
        )
    np.testing.assert_allclose(shared.read - shared.kept, (alone.read - alone.kept) / 2, rtol=1e-5)
    # A window longer by 20 tokens has them read as well, of so many keys more.
    _, (_, longer) = attend(squeezed(""), longer=20)
    np.testing.assert_allclose(longer.kept, (alone.kept * S + 20) / (S + 20), rtol=1e-5)
    np.testing.assert_allclose(longer.read - longer.kept, (alone.read - alone.kept) * S / (S + 20), rtol=1e-4)


def test_every_variant_has_a_name_of_its_own():
    everything = [*variants.METHODS.values(), *(one for group in variants.ABLATIONS.values() for one in group)]
    assert len({method.name for method in everything}) == len(set(everything))
    assert all(variants.METHODS[group[0].name] is group[0] for group in variants.ABLATIONS.values())
    assert dataclasses.replace(variants.FINE.config, cluster_fractions=(0.01, 0.05), index_bits=32) == methods.CONFIG
