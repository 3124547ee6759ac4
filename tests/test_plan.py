"""The plan against arithmetic by hand, real arrays and compiled programs; and refusing what cannot fit."""

import dataclasses
import functools
import gc
import importlib
import json
import os
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import squeezejax
from squeezejax import memory
from squeezejax.command_line import cli
from squeezejax.models.config import LlamaConfig
from squeezejax.models.llama import Llama
from squeezejax.offline import build
from squeezejax.online.generate import _decode, empty_state
from squeezejax.online.reading import reading_of
from squeezejax.online.sampling import sampling_of
from squeezejax.plan import plan, tree_shapes

MODEL = LlamaConfig(
    vocab_size=64, model_dim=32, mlp_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, qkv_bias=True
)
CONFIG = squeezejax.SqueezeConfig.paper(cluster_fractions=(0.05, 0.2), observation_window=10)
TOKENS = 210


@pytest.fixture(scope="module")
def params():
    return Llama(MODEL, key=jax.random.key(0), dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def tree(params):
    return squeezejax.squeeze(params, np.arange(TOKENS) % 64, CONFIG)


def test_by_hand():
    """One layer, one head: 1,000 clustered keys of dimension 4 in bfloat16, 100 clusters, two users of 30 tokens."""
    sizes = {"vocab_size": 10, "model_dim": 4, "mlp_dim": 6, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    abstract = jax.eval_shape(lambda: Llama(LlamaConfig(**sizes, head_dim=4), key=jax.random.key(0), dtype="bfloat16"))
    config = squeezejax.SqueezeConfig.paper(cluster_fractions=(0.1,), observation_window=20)
    made = plan(abstract, 1020, config, users=2, room=30, sparsity=0.75)
    blocks = 4 * 4 * 4 + 3 * 4 * 6 + 2 * 4  # attention, MLP, norms
    assert made.clusters == (100,)
    assert made.memory.weights == 2 * (10 * 4 + blocks + 4 + 10 * 4)
    assert made.memory.keys_values == 2 * 1000 * 4 * 2
    assert made.memory.window == 2 * 20 * 4 * 2
    assert made.memory.centroids == 100 * 4 * 4
    table = 1001 + 90 + 2 * 100  # the grid's points, those of its finer end, two steps a cluster
    assert made.memory.index == 4 * 1000 + 3 * 4 * 100 + 4 * 2 * table + 32
    # Keys and values, the tokens behind them, logits, lengths and kept fractions.
    assert made.memory.state == 2 * 2 * 30 * 4 * 2 + 4 * 2 * 30 + 4 * 2 * 10 + 2 * 4 * 2
    assert made.dense.keys_values == made.memory.keys_values
    assert made.dense.weights == made.memory.weights - 2 * 10 * 4  # of the embedding, a row a user
    assert made.squeezed.keys_values == 0.25 * made.memory.keys_values * 2  # each user reads keys of its own
    assert made.squeezed.centroids == (100 * (4 * 4 + 2 * 4),)  # once for all users: means, counts, starts
    assert made.squeezed.own == 2 * 2 * 30 * 4 * 2


def test_children_of_the_kept_are_scored():
    """Margin 4 at sparsity 0.9: the coarse level keeps 0.4 of the keys, and as many of the fine centroids are read."""
    abstract = jax.eval_shape(lambda: Llama(MODEL, key=jax.random.key(0)))
    made = plan(abstract, TOKENS, CONFIG, users=2, sparsity=0.9)
    coarse, fine = made.squeezed.centroids
    assert made.clusters == (10, 40)
    assert coarse == 3 * 2 * 10 * (16 * 4 + 4 * 4)  # layers, heads; and numbers of children
    assert fine == pytest.approx(2 * 0.4 * 3 * 2 * 40 * (16 * 4 + 2 * 4), abs=1)
    assert plan(abstract, TOKENS, CONFIG, users=2, sparsity=0).squeezed == made.dense


@pytest.mark.parametrize("fractions", [(0.2,), (0.05, 0.2)])
def test_tree_and_weights_are_what_is_planned(fractions, params, tree):
    config = squeezejax.SqueezeConfig.paper(cluster_fractions=fractions, observation_window=10)
    tree = tree if config == CONFIG else squeezejax.squeeze(params, np.arange(TOKENS) % 64, config)
    made = plan(params, TOKENS, config).memory
    assert made.tree == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert made.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert jax.tree.map(np.shape, tree_shapes(params, TOKENS, config)) == jax.tree.map(np.shape, tree)


def test_a_compiled_decode_takes_what_is_planned():
    """Arguments to the byte, temporaries within 15 %."""
    sizes = {"vocab_size": 512, "model_dim": 256, "mlp_dim": 512, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4}
    abstract = jax.eval_shape(lambda: Llama(LlamaConfig(**sizes, head_dim=32), key=jax.random.key(0)))
    made = plan(abstract, 8192, CONFIG, users=2, room=2048).memory
    tree = tree_shapes(abstract, 8192, CONFIG)
    state = jax.eval_shape(lambda *made: empty_state(*made, 2, 2048), abstract, tree)

    def decode(params, tree, state, sparsity):
        reading = reading_of(tree, sparsity=sparsity, implementation="xla")
        return _decode(params, tree, state, reading, sampling_of(0.0, None, None, None, ()), 8, 8)

    program = jax.jit(decode, keep_unused=True).lower(abstract, tree, state, jax.ShapeDtypeStruct((), jnp.float32))
    used = program.compile().memory_analysis()
    assert used.argument_size_in_bytes == made.answering + 4
    assert used.temp_size_in_bytes == pytest.approx(made.temporaries, rel=0.15)


def test_a_build_needs_its_floor(params, monkeypatch):
    """While the last layer is clustered, at least the floor is alive, and little more."""
    module, alive = importlib.import_module("squeezejax.offline.squeeze"), []

    def build_layer(*arguments, **options):
        layer = build.build_layer(*arguments, **options)
        alive.append(sum(x.nbytes for x in jax.live_arrays()))
        return layer

    monkeypatch.setattr(module, "build_layer", build_layer)
    gc.collect()
    others = sum(x.nbytes for x in jax.live_arrays()) - sum(x.nbytes for x in jax.tree.leaves(params))
    squeezejax.squeeze(params, np.arange(TOKENS) % 64, CONFIG)
    floor = plan(params, TOKENS, CONFIG).memory.build_floor
    assert floor <= max(alive) - others < 1.1 * floor


def test_clustering_takes_about_what_is_planned():
    """Temporaries of the compiled clustering of one layer, within 30 %."""
    config = squeezejax.SqueezeConfig.paper(cluster_fractions=(0.05,))
    model = dataclasses.replace(MODEL, num_layers=1, head_dim=64)
    abstract = jax.eval_shape(lambda: Llama(model, key=jax.random.key(0), dtype=jnp.bfloat16))
    rows = jax.ShapeDtypeStruct((2, 4100, 64), jnp.bfloat16)
    program = build.build_layer.lower(rows, rows, config, jax.random.key(0), build.clustering_of(config)).compile()
    made = plan(abstract, 4100, config).memory
    assert program.memory_analysis().temp_size_in_bytes == pytest.approx(made.build_peak - made.build_floor, rel=0.3)


def test_the_index_by_hand():
    """The default index: one layer, one head, 1,000 clustered keys of dimension 4, 50 clusters in 4 bits.

    There is room for 1,024 keys and 51 clusters (buckets.py).
    """
    sizes = {"vocab_size": 10, "model_dim": 4, "mlp_dim": 6, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    abstract = jax.eval_shape(lambda: Llama(LlamaConfig(**sizes, head_dim=4), key=jax.random.key(0), dtype="bfloat16"))
    config = squeezejax.SqueezeConfig(observation_window=20)
    made = plan(abstract, 1024, config, users=2, room=30, sparsity=0.9)
    assert made.clusters == (50,)
    assert made.memory.window == 2 * 24 * 4 * 2
    assert made.memory.centroids == 51 * (4 + 2 + 2) + 4 * 4  # codes of 4 bits (dimensions by eights), step, spread
    assert made.memory.key_codes == 1024 * (2 + 2)
    # The grid's points, what each misses, thresholds of clusters and keys, of a token and of a window; a and b of
    # two query heads.
    table = 1001 + 90
    assert made.memory.index == 4 * 1024 + 3 * 4 * 51 + 4 * (1 + 1 + 4) * table + 2 * 2 * 4 + 32
    assert made.squeezed.centroids == (51 * (4 + 2 + 2 + 2 * 4) + 4 * 4,)  # once for all users
    assert made.squeezed.key_codes == pytest.approx(0.3 * 1000 * 4 * 2, abs=1)  # candidates, of each user
    assert made.squeezed.keys_values == pytest.approx(0.1 * 2 * 1000 * 4 * 2 * 2, abs=1)
    assert made.dense.key_codes == 0
    whole = plan(abstract, 1024, dataclasses.replace(config, key_bits=0), sparsity=0.9)
    assert (whole.memory.key_codes, whole.squeezed.key_codes) == (0, 0)
    assert whole.squeezed.keys_values == pytest.approx(0.1 * 2 * 1000 * 4 * 2, abs=1)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_tree_of_the_index_is_what_is_planned(levels, params):
    fractions = ((0.2,), (0.05, 0.2))[levels - 1]
    config = squeezejax.SqueezeConfig(cluster_fractions=fractions, observation_window=10, cluster_segment=None)
    tree = squeezejax.squeeze(params, np.arange(TOKENS) % 64, config)
    made = plan(params, TOKENS, config).memory
    assert made.tree == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert jax.tree.map(np.shape, tree_shapes(params, TOKENS, config)) == jax.tree.map(np.shape, tree)
    divided = tree_shapes(params, TOKENS, config, parts=3)
    assert divided.keys.shape[2] == divided.key_codes.shape[2] >= tree.keys.shape[2]
    assert divided.levels[0].offset.shape == tree.levels[0].offset.shape


# ---- The command


def test_command(capsys):
    """Only config.json is read; the example of the README, a 70B model on eight devices."""
    example = os.path.join(os.path.dirname(__file__), "..", "benchmarks", "llama_70b")
    line = f"plan --model {example} --context-tokens 1000000 --mesh model=8 --device-memory 141 --bandwidth 4800"
    assert cli.main(line.split()) == 0
    out = capsys.readouterr().out
    assert re.search(r"weights +17\.641 GB", out)  # 70.55 G parameters of 2 bytes over 8 devices
    # 80 layers · 1,015,808 rows, of which 999,896 are real, · 128 · 2 · 2 bytes, a head each
    assert re.search(r"keys and values +41\.607 GB +4\.096 GB", out)
    assert re.search(r"the device has +141\.000 GB  fits", out)
    assert re.search(r"161 × hidden states.* 5\.259 MB in all", out)  # 2 · 80 of 8,192 float32, one of bfloat16
    assert max(map(len, out.splitlines())) < 100
    assert cli.main([*line.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["window"] == 80 * 104 * 128 * 2 * 2  # 4 sinks
    small = line.replace("--device-memory 141", "--device-memory 40")
    assert cli.main(small.split()) == 1
    assert re.search(r"too little; about \d{3},\d{3} tokens would fit", capsys.readouterr().out)
    assert cli.main(line.replace("model=8", "model=3").split()) == cli.BAD_INPUT
    assert "8 key/value heads cannot be divided among 3 devices" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(line.replace("model=8", "heads=8").split())
    assert "--mesh: must be axes data, model, context with sizes, model=8, got 'heads=8'" in capsys.readouterr().err


# ---- Refusing what cannot fit


def test_what_cannot_fit_is_refused_before_it_starts(params, tree, tmp_path, monkeypatch):
    """A device with room for the weights and no more: every public entry says what is needed, had, and to do."""
    tokens = np.arange(5)
    squeezejax.save(tmp_path / "tree", tree)
    weights = memory.bytes_per_device(params)
    monkeypatch.setattr(memory, "device_limit", lambda _: weights + 1000)
    refused = functools.partial(pytest.raises, ValueError)
    floor = memory.readable_bytes(plan(params, TOKENS, CONFIG).memory.build_floor)
    with refused(match=rf"squeezing 210 tokens needs at least {floor} on each device \(weights 73\.92 kB, the tree"):
        squeezejax.squeeze(params, np.arange(TOKENS) % 64, CONFIG)
    with refused(match=r"loading the tree needs at least .* cpu:0 can give 74\.92 kB: use more devices"):
        squeezejax.load(tmp_path / "tree", params)
    with refused(match=r"answering 1 users of 96 tokens needs at least .* use fewer users or tokens"):  # rounded up
        squeezejax.generate(params, tree, tokens, max_new_tokens=20)
    with refused(match="answering 1 users of 128 tokens"):
        squeezejax.prefill(params, tree, tokens, capacity=4)
    monkeypatch.setattr(memory, "device_limit", lambda _: None)  # nobody knows: nothing is refused
    assert squeezejax.load(tmp_path / "tree", params).num_keys == tree.num_keys


def test_the_limit_of_a_device():
    """On the CPU what the system has and no more; on others what their allocator says."""
    (device,) = jax.local_devices()
    assert os.sysconf("SC_PAGE_SIZE") < memory.device_limit(device) * jax.local_device_count()
    stats = {"bytes_limit": 7, "bytes_in_use": 3}
    assert memory.device_limit(SimpleNamespace(platform="gpu", memory_stats=lambda: stats)) == 7
    assert memory.device_limit(SimpleNamespace(platform="tpu", memory_stats=lambda: None)) is None
