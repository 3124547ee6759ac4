"""Which implementation `None` means: the kernels only where they can run and have agreed with float64 there."""

import jax
import jax.numpy as jnp
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

from types import SimpleNamespace

from squeezejax import SqueezeConfig
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.hopper import self_check
from squeezejax.pallas_kernels.interface import Own, Reading


def arguments(dtype=jnp.bfloat16, context=None, reading=Reading(), **changes):  # noqa: B008 - frozen
    """What a decode step is handed: one token of one user, 8 query and 2 key/value heads of 128."""
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, dtype)
    level = SimpleNamespace(centroids=jax.ShapeDtypeStruct((1, 2, 20, 128), jnp.float32), codes=None)
    config = SqueezeConfig.paper(**changes)
    tree = SimpleNamespace(config=config, levels=[level], keys=shape(1, 2, 512, 128), window_keys=shape(1, 2, 16, 128))
    own = Own(shape(1, 8, 2, 128), shape(1, 8, 2, 128), None, None)
    return tree, shape(1, 1, 2, 4, 128), own, reading, context


def chosen(implementation, *more, **changes):
    return registry.choose(implementation, "decode", *arguments(*more, **changes)).name


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    """As if a Hopper GPU were here; what is proved is forgotten afterwards."""
    with registry.force_mosaic():
        registry.proved.cache_clear()
        yield
        registry.proved.cache_clear()


def test_none_is_plain_xla_without_a_gpu(monkeypatch):
    monkeypatch.setattr(registry._hopper, "forced", False)
    assert registry.resolve(None) == "xla"
    assert chosen("xla") == "xla"
    with pytest.raises(NotImplementedError, match="Hopper"):
        registry.resolve("mosaic")


def test_none_chooses_kernels_that_pass_their_check_once_for_each_size(monkeypatch):
    calls = []

    def check(*sizes):
        # Values are concrete, though the caller is tracing.
        calls.append((sizes, float(jax.jit(lambda x: x + 1)(jnp.float32(1.0)))))

    monkeypatch.setattr(self_check, "decode_step", check)
    found = []

    @jax.jit
    def traced(x):
        found.append(chosen(registry.resolve(None)))
        return x + 1

    traced(jnp.float32(0.0))
    found.append(chosen(registry.AUTO))
    assert found == ["mosaic", "mosaic"]
    assert calls == [((128, 4, "bfloat16"), 2.0)]


def test_kernels_that_fail_their_check_are_not_chosen(monkeypatch):
    def check(*_):
        raise ArithmeticError("outputs are wrong")

    monkeypatch.setattr(self_check, "decode_step", check)
    with pytest.warns(RuntimeWarning, match="plain XLA runs instead: outputs are wrong"):
        assert chosen(registry.AUTO) == "xla"
    assert chosen(registry.AUTO) == "xla"  # without another warning
    assert chosen("mosaic") == "mosaic"  # a name means that one


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": jnp.float32},
        {"context": "context"},
        {"reading": Reading(tail=True)},
        {"score": "variance"},
        {"cache_bits": 8},
    ],
    ids=["float32", "a split context", "estimates", "our rule with plain means", "8 bits"],
)
def test_what_kernels_cannot_take_is_left_to_xla_or_refused(monkeypatch, changes):
    monkeypatch.setattr(self_check, "decode_step", lambda *_: pytest.fail("nothing to check"))
    with pytest.raises(NotImplementedError, match="the kernels"):
        chosen("mosaic", **changes)
    assert chosen(registry.AUTO, **changes) == "xla"


def by_our_rule(H=128, dtype=jnp.bfloat16, **changes):
    """`arguments` of a tree with the default index."""
    tree, q, own, *rest = arguments()
    config = SqueezeConfig(**changes)
    packed = lambda bits: jax.ShapeDtypeStruct((1, 2, 64, bits * H // 8), jnp.uint8)
    shape = lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], H), dtype)
    levels = [SimpleNamespace(centroids=None, codes=packed(config.index_bits))]
    tree = SimpleNamespace(
        config=config, levels=levels, key_codes=packed(config.key_bits), keys=shape(tree.keys), window_keys=shape(q)
    )
    return tree, shape(q), Own(shape(own.keys), shape(own.values), None, None), *rest


def test_the_default_index_is_decoded_by_kernels_and_prefilled_by_xla():
    hopper = registry._hopper
    assert hopper.check("decode", *by_our_rule()) == (128, 4, "bfloat16", 4, 2)
    assert hopper.check("decode", *by_our_rule(64, jnp.float16, index_bits=8, key_bits=4)) == (64, 4, "float16", 8, 4)
    with pytest.raises(NotImplementedError, match="blocks of tokens take trees of the paper's rule"):
        hopper.check("prefill", *by_our_rule())
    with pytest.raises(NotImplementedError, match="multiples of 16 bytes, got index_bits=4 and key_bits=1 of 64"):
        hopper.check("decode", *by_our_rule(64, key_bits=1))
    with pytest.raises(NotImplementedError, match="codes of head sizes"):
        hopper.check("decode", *by_our_rule(192))
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        hopper.check("decode", *by_our_rule(dtype=jnp.int8))


def test_a_third_party_comes_first(monkeypatch):
    monkeypatch.setattr(registry, "_backends", list(registry._backends))
    theirs = SimpleNamespace(
        name="theirs", missing=lambda: None, check=lambda task, *_: None, prove=None, layout=registry._hopper.layout
    )
    registry.register(theirs)
    assert registry.resolve("theirs") == "theirs"
    assert chosen(registry.resolve(None)) == "theirs"
    assert chosen("xla") == "xla"
