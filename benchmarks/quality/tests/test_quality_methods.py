"""Ways of choosing keys: each on a case worked by hand, and ours as the library's own attention has it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from benchmarks.embedded import batches
from benchmarks.quality import measure, methods, tasks
from benchmarks.quality.methods import METHODS, Cache, Fixed, Units
from squeezejax import Estimate, SqueezeConfig, add_value_centroids, attend, models
from squeezejax.models import embedded
from squeezejax.pallas_kernels.interface import Reading

PAPER = {
    name: getattr(SqueezeConfig.paper(), name)
    for name in ("sinks", "score", "cluster_metric", "index_bits", "key_bits")
}


def context(keys, *, queries=None, window_keys=None):
    """A context of one layer and one head: keys [S H]."""
    keys = jnp.asarray(keys, jnp.float32)[None, None]
    window = jnp.zeros((1, 1, 0, keys.shape[3])) if window_keys is None else jnp.asarray(window_keys)[None, None]
    queries = None if queries is None else jnp.asarray(queries)[None, None]
    return Fixed(Cache(keys, keys, window, window), queries)


def chosen(name, fixed, q, num_keys):
    """(numbers of the keys kept, vectors of the index read) for one selection of rows q [M H]."""
    method, q = METHODS[name], jnp.asarray(q, jnp.float32)
    index = jax.tree.map(lambda leaf: leaf[0, 0], method.build(fixed))
    choice = method.choose(index, q, jnp.ones(len(q), bool), jnp.int32(num_keys))
    return np.flatnonzero(choice.mask).tolist(), float(choice.index_read)


def keys_at(size, **rows):
    """Zeros [size 2] but for some rows, `_3=(1, 2)` being row 3."""
    keys = np.zeros((size, 2), np.float32)
    for name, row in rows.items():
        keys[int(name[1:])] = row
    return keys


def test_units_are_kept_whole_until_there_are_enough_keys():
    units = Units(of_key=jnp.array([0, 0, 0, 1, 2, 2]), sizes=jnp.array([3, 1, 2]))
    scores = jnp.array([0.1, 0.5, -jnp.inf])
    for num_keys, kept in ((0, []), (1, [3]), (2, [0, 1, 2, 3]), (6, [0, 1, 2, 3])):
        assert np.flatnonzero(methods.keep_first(units, scores, num_keys)).tolist() == kept


def test_exact_takes_the_largest_mean_attention():
    fixed = context(np.log([[1.0], [2.0], [4.0], [1.0]]))
    assert chosen("exact", fixed, [[1.0]], 1) == ([2], 4)
    # Attention of q = 1 is 1/8, 2/8, 4/8, 1/8; of q = −1 4/11, 2/11, 1/11, 4/11: the means 0.24, 0.22, 0.30, 0.24.
    assert chosen("exact", fixed, [[1.0], [-1.0]], 1) == ([2], 4)
    assert chosen("exact", fixed, [[1.0], [-1.0]], 3) == ([0, 2, 3], 4)


def test_quest_goes_by_what_a_page_could_score_at_most():
    # Pages of 16: no key of page 0 scores above 2, but 2 + 2 is its bound; page 1 has a key that scores 3.
    fixed = context(keys_at(40, _0=(2, 0), _9=(0, 2), _20=(3, 0), _33=(0, -5), _35=(-5, 0)))
    assert chosen("exact", fixed, [[1, 1]], 1)[0] == [20]
    assert chosen("quest", fixed, [[1, 1]], 1) == ([*range(16)], 6)
    assert chosen("quest", fixed, [[1, 1]], 17)[0] == [*range(32)]
    assert chosen("quest", fixed, [[-1, 0]], 1)[0] == [*range(32, 40)]  # the last page is not full


def test_an_index_in_few_bits():
    # Common to all keys: (0, 3). Apart from it row 0 is (−0.8, 2), whose scale in 4 bits is 2/7: −0.8 becomes −3 · 2/7.
    keys = np.array([[-0.8, 5], [0.8, 1]], np.float32)[None, None]
    found = methods.rounded(jnp.asarray(keys), jnp.asarray(keys), 4)[0, 0]
    np.testing.assert_allclose(found, [[-6 / 7, 5], [6 / 7, 1]], rtol=1e-5)
    assert methods.rounded(keys, keys, 16) is keys
    assert methods.vector_read(4, 32) == 4 / 16 + 1 / 32
    fixed = context(keys_at(40, _0=(2, 0), _9=(0, 2), _20=(3, 0), _33=(0, -5), _35=(-5, 0)))
    kept, read = chosen("quest_4_bits", fixed, [[1, 1]], 17)
    assert kept == [*range(32)]
    assert read == 6 * (4 / 16 + 1 / 2)


def test_blocks_go_by_their_mean_key():
    # Blocks of 20: means 3/20, 2/20 and, of five keys, 1/5.
    fixed = context(keys_at(45, _0=(3, 0), _21=(2, 0), _40=(1, 0)))
    assert chosen("blocks", fixed, [[1, 0]], 5) == ([*range(40, 45)], 3)
    assert chosen("blocks", fixed, [[1, 0]], 6)[0] == [*range(20), *range(40, 45)]


def test_window_keeps_sinks_and_the_most_recent():
    fixed = context(np.zeros((40, 1)))
    assert chosen("window", fixed, [[1.0]], 10) == ([0, 1, 2, 3, 34, 35, 36, 37, 38, 39], 0)
    assert chosen("window", fixed, [[1.0]], 3)[0] == [0, 1, 2]


def test_snapkv_keeps_what_the_window_saw_and_its_neighbours():
    # Both queries of the window give key 4 eight times the weight of any other: pooling spreads it to 2 … 6.
    keys = np.zeros((12, 1), np.float32)
    keys[4] = np.log(8)
    fixed = context(keys, queries=np.ones((2, 1), np.float32), window_keys=np.zeros((2, 1), np.float32))
    observed = np.where(np.arange(12) == 4, 8, 1) * (1 / (11 + 8 + 1) + 1 / (11 + 8 + 2))  # the second sees the first
    index = METHODS["snapkv"].build(fixed)
    np.testing.assert_allclose(index.known[0, 0], np.convolve(observed, np.ones(5) / 5, "same"), rtol=1e-5)
    assert chosen("snapkv", fixed, [[9.0]], 5) == ([2, 3, 4, 5, 6], 0)


@functools.cache
def case_and_context():
    case = oracle.make_case(seed=5, clusters=(4, 12), query_block=None, **PAPER)
    tree = add_value_centroids(oracle.spread_rows(case.tree))
    flat = dataclasses.replace(tree.config, cluster_fractions=tree.config.cluster_fractions[-1:])
    top = dataclasses.replace(tree.levels[-1], parents=jnp.zeros_like(tree.levels[-1].parents))
    flat = dataclasses.replace(tree, levels=(top,), config=flat)
    S = case.clustered.shape[2]
    keys, values = (jnp.asarray(x) for x in (case.keys, case.values))
    fixed = Fixed(Cache(keys[:, :, :S], values[:, :, :S], keys[:, :, S:], values[:, :, S:]), None)
    vars(fixed).update(tree=tree, flat=flat)  # else it would build its own
    return case, fixed


def test_clusters_are_found_behind_any_layout():
    case, fixed = case_and_context()
    found = np.asarray(methods.cluster_of_key(fixed.tree))
    for at in np.ndindex(found.shape[:2]):
        pairs = set(zip(found[at].tolist(), case.labels[-1][at].tolist(), strict=True))
        assert len(pairs) == len(set(found[at].tolist())) == len(set(case.labels[-1][at].tolist()))
    ranked = METHODS["clusters_ranked"].build(fixed)
    for name in ("clusters_ranked", "random"):
        method = METHODS[name]
        head = jax.tree.map(lambda leaf: leaf[1, 0], method.build(fixed))
        choice = method.choose(head, jnp.ones((2, 6)), jnp.ones(2, bool), jnp.int32(9))
        clusters = np.asarray(ranked.of_key[1, 0])
        kept = set(clusters[np.asarray(choice.mask)].tolist())
        assert np.flatnonzero(choice.mask).tolist() == np.flatnonzero(np.isin(clusters, list(kept))).tolist()
        sizes = np.asarray(ranked.sizes[1, 0])[list(kept)]
        assert sizes.sum() >= 9 > sizes.sum() - sizes.max()


def test_vectors_read_are_counted_level_by_level():
    _, fixed = case_and_context()
    q = jnp.ones((2, 6))
    coarse, fine = (jax.tree.map(lambda leaf: leaf[1, 0], level) for level in fixed.tree.levels)
    counted = lambda method, knob: float(
        method.choose(jax.tree.map(lambda leaf: leaf[1, 0], method.build(fixed)), q, jnp.ones(2, bool), knob).index_read
    )
    live = int(np.sum(coarse.counts > 0)), int(np.sum(fine.counts > 0))
    at = lambda log_t, levels=2, tail=False: Reading(jnp.full(levels, log_t), tail=tail)
    everything, nothing = at(-jnp.inf), at(jnp.inf)
    assert counted(METHODS["squeezed"], everything) == sum(live)
    assert counted(METHODS["squeezed"], nothing) == live[0]  # no child of a cluster given up is looked at
    assert counted(METHODS["squeezed_tail"], at(-jnp.inf, tail=True)) == sum(live)
    assert counted(METHODS["squeezed_tail"], at(jnp.inf, tail=True)) == 2 * live[0]  # and their mean values
    assert counted(METHODS["squeezed_flat_tail"], at(jnp.inf, 1, True)) == 2 * live[1]


def test_ours_is_the_librarys_attention():
    """A question of two tokens, then two tokens of a reply, each by a selection of its own."""
    method = METHODS["squeezed_tail"]
    case, fixed = case_and_context()
    q, k, v = (x[0] for x in oracle.user_tokens(case, B=1, T=4, room=4))
    log_T = jnp.array([-4.2, -3.9])
    step = jax.jit(functools.partial(measure._attend, way=measure.Way.of(method), num_question=2))
    here = jax.tree.map(
        lambda x: x[1], (fixed.cache, method.build(fixed), Reading(methods.everywhere(fixed, log_T), tail=True))
    )
    arrays = [jnp.asarray(x) for x in (q, k, v)]
    out, lost = step(*here, *arrays, jnp.ones(4, bool))
    call = jax.jit(functools.partial(attend, layer=1), static_argnames="implementation")
    call = functools.partial(call, fixed.tree, implementation="xla")
    for first, count in ((0, 2), (2, 1), (3, 1)):
        users = {"start": np.array([first]), "lengths": np.array([first + count])}
        tokens = q[None, first : first + count], k[None], v[None]
        wanted, _ = call(*tokens, **users, estimate=Estimate(tail=True), log_thresholds=log_T)
        np.testing.assert_allclose(out[first : first + count], wanted[0], atol=2e-5)
        if first < 2:
            continue
        _, read = call(*tokens, **users, log_thresholds=log_T)
        dense, total = call(*tokens, **users, log_thresholds=jnp.full(2, -jnp.inf))
        np.testing.assert_allclose(lost.mass[first - 2], np.exp(read - total)[0, 0], rtol=1e-4)
        gap = np.linalg.norm(wanted - dense, axis=-1) / np.linalg.norm(dense, axis=-1)
        np.testing.assert_allclose(lost.error[first - 2], gap[0, 0], atol=1e-4)
    assert np.all((np.asarray(lost.kept) > 0) & (np.asarray(lost.kept) < 1))


def test_right_replies_are_those_of_plain_logits():
    params, encoder = models.load(embedded.PATH), batches.Encoder(embedded.PATH)
    sample = tasks.make_sample("multi_query", 1, 380, questions=3)
    ids, asked = measure.context_ids(encoder, sample, 400), measure.ask(encoder, sample)
    assert len(ids) == 401
    assert encoder.tokenizer.decode(ids[-20:]) == encoder.tokenizer.decode(encoder.ids(sample.context)[-20:])
    fixed = measure.divide(measure.read(params, ids), methods.CONFIG)
    method = METHODS["exact"]
    outcome = measure.run(params, fixed, method.build(fixed), method, 1.0, asked)
    whole, found = [], []
    for question in sample.questions:
        turn = tasks.encode_turn(encoder.tokenizer, question, encoder.eos)
        tokens = np.array([ids + turn.question + turn.reply], np.int32)
        predicted = np.argmax(models.logits(params, tokens)[0], axis=-1)
        right = np.asarray(predicted)[-len(turn.reply) - 1 : -1] == turn.reply
        whole.append(bool(right.all()))
        found.append(right[np.array(turn.answers)].mean())
    assert outcome.exact == whole
    assert outcome.found == found
    np.testing.assert_allclose([outcome.mass, outcome.kept.repeat(2, axis=1)], 1, rtol=1e-5)
    np.testing.assert_allclose(outcome.read, 1.5, rtol=1e-5)  # all keys as the index, and all keys and values
    assert outcome.error.max() < 1e-5
