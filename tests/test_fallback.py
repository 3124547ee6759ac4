"""The rule that answers densely where selecting cannot pay: what it says, and who follows it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import squeezejax
from squeezejax.command_line.plan_table import plan_lines
from squeezejax.models import Llama, LlamaConfig
from squeezejax.online import fallback
from squeezejax.online.reading import thresholds
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.interface import Reading

L, K, G, H, S, W = 2, 2, 2, 8, 60, 4
MODEL = LlamaConfig(vocab_size=50, model_dim=16, mlp_dim=16, num_layers=L, num_heads=K * G, num_kv_heads=K, head_dim=H)


@pytest.fixture
def selecting_pays():
    """The rule itself, not conftest.py's stand-in."""


@pytest.fixture(scope="module")
def tree():
    config = squeezejax.SqueezeConfig.paper(cluster_fractions=(0.2,), observation_window=W)
    keys, values, queries = (jax.random.normal(jax.random.key(i), (L, K * (1 + i // 2), S + W, H)) for i in range(3))
    labels = (np.broadcast_to(np.arange(S) // 5, (L, K, S)),)
    tree = squeezejax.build_tree(keys, values, config, labels=labels)
    return squeezejax.calibrate(tree, jnp.tile(queries[:, : K * G // 2], (1, 2, 1, 1)))


def large(tree, keys: int):
    """The tree as the rule sees it at another length; nothing else looks at it."""
    return dataclasses.replace(tree, num_keys=keys)


@pytest.mark.parametrize(
    ("read", "sparsity", "falls_back"),
    [
        (1e12, 0.54, True),  # 0.10 + 2 · 0.46 = 1.02
        (1e12, 0.56, False),  # 0.10 + 2 · 0.44 = 0.98
        (60e6, 0.79, True),  # 0.10 + 2 · 0.21 + 0.5 = 1.02
        (60e6, 0.81, False),  # 0.10 + 2 · 0.19 + 0.5 = 0.98
        (30e6, 0.999, True),
        (1e3, 1.0, False),  # window only, by definition
        (1e3, 1.5, False),
        (1e12, 0.0, True),
    ],
)
def test_rule_by_hand(tree, monkeypatch, read, sparsity, falls_back):
    monkeypatch.setattr(fallback, "LOOK_UP", 0.10)
    monkeypatch.setattr(fallback, "READ_BY_LIST", 2.0)
    monkeypatch.setattr(fallback, "OVERHEAD", 30e6)
    log_T = jnp.array([-3.0])
    rule = jax.jit(
        lambda sparsity: fallback.dense_if_cheaper(large(tree, int(read / (2 * K * H * 4))), sparsity, log_T)
    )
    assert (rule(sparsity)[0] == -jnp.inf) == falls_back
    assert falls_back or rule(sparsity)[0] == log_T[0]


def test_the_rule_of_accelerators(tree):
    """By hand, without codes: 0.2 + 2 · kept + 250e6 / bytes; a question's tokens read every key in any case."""
    large_tree = large(tree, int(1e9 / (2 * K * H * 4)))  # 0.45 + 2 · kept
    with registry.force_wide():
        dense = [bool(fallback.falls_back(large_tree, sparsity)[0]) for sparsity in (0.71, 0.74, 1.0)]
        one, block = thresholds(large_tree, 0.9, None)
        nothing = thresholds(large_tree, 1.0, None)
        per_user = thresholds(large_tree, np.array([0.9, 1.0]), None)
    assert dense == [True, False, False]
    assert np.all(np.isfinite(one))
    assert np.all(block == -np.inf)
    assert np.all(nothing[1] == np.inf)
    np.testing.assert_array_equal(per_user[1], [[-np.inf], [np.inf]])
    assert thresholds(large_tree, 0.9, None)[1] is None  # on this machine


def test_blocks_read_every_key_and_tokens_select(tree):
    """A token of a block by itself still selects: only blocks are dense."""
    reading = Reading(jnp.array([-3.0]), jnp.array([-jnp.inf]))
    np.testing.assert_array_equal(reading.log_T_of(jnp.array([1.0, 2.0]), W), [[-3.0], [-np.inf]])
    assert reading.dense_blocks
    assert not Reading(jnp.array([-3.0])).dense_blocks


def test_every_user_falls_back_alone(tree, monkeypatch):
    monkeypatch.setattr(fallback, "OVERHEAD", 0.0)
    found = fallback.dense_if_cheaper(tree, np.array([0.3, 0.9, 1.0]), jnp.full((3, 1), -3.0))
    np.testing.assert_array_equal(found, [[-np.inf], [-3.0], [-3.0]])


def test_why_dense(tree, monkeypatch):
    why = fallback.why_dense(tree, 0.9, None)
    assert why.startswith("in a text of 60 keys, at sparsity 0.9, choosing keys would take longer")
    assert fallback.why_dense(tree, 0.9, "xla") is fallback.why_dense(tree, 1.0, None) is None
    assert fallback.why_dense(tree, 0.0, "xla") == "sparsity 0 was asked for"
    monkeypatch.setattr(fallback, "OVERHEAD", 0.0)
    monkeypatch.setattr(fallback, "LOOK_UP", 0.1)
    shapes = jax.eval_shape(lambda: tree)  # all that a plan has
    assert fallback.why_dense(shapes, 0.9, None) is None
    assert "choosing keys" in fallback.why_dense(shapes, 0.2, None)


def test_a_plan_says_so(tree):
    params = jax.eval_shape(lambda key: Llama(MODEL, key=key), jax.random.key(0))
    made = squeezejax.plan(params, S + W, tree.config)
    assert made.dense_because == fallback.why_dense(tree, made.sparsity, None)
    assert squeezejax.plan(params, 10**7, tree.config).dense_because is None
    assert f"answers   densely: {made.dense_because}" in plan_lines(made, params)
    assert not any(
        line.startswith("answers") for line in plan_lines(squeezejax.plan(params, 10**7, tree.config), params)
    )


def test_selection_attention_and_answers_say_so(tree):
    q = jax.random.normal(jax.random.key(3), (1, 3, K * G, H))
    k, v = jax.random.normal(jax.random.key(4), (2, 1, 3, K, H))
    explicit = squeezejax.log_thresholds(tree, 0.9)
    assert squeezejax.select(tree, q[0], layer=1, sparsity=0.9).key_mask(tree).all()
    assert squeezejax.select(tree, q[0], layer=1).key_mask(tree).all()
    assert not squeezejax.select(tree, q[0], layer=1, log_thresholds=explicit).key_mask(tree).all()
    assert not squeezejax.select(tree, q[0], layer=1, sparsity=1.0).key_mask(tree).any()

    out = {
        name: squeezejax.attend(tree, q, k, v, layer=1, **options)[0]
        for name, options in {
            "fell back": {"sparsity": 0.9},
            "dense": {"sparsity": 0.0, "implementation": "xla"},
            "named": {"sparsity": 0.9, "implementation": "xla"},
            "explicit": {"log_thresholds": explicit},
        }.items()
    }
    np.testing.assert_allclose(out["fell back"], out["dense"], atol=1e-6)
    np.testing.assert_allclose(out["named"], out["explicit"], atol=1e-6)
    assert np.abs(out["named"] - out["dense"]).max() > 1e-3

    params = jax.jit(lambda key: Llama(MODEL, key=key))(jax.random.key(0, impl="unsafe_rbg"))
    ask = lambda **options: squeezejax.generate(params, tree, [1, 2, 3], max_new_tokens=3, sparsity=0.9, **options)
    assert ask().kept_fraction[0] == ask().prefill_kept_fraction[0] == 1
    assert ask().dense_because == "choosing keys would take longer than reading all"
    assert ask(implementation="xla").dense_because is None
    assert squeezejax.generate(params, tree, [1, 2, 3], max_new_tokens=3, sparsity=0.0).dense_because is None
    assert ask(implementation="xla").kept_fraction[0] < 1
    state = squeezejax.prefill(params, tree, [1, 2, 3], sparsity=0.9)
    assert state.kept_fraction[0] == squeezejax.decode(params, tree, state, 2, sparsity=0.9)[0].kept_fraction[0] == 1
