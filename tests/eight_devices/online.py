"""Questions on a mesh: the same tokens and key masks as on one device, and no key or value sent between devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from meshes import make_mesh, put, sent

import squeezejax
from squeezejax import SqueezeConfig
from squeezejax.pallas_kernels import registry

S, W, T, NEW = 44, 6, 5, 5
RNG = np.random.default_rng(7)
CONTEXT = RNG.integers(0, 31, S + W)
QUESTIONS = RNG.integers(0, 31, (4, T)).astype(np.int32)
LENGTHS = np.array([5, 3, 1, 4], np.int32)
SPARSITIES = (0.6, 0.0, 1.0)  # some keys, all of them, none
CLUSTERS = {
    "flat": (14,),
    "hierarchical": (4, 14),
    "codes": (14,),
    "codes below a hierarchy": (4, 14),
    "codes, 8 bits": (14,),
}
FRACTIONS = {1: (0.3,), 2: (0.1, 0.3)}


@functools.cache
def on_one_device(heads, kv_heads, kind):
    """A model, a tree of a context, and the answers to the questions at each sparsity."""
    params = oracle.make_model(num_heads=heads, num_kv_heads=kv_heads)
    make = functools.partial(SqueezeConfig, sinks=3) if "codes" in kind else SqueezeConfig.paper
    fractions = FRACTIONS[len(CLUSTERS[kind])]
    config = make(cluster_fractions=fractions, observation_window=W, query_block=2, sparsity=0.6)
    config = dataclasses.replace(config, cache_bits=8 if "8 bits" in kind else 16)
    tree = oracle.model_tree(params, CONTEXT, config, clusters=CLUSTERS[kind])
    answers = {sparsity: generate(params, tree, QUESTIONS, LENGTHS, sparsity) for sparsity in SPARSITIES}
    assert np.all((answers[0.6].kept_fraction > 0.02) & (answers[0.6].kept_fraction < 0.9))
    return params, tree, answers


@jax.jit
def generate(params, tree, questions, lengths, sparsity):
    return squeezejax.generate(
        params, tree, questions, lengths=lengths, sparsity=sparsity, max_new_tokens=NEW, implementation="xla"
    )


def put_all(mesh, params, tree):
    return put(mesh, params), put(mesh, squeezejax.split_context(tree, dict(mesh.shape).get("context", 1)))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "kind", "axes"),
    [
        (4, 2, "flat", {"context": 2}),
        (4, 2, "hierarchical", {"data": 2, "model": 2, "context": 2}),
        (4, 2, "hierarchical", {"model": 4, "context": 2}),  # fewer key/value heads than devices
        (4, 4, "hierarchical", {"context": 2, "model": 2}),
        (4, 4, "hierarchical", {"data": 2, "model": 4}),
        (4, 2, "codes", {"context": 4}),
        (4, 2, "codes below a hierarchy", {"data": 2, "model": 2, "context": 2}),
        (4, 2, "codes, 8 bits", {"data": 2, "model": 2, "context": 2}),
    ],
)
def test_same_tokens_and_nothing_sent(heads, kv_heads, kind, axes):
    params, tree, answers = on_one_device(heads, kv_heads, kind)
    params, tree = put_all(make_mesh(**axes), params, tree)
    compiled = generate.lower(params, tree, QUESTIONS, LENGTHS, 0.5).compile()
    for sparsity, answer in answers.items():
        found = compiled(params, tree, QUESTIONS, LENGTHS, sparsity)
        np.testing.assert_array_equal(found.tokens, answer.tokens)
        np.testing.assert_array_equal(found.lengths, answer.lengths)
        np.testing.assert_allclose(found.kept_fraction, answer.kept_fraction, rtol=1e-5)
        np.testing.assert_allclose(found.prefill_kept_fraction, answer.prefill_kept_fraction, rtol=1e-5)

    H = tree.keys.shape[3]
    # What is left: the best token of each share of the vocabulary, and queries among devices that share a head.
    allowed = {(users, shares) for users in (2, 4) for shares in (2, 4, 8)}
    if axes.get("model", 1) > kv_heads:
        allowed |= {(4 // axes.get("data", 1), tokens, heads // kv_heads, H) for tokens in (1, T)}
    for name, shapes in sent(compiled):
        assert set(shapes) <= allowed, (name, shapes)
    assert "all-reduce" in compiled.as_text()


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("codes, 8 bits", {"data": 2, "model": 2, "context": 2}),
        ("hierarchical", {"context": 2}),
    ],
)
def test_wide_launches_give_the_same_tokens(kind, axes):
    """The backend for accelerators: each device selects by a mask of its own part, and one counts the window."""
    params, tree, answers = on_one_device(4, 2, kind)
    params, tree = put_all(make_mesh(**axes), params, tree)
    with registry.force_wide():
        for sparsity, answer in answers.items():
            found = squeezejax.generate(
                params, tree, QUESTIONS, lengths=LENGTHS, sparsity=sparsity, max_new_tokens=NEW, implementation="wide"
            )
            np.testing.assert_array_equal(found.tokens, answer.tokens)
            np.testing.assert_allclose(found.kept_fraction, answer.kept_fraction, rtol=1e-5)


def test_numbers_a_user():
    params, tree, _ = on_one_device(4, 2, "codes below a hierarchy")
    sparsities, penalties = np.array([0.6, 0.0, 1.0, 0.3]), np.array([1.0, 1.5, 2.0, 1.2])
    ask = jax.jit(
        lambda params, tree: squeezejax.generate(
            params,
            tree,
            QUESTIONS,
            lengths=LENGTHS,
            sparsity=sparsities,
            repetition_penalty=penalties,
            max_new_tokens=NEW,
            implementation="xla",
        )
    )
    expected, found = ask(params, tree), ask(*put_all(make_mesh(data=2, model=2, context=2), params, tree))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.kept_fraction, expected.kept_fraction, rtol=1e-5)
    np.testing.assert_allclose(expected.kept_fraction[1:3], [1, 0], rtol=1e-6)


def test_keys_that_are_sent_would_be_seen():
    _, tree, _ = on_one_device(4, 2, "flat")
    mesh = make_mesh(model=2)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    gather = jax.jit(lambda tree: tree.keys, out_shardings=whole)
    assert sent(gather.lower(put(mesh, tree)).compile()) == [("all-gather", [tree.keys.shape])]


@pytest.mark.parametrize("kind", CLUSTERS)
@pytest.mark.parametrize("axes", [{"context": 4}, {"model": 4, "context": 2}])
def test_same_key_masks(kind, axes):
    _, tree, _ = on_one_device(4, 2, kind)
    (_, spread) = put_all(make_mesh(**axes), on_one_device(4, 2, kind)[0], tree)
    assert spread.keys.sharding.shard_shape(spread.keys.shape)[1:3] == (
        max(1, 2 // axes.get("model", 1)),
        spread.keys.shape[2] // axes.get("context", 1),
    )
    q = jnp.asarray(RNG.normal(size=(3, 3, 4, 6)), jnp.float32)
    kept = []
    for at, sparsity in enumerate([0.4, 0.7, 0.9]):
        log_T = squeezejax.log_thresholds(tree, sparsity)
        np.testing.assert_array_equal(log_T, squeezejax.log_thresholds(spread, sparsity))
        mask = oracle.mask_jit(tree, q[at], 1, log_T)
        np.testing.assert_array_equal(oracle.mask_jit(spread, q[at], 1, log_T), mask)
        kept.append(float(jnp.mean(mask.astype(jnp.float32))))
    assert any(0.05 < share < 0.95 for share in kept)


@pytest.mark.parametrize("axes", [{"context": 2}, {"model": 2, "context": 4}, {"data": 2, "model": 4}])
@pytest.mark.parametrize("kind", ["codes", "codes below a hierarchy"])
def test_calibration_of_the_common_scale(kind, axes):
    """Counts and denominators are those of one device."""
    _, tree, _ = on_one_device(4, 2, kind)
    queries = jnp.asarray(RNG.normal(size=(2, 4, 9, 6)), jnp.float32)
    one = squeezejax.calibrate(tree, queries)
    mesh = make_mesh(**axes)
    many = squeezejax.calibrate(put(mesh, squeezejax.split_context(tree, axes.get("context", 1))), queries)
    np.testing.assert_allclose(many.denominators, one.denominators, atol=1e-4)
    for sparsity in (0.2, 0.5, 0.8):
        ours, theirs = (np.asarray(squeezejax.log_thresholds(t, sparsity)) for t in (many, one))
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
    np.testing.assert_allclose(many.missed_masses, one.missed_masses, atol=1e-3)


def test_ties():
    """Thresholds that equal scores: the queries that calibrated select, at the very steps of the quantile function."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 16, (2, 2, 64))
    labels[..., :16] = np.arange(16)
    means = rng.normal(size=(2, 2, 8, 6))[:, :, rng.integers(0, 8, 16)]  # clusters with equal centroids
    keys = np.take_along_axis(means, labels[..., None], axis=2)
    keys = jnp.asarray(np.concatenate([keys, rng.normal(size=(2, 2, 4, 6))], axis=2), jnp.float32)
    config = SqueezeConfig.paper(cluster_fractions=(0.25,), observation_window=4)
    tree = squeezejax.build_tree(keys, keys, config, labels=(labels,))
    queries = jnp.asarray(rng.normal(size=(2, 4, 4, 6)), jnp.float32)
    one = squeezejax.calibrate(tree, queries)
    mesh = make_mesh(context=4)
    spread = put(mesh, squeezejax.split_context(tree, 4))
    many = squeezejax.calibrate(spread, queries)
    spread = dataclasses.replace(spread, sparsities=one.sparsities, thresholds=one.thresholds)
    masks = set()
    for sparsity in np.unique(one.sparsities)[1:-1:40]:
        log_T = squeezejax.log_thresholds(one, sparsity)
        np.testing.assert_allclose(squeezejax.log_thresholds(many, sparsity), log_T, rtol=1e-5)
        for layer in range(2):
            q = queries[layer].swapaxes(0, 1)
            mask = np.asarray(oracle.mask_jit(one, q, layer, log_T))
            np.testing.assert_array_equal(oracle.mask_jit(spread, q, layer, log_T), mask)
            np.testing.assert_array_equal(
                oracle.mask_jit(many, q, layer, squeezejax.log_thresholds(many, sparsity)), mask
            )
            masks.add(mask.tobytes())
    assert len(masks) > 10


def test_conversations():
    params, tree, answers = on_one_device(4, 2, "flat")
    params, tree = put_all(make_mesh(data=2, model=2), params, tree)
    state = squeezejax.prefill(params, tree, QUESTIONS, lengths=LENGTHS, capacity=NEW, implementation="xla")
    wanted = squeezejax.shardings(make_mesh(data=2, model=2), state)
    for name in ("keys", "values"):
        cache = getattr(state, name)
        assert cache.sharding.is_equivalent_to(getattr(wanted, name), cache.ndim)
    found, state = squeezejax.decode(params, tree, state, NEW, implementation="xla")
    np.testing.assert_array_equal(found.tokens, answers[0.6].tokens)
    np.testing.assert_array_equal(state.lengths, LENGTHS + NEW)


def test_refusals():
    params, tree, _ = on_one_device(4, 2, "flat")
    with pytest.raises(ValueError, match="may have the axes data, model, context, this one has"):
        squeezejax.shardings(make_mesh(batch=2), tree)
    with pytest.raises(ValueError, match="4 query heads cannot be divided among 8 devices"):
        squeezejax.shardings(make_mesh(model=8), params)
    with pytest.raises(ValueError, match="2 key/value heads cannot be divided among 3 devices"):
        squeezejax.shardings(make_mesh(model=3), tree)
    with pytest.raises(ValueError, match=r"laid out in 1 parts.*context axis has 2 devices.*split_context"):
        squeezejax.shardings(make_mesh(context=2), tree)
    with pytest.raises(ValueError, match="at least one part"):
        squeezejax.split_context(tree, 0)
    params, tree = put_all(make_mesh(data=4), params, tree)
    with pytest.raises(ValueError, match="3 users cannot be divided among the 4 devices"):
        squeezejax.generate(params, tree, QUESTIONS[:3])
    with pytest.raises(ValueError, match="3 users cannot be divided among the 4 devices"):
        squeezejax.prefill(params, tree, QUESTIONS[:3])
