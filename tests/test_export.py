"""`generate` through `jax.export`: lowered here for other machines, called in another process."""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export

import squeezejax
from squeezejax.models.config import LlamaConfig, RopeConfig
from squeezejax.models.llama import Llama

SIZES = {"vocab_size": 61, "model_dim": 16, "mlp_dim": 32, "num_layers": 2, "head_dim": 8}
MODEL = LlamaConfig(**SIZES, num_heads=4, num_kv_heads=2, qk_norm=True, rope=RopeConfig(kind="linear", factor=2.0))
SQUEEZE = squeezejax.SqueezeConfig.paper(cluster_fractions=(0.1, 0.3), observation_window=8)
# What the other process knows: files, and how its parameters come about.
CALLER = """
import json, sys
import jax
import numpy as np
import squeezejax
from squeezejax.models.llama import Llama
from test_export import MODEL

program, tree, arguments = sys.argv[1:]
with open(program, "rb") as file:
    called = jax.export.deserialize(bytearray(file.read()))
with np.load(arguments) as given:
    made = called.call(Llama(MODEL, key=jax.random.key(0)), squeezejax.load(tree), *given.values())
print(json.dumps([made.tokens.tolist(), made.lengths.tolist(), made.kept_fraction.tolist()]))
"""


@pytest.fixture(scope="module")
def exported():
    """Exported from shapes alone, for three platforms; `sparsity` stays an argument."""

    def answer(params, tree, tokens, lengths, sparsity):
        options = {"lengths": lengths, "sparsity": sparsity, "implementation": "xla"}
        return squeezejax.generate(params, tree, tokens, max_new_tokens=6, stop_tokens=(0, 1), **options)

    given = (_params(), _tree(), *_arguments().values())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    return export.export(jax.jit(answer), platforms=("cpu", "cuda", "tpu"))(*shapes)


@functools.cache
def _params():
    return Llama(MODEL, key=jax.random.key(0))


@functools.cache
def _tree():
    return squeezejax.squeeze(_params(), np.arange(90) * 7 % 61, SQUEEZE)


def _arguments():
    tokens = np.array([[5, 6, 7, 8], [9, 10, 0, 0]], np.int32)
    return {"tokens": tokens, "lengths": np.array([4, 2], np.int32), "sparsity": np.float32(0.6)}


def test_another_process_generates_the_same_tokens(exported, tmp_path):
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    (tmp_path / "program").write_bytes(exported.serialize())
    squeezejax.save(tmp_path / "tree", _tree())
    np.savez(tmp_path / "arguments.npz", **_arguments())
    files = [str(tmp_path / name) for name in ("program", "tree", "arguments.npz")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", CALLER, *files]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    tokens, lengths, kept = json.loads(ran.stdout)
    expected = squeezejax.generate(
        _params(), _tree(), max_new_tokens=6, stop_tokens=(0, 1), implementation="xla", **_arguments()
    )
    assert tokens == expected.tokens.tolist()
    assert lengths == expected.lengths.tolist()
    np.testing.assert_allclose(kept, expected.kept_fraction, rtol=1e-6)
    assert 0 < min(kept) < max(kept) < 1  # something was selected, and not the same for both users


def test_a_program_is_for_one_model(exported):
    """JAX compares the static fields that were written down, the model's among them."""
    read = export.deserialize(bytearray(exported.serialize()))
    assert read.in_tree == exported.in_tree
    assert read.out_tree == exported.out_tree
    other = Llama(LlamaConfig(**SIZES, num_heads=4, num_kv_heads=2, qk_norm=True), key=jax.random.key(0))
    with pytest.raises(ValueError, match="same pytree structure as when the function"):
        read.call(other, _tree(), *_arguments().values())
