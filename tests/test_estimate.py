"""Clusters chosen by mass, the tail estimate and the missed mass, against exact sums over keys and centroids."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import squeezejax
from squeezejax import SqueezeConfig, add_value_centroids, attend
from squeezejax.online.attention import attend_user
from squeezejax.online.reading import Estimate, reading_of
from squeezejax.pallas_kernels.interface import Own

LAYER = 1


# ---------------------------------------------------------------------------------------------------------------------
# The same once more in float64, key by key
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Cluster:
    """Some keys of one head, as their centroid sees them."""

    rows: np.ndarray  # i[n]
    centroid: np.ndarray  # [H]
    value: np.ndarray  # [H]

    def mass(self, q):  # [M H] -> [M]
        return len(self.rows) * np.exp(q @ self.centroid / np.sqrt(q.shape[1]))


def choose(case, layer, head, q, log_T=None, min_mass=None):
    """(rows kept, clusters given up, distance from another choice) for q [M H]."""
    keys, values = (np.float64(x[layer, head]) for x in (case.clustered, case.values[:, :, : case.clustered.shape[2]]))
    alive, given_up, gap = np.ones(len(keys), bool), [], np.inf
    levels = oracle.ancestors(case.head_labels(layer, head))
    for depth, cluster_of in enumerate(levels):
        members = [np.flatnonzero(alive & (cluster_of == c)) for c in np.unique(cluster_of[alive])]
        clusters = [Cluster(rows, keys[rows].mean(axis=0), values[rows].mean(axis=0)) for rows in members]
        if min_mass is None:
            scores = oracle.cluster_scores(keys, cluster_of, q, alive)
            kept = [scores[cluster.rows[0]] > log_T[depth] for cluster in clusters]
            gap = min(gap, np.abs(scores[np.isfinite(scores)] - log_T[depth]).min(initial=np.inf))
        else:
            exponent = (len(levels) - 1 - depth) / max(len(levels) - 1, 1)
            wanted = 1 - (1 - min_mass) / case.config.coarse_margin**exponent
            total = sum(cluster.mass(q) for cluster in [*clusters, *given_up])
            shares = np.array([np.mean(cluster.mass(q) / total) for cluster in clusters])
            reached, kept = 0.0, np.zeros(len(clusters), bool)
            for best in np.argsort(-shares):
                gap = min(gap, abs(reached - wanted))
                kept[best] = reached < wanted
                reached += shares[best]
        for cluster, keep in zip(clusters, kept, strict=True):
            alive[cluster.rows] = keep
        given_up += [cluster for cluster, keep in zip(clusters, kept, strict=True) if not keep]
    return np.flatnonzero(alive), given_up, gap


def estimated(case, layer, q, k, v, start, length, *, tail, **choice):
    """(out, lse, kept fraction, missed mass, gap) of one user's q [T N H]; rows past `length` are padding."""
    T, N, H = q.shape
    G, block = N // case.K, case.config.query_block or T
    S = case.clustered.shape[2]
    out, lse, kept, missed, smallest = np.zeros(q.shape), np.zeros((T, N)), [], [], np.inf
    for first in range(0, min(T, length - start), block):
        tokens = range(first, min(first + block, T, length - start))
        for head in range(case.K):
            window = slice(S, None)
            # What each row attends to anyway: (log weights, values).
            rows = [(t, n) for t in tokens for n in range(head * G, head * G + G)]
            always = [
                (
                    np.concatenate([case.keys[layer, head, window], k[: start + t + 1, head]]) @ q[t, n] / np.sqrt(H),
                    np.concatenate([case.values[layer, head, window], v[: start + t + 1, head]]),
                )
                for t, n in rows
            ]
            queries = np.float64([q[t, n] for t, n in rows])
            found, given_up, gap = choose(case, layer, head, queries, **choice)
            kept += [len(found) / S] * len(tokens)
            smallest = min(smallest, gap)
            for (t, n), query, (logits, values) in zip(rows, queries, always, strict=True):
                weights = np.exp(np.concatenate([logits, case.keys[layer, head, found] @ query / np.sqrt(H)]))
                values = np.concatenate([values, case.values[layer, head, found]])
                left = np.array([cluster.mass(query[None])[0] for cluster in given_up])
                missed.append(left.sum() / (left.sum() + weights.sum()))
                if tail:
                    weights = np.concatenate([weights, left])
                    values = np.concatenate([values, np.reshape([c.value for c in given_up], (-1, H))])
                out[t, n], lse[t, n] = weights @ values / weights.sum(), np.log(weights.sum())
    return out, lse, np.mean(kept), np.mean(missed), smallest


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------
@jax.jit
def run(tree, q, k, v, layer, start, lengths, log_T, estimate):
    """One layer's attention, as plain XLA."""
    reading = reading_of(tree, log_thresholds=log_T, estimate=estimate, implementation="xla")
    return attend_user(tree, q, Own(k, v, start, lengths), layer, reading)


@functools.cache
def make(clusters, spread=False):
    """(case, tree with value centroids) for a number of clusters a level."""
    case = oracle.make_case(seed=5, clusters=clusters, query_block=2)
    return case, add_value_centroids(oracle.spread_rows(case.tree) if spread else case.tree)


@pytest.mark.parametrize(
    ("clusters", "by_mass", "tail"),
    [
        ((12,), True, False),
        ((4, 12), False, True),
        ((3, 6, 12), True, True),
    ],
)
def test_estimates_are_those_of_exact_sums(clusters, by_mass, tail):
    case, tree = make(clusters, spread=True)
    q, k, v = oracle.user_tokens(case, T=3, room=7)
    start, lengths = np.array([4, 0], np.int32), np.array([7, 2], np.int32)
    for setting in (0.35, 0.6, 0.9):
        if by_mass:
            choice, log_T, estimate = {"min_mass": setting}, None, Estimate(jnp.float32(setting), tail)
        else:
            log_T = oracle.cutting_thresholds(case, LAYER, q[0], [setting / 2] * (len(clusters) - 1) + [setting])
            choice, estimate = {"log_T": np.float64(log_T)}, Estimate(tail=tail)
        found = run(tree, q, k, v, jnp.int32(LAYER), start, lengths, log_T, estimate=estimate)
        for user in range(2):
            out, lse, kept, missed, gap = estimated(
                case, LAYER, q[user], k[user], v[user], start[user], lengths[user], tail=tail, **choice
            )
            assert gap > 1e-5  # else rounding would decide
            valid = lengths[user] - start[user]
            np.testing.assert_allclose(found.out[user, :valid], out[:valid], atol=2e-5)
            np.testing.assert_allclose(found.lse[user, :valid], lse[:valid], atol=2e-5)
            np.testing.assert_allclose(found.kept[user], kept, rtol=1e-6)
            np.testing.assert_allclose(found.missed[user], missed, rtol=1e-4)
            assert 0 < missed < 1


def test_a_case_worked_by_hand():
    # q = 1 and H = 1: the weights are the exponentials of the keys. Clusters {0, 0}, {ln 3}, {ln 4}; own token 0.
    keys = np.log([1, 1, 3, 4])[None, None, :, None]
    values = np.array([1.0, 3, 5, 10])[None, None, :, None]
    config = SqueezeConfig.paper(cluster_fractions=(0.5,), observation_window=0)
    tree = squeezejax.build_tree(np.float32(keys), np.float32(values), config, labels=(np.array([[[0, 0, 1, 2]]]),))
    tree = add_value_centroids(tree)
    np.testing.assert_array_equal(tree.levels[0].value_centroids[0, 0, :, 0], [2, 5, 10])
    q, own = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
    # Of the clusters' mass 9, {ln 4} has 4, {ln 3} 3, {0, 0} 2; the own token's 1 is attended to anyway.
    for min_mass, weight, total in ((0.0, 1, 0), (0.4, 5, 40), (0.5, 8, 55), (0.75, 8, 55), (0.8, 10, 59), (1, 10, 59)):
        arguments = (tree, q, own, own, 0, jnp.zeros(1, int), jnp.ones(1, int), None)
        plain, whole = (run(*arguments, estimate=Estimate(jnp.float32(min_mass), tail)) for tail in (False, True))
        np.testing.assert_allclose([plain.out.item(), plain.lse.item()], [total / weight, np.log(weight)], rtol=1e-6)
        # The tail: values of {0, 0} have the mean 2.
        np.testing.assert_allclose([whole.out.item(), whole.lse.item()], [59 / 10, np.log(10)], rtol=1e-6)
        np.testing.assert_allclose([plain.missed.item(), whole.missed.item()], 1 - weight / 10, atol=1e-6)


def test_the_tail_of_equal_keys_is_exact():
    """Where every key is its cluster's centroid, nothing is lost by not reading any."""
    case = oracle.make_case(seed=3, clusters=(3, 8))
    fine = case.labels[-1]
    keys = case.keys.copy()
    for at in np.ndindex(fine.shape[:2]):
        keys[at][: fine.shape[2]] = np.take(keys[at], fine[at], axis=0)
        for c in range(8):  # the children of a parent alike too, so that the coarse level may cut
            keys[at][: fine.shape[2]][fine[at] == c] = keys[at][case.labels[0][at][c]]
    case = dataclasses.replace(case, keys=keys)
    tree = add_value_centroids(case.tree)
    q, k, v = oracle.user_tokens(case, T=2)
    dense = oracle.attend_jit(tree, q, k, v, layer=0, log_thresholds=jnp.array([-jnp.inf, -jnp.inf]))
    call = jax.jit(functools.partial(attend, layer=0, estimate=Estimate(tail=True)))
    for log_T in ([jnp.inf, jnp.inf], [-3.5, jnp.inf], [-3.5, -3.5], [-jnp.inf, -jnp.inf]):
        found = call(tree, q, k, v, log_thresholds=jnp.array(log_T))
        for one, other in zip(found, dense, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@given(masses=st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=2))
@settings(max_examples=25, deadline=None)
def test_more_mass_never_keeps_fewer_keys(masses):
    case, tree = make((12,), spread=True)
    q, k, v = oracle.user_tokens(case, B=1, T=3, room=7)
    arguments = (tree, q[:, :1], k, v, jnp.int32(LAYER), np.array([6], np.int32), np.array([7], np.int32), None)
    less, more = (run(*arguments, estimate=Estimate(jnp.float32(mass))) for mass in sorted(masses))
    assert less.kept[0] <= more.kept[0]
    for mass, found in zip(sorted(masses), (less, more), strict=True):
        assert (found.kept[0] == 1) == (found.missed[0] == 0)
        assert (mass > 0) or found.kept[0] == 0
        assert (mass < 1) or found.kept[0] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------
W, T, NEW = 6, 5, 4
CONFIG = SqueezeConfig.paper(cluster_fractions=(0.1, 0.3), observation_window=W, query_block=None, sparsity=0.6)
RNG = np.random.default_rng(7)
CONTEXT, QUESTIONS = RNG.integers(0, 31, 44 + W), RNG.integers(0, 31, (2, T)).astype(np.int32)
generate = functools.partial(squeezejax.generate, implementation="xla", max_new_tokens=NEW)


@pytest.fixture(scope="module")
def params():
    return oracle.make_model()


@pytest.fixture(scope="module")
def tree(params):
    return add_value_centroids(oracle.model_tree(params, CONTEXT, CONFIG))


def test_without_options_nothing_changes(params, tree):
    plain = generate(params, dataclasses.replace(tree, levels=bare_levels(tree)), QUESTIONS)
    assert plain.missed_mass is None
    measured = generate(params, tree, QUESTIONS, estimate=Estimate())
    np.testing.assert_array_equal(measured.tokens, plain.tokens)
    np.testing.assert_allclose(measured.kept_fraction, plain.kept_fraction, rtol=1e-6)
    np.testing.assert_allclose(measured.prefill_kept_fraction, plain.prefill_kept_fraction, rtol=1e-6)
    assert np.all((measured.missed_mass > 0.01) & (measured.missed_mass < 0.9))


def bare_levels(tree):
    return tuple(dataclasses.replace(level, value_centroids=None) for level in tree.levels)


def test_ragged_batches_and_traced_numbers(params, tree):
    lengths = np.array([T, 3], np.int32)

    @jax.jit
    def answer(questions, mass):
        return generate(params, tree, questions, lengths=lengths, estimate=Estimate(mass, tail=True))

    both = answer(QUESTIONS, jnp.float32(0.95))
    with oracle.count_compilations() as compiled:
        sparser = answer(QUESTIONS, jnp.float32(0.5))
        # Neither padding nor what another user asks changes anything for the second user.
        others = np.array([QUESTIONS[0, ::-1], QUESTIONS[1]])
        others[1, 3:] = 0
        changed = answer(others, jnp.float32(0.95))
    assert not compiled
    assert np.all(sparser.kept_fraction < both.kept_fraction)
    assert np.all(sparser.missed_mass > both.missed_mass)
    for name in ("tokens", "missed_mass", "kept_fraction", "prefill_kept_fraction"):
        np.testing.assert_array_equal(getattr(changed, name)[1], getattr(both, name)[1])
    assert changed.missed_mass[0] != both.missed_mass[0]
    # In parts: the same answer.
    estimate = Estimate(min_mass=0.95, tail=True)
    state = squeezejax.prefill(params, tree, QUESTIONS, lengths=lengths, estimate=estimate, capacity=NEW)
    parts, _ = squeezejax.decode(params, tree, state, NEW, estimate=estimate)
    np.testing.assert_array_equal(parts.tokens, both.tokens)
    np.testing.assert_allclose(parts.missed_mass, both.missed_mass, rtol=1e-5)


def test_value_centroids_are_means_and_survive_a_file(tree, tmp_path):
    case, spread = make((4, 12), spread=True)
    for at in np.ndindex(case.labels[0].shape[:2]):
        levels = oracle.ancestors(case.head_labels(*at))
        for level, cluster_of in zip(spread.levels, levels, strict=True):
            values = np.float64(case.values[at][: len(cluster_of)])
            wanted = sorted(values[cluster_of == c].mean(axis=0).tolist() for c in np.unique(cluster_of))
            found = np.asarray(level.value_centroids[at])[np.asarray(level.counts[at]) > 0]
            np.testing.assert_allclose(sorted(found.tolist()), wanted, atol=1e-5)
    squeezejax.save(tmp_path / "tree", tree)
    loaded = squeezejax.load(tmp_path / "tree")
    for one, other in zip(loaded.levels, tree.levels, strict=True):
        np.testing.assert_array_equal(one.value_centroids, other.value_centroids)
    half = dataclasses.replace(tree, levels=(bare_levels(tree)[0], tree.levels[1]))
    with pytest.raises(ValueError, match=r"levels\.0\.value_centroids' is missing"):
        squeezejax.save(tmp_path / "half", half)


def test_options_that_cannot_be_are_refused(params, tree):
    with pytest.raises(ValueError, match="add_value_centroids"):
        generate(params, dataclasses.replace(tree, levels=bare_levels(tree)), QUESTIONS, estimate=Estimate(tail=True))
    with pytest.raises(ValueError, match="not two of them"):
        generate(params, tree, QUESTIONS, estimate=Estimate(0.9), sparsity=0.5)
    with pytest.raises(ValueError, match="must be one number"):
        generate(params, tree, QUESTIONS, estimate=Estimate(np.ones(2)))
    with pytest.raises(NotImplementedError, match="plain XLA"):
        squeezejax.generate(params, tree, QUESTIONS, estimate=Estimate(tail=True), implementation="mosaic")
