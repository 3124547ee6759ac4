"""The declared protocol of models against the one model that the library ships."""

import inspect

import jax

from squeezejax import model
from squeezejax.models import Llama, LlamaConfig


def methods(protocol):
    return {name: value for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"}


def test_llama_has_what_is_asked_of_a_model():
    for protocol in (model.Model, model.KnowsItsRope):
        for name, wanted in methods(protocol).items():
            found = inspect.signature(getattr(Llama, name)).parameters
            assert list(found) == list(inspect.signature(wanted).parameters), name


def test_its_configuration_has_every_size():
    config = LlamaConfig(vocab_size=8, model_dim=8, mlp_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4)
    params = jax.eval_shape(lambda: Llama(config, key=jax.random.key(0)))
    assert all(hasattr(params.config, name) for name in inspect.get_annotations(model.ModelConfig))
    assert params.key_frequencies().shape == (4,)
