"""Reverse-mode gradients: those of dense attention to exactly the keys that are kept."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads

import squeezejax
from squeezejax import SqueezeConfig

S, W, SINKS, T, OLD = 40, 6, 4, 5, 2
CODES = SqueezeConfig(cluster_fractions=(0.3,), sinks=SINKS, observation_window=W, query_block=3, sparsity=0.6)
PAPER = SqueezeConfig.paper(cluster_fractions=(0.1, 0.3), observation_window=W, query_block=2, sparsity=0.6)
TREES = {"codes": (CODES, (12,)), "hierarchy": (PAPER, (4, 12))}
RNG = np.random.default_rng(11)
CONTEXT = RNG.integers(0, 31, SINKS + S + W)


@pytest.fixture(scope="module")
def params():
    return oracle.make_model(sharpness=1.0)


@pytest.fixture(scope="module")
def trees(params):
    return {
        name: oracle.model_tree(params, CONTEXT, config, clusters=clusters)
        for name, (config, clusters) in TREES.items()
    }


def fixed_keys(tree, layer):
    """Keys and values [K S H] in their original order."""
    at = jnp.argsort(jnp.where(tree.order[layer] < 0, tree.num_keys, tree.order[layer]))[:, : tree.num_keys]
    return (jnp.take_along_axis(x[layer], at[:, :, None], axis=1) for x in (tree.keys, tree.values))


def dense(tree, q, k, v, layer, sparsity):
    """Attention of q [T N H], the last of the own tokens k, v [T' K H], written down plainly -> (out, lse)."""
    K, G, block = k.shape[1], q.shape[1] // k.shape[1], tree.config.query_block or len(q)
    fixed = [*fixed_keys(tree, layer)]
    old, outs, lses = len(k) - len(q), [], []
    for first in range(0, len(q), block):
        part = q[first : first + block]
        kept = squeezejax.select(tree, jax.lax.stop_gradient(part), layer=layer, sparsity=sparsity).key_mask(tree)
        own = jnp.arange(len(k))[None, :] <= old + first + jnp.arange(len(part))[:, None]
        window = jnp.ones((len(part), tree.window_keys.shape[2]), bool)
        for head in range(K):
            keys, values = (
                jnp.concatenate([x[head], w[layer, head], mine[:, head]])
                for x, w, mine in zip(fixed, (tree.window_keys, tree.window_values), (k, v), strict=True)
            )
            mask = jnp.concatenate([jnp.broadcast_to(kept[head], (len(part), tree.num_keys)), window, own], axis=1)
            scores = jnp.einsum("TGH,SH->TGS", part[:, head * G : (head + 1) * G], keys) / math.sqrt(q.shape[-1])
            scores = jnp.where(mask[:, None, :], scores, -jnp.inf)
            lses.append(jax.nn.logsumexp(scores, axis=-1))
            outs.append(jnp.einsum("TGS,SH->TGH", jax.nn.softmax(scores, axis=-1), values))
    of_blocks = lambda xs: jnp.concatenate([jnp.concatenate(xs[i : i + K], axis=1) for i in range(0, len(xs), K)])
    return of_blocks(outs), of_blocks(lses)


def weigh(results, seed: int = 0):
    """A number that depends on all of some arrays."""
    rng = np.random.default_rng(seed)
    return sum(jnp.sum(x * rng.normal(size=x.shape).astype(np.float32)) for x in results)


@pytest.mark.parametrize(("kind", "sparsity"), [("codes", 0.0), ("codes", 0.6), ("codes", 1.0), ("hierarchy", 0.6)])
def test_attend(params, trees, kind, sparsity):
    """Of two users after earlier tokens of theirs, by q, and by the users' keys and values."""
    tree = trees[kind]
    H, N, K = params.config.head_dim, params.config.num_heads, params.config.num_kv_heads
    q, k, v = (
        jnp.asarray(RNG.normal(size=(2, length, heads, H)), jnp.float32)
        for length, heads in ((T, N), (T + OLD, K), (T + OLD, K))
    )
    attend = functools.partial(squeezejax.attend, tree, layer=1, sparsity=sparsity, implementation="xla")
    ours = lambda *own: weigh(attend(*own))

    def plain(q, k, v):
        users = [dense(tree, q[b], k[b], v[b], 1, sparsity) for b in range(2)]
        return weigh(jax.tree.map(lambda *xs: jnp.stack(xs), *users))

    np.testing.assert_allclose(ours(q, k, v), plain(q, k, v), rtol=1e-4)
    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (ours, plain))
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)
    assert all(np.abs(x).max() > 0.01 for x in found)
    if sparsity == 0.6:
        assert 0.05 < np.mean(squeezejax.select(tree, q[0], layer=1, sparsity=0.6).key_mask(tree)) < 0.95
        check_grads(ours, (q, k, v), order=1, modes=["rev"], atol=0.05, rtol=0.05, eps=1e-3)


def test_prefill(params, trees):
    """Of the logits after a second turn, by every weight."""
    tree = trees["codes"]
    first, second = np.array([[3, 1, 4]]), np.array([[1, 5, 9, 2, 6]])
    options = {"sparsity": 0.6, "implementation": "xla"}

    def ours(params):
        state = squeezejax.prefill(params, tree, first, capacity=8, **options)
        return weigh([squeezejax.prefill(params, tree, second, state=state, capacity=0, **options).logits])

    def plain(params):
        caches = [None] * params.config.num_layers
        for tokens, start in ((first, 0), (second, 3)):
            x, positions = params.embed(tokens), tree.context_length + start + jnp.arange(tokens.shape[1])[None, :]
            for i in range(params.config.num_layers):

                def attend(q, k, v, i=i):
                    if caches[i] is not None:
                        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(caches[i], (k, v), strict=True))
                    return (k, v), dense(tree, q[0], k[0], v[0], i, 0.6)[0][None]

                x, caches[i] = params.apply_layer(params.layer(i), x, positions, attend)
        return weigh([params.unembed(x)[:, -1]])

    np.testing.assert_allclose(ours(params), plain(params), rtol=1e-3, atol=1e-3)
    found, expected = (jax.jit(jax.grad(f))(params) for f in (ours, plain))
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        ours = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        scale = float(np.abs(leaf).max())
        assert scale > 0, path
        np.testing.assert_allclose(ours, leaf, atol=2e-3 * scale, err_msg=str(path))


def test_nothing_flows_to_the_tree_and_the_sparsity(params, trees):
    tree = trees["codes"]
    q = jnp.ones((1, 2, params.config.num_heads, params.config.head_dim))
    k = jnp.ones((1, 2, params.config.num_kv_heads, params.config.head_dim))

    def cost(keys, sparsity):
        changed = dataclasses.replace(tree, keys=keys)
        return weigh(squeezejax.attend(changed, q, k, k, layer=0, sparsity=sparsity, implementation="xla"))

    found = jax.grad(cost, argnums=(0, 1))(tree.keys, 0.6)
    chex.assert_trees_all_equal(found, jax.tree.map(jnp.zeros_like, found))
