"""Which implementation `None` means: the kernels only where they can run and have agreed with float64 there."""

import jax
import jax.numpy as jnp
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.hopper import decode, self_check

Q = jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.bfloat16)
KEYS = jax.ShapeDtypeStruct((1, 2, 512, 128), jnp.bfloat16)
WIDE = (jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.float32), jax.ShapeDtypeStruct((1, 2, 512, 128), jnp.float32))


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    """As if a Hopper GPU were here; what is proved is forgotten afterwards."""
    with registry.force_mosaic():
        registry.proved.cache_clear()
        yield
        registry.proved.cache_clear()


def test_none_is_plain_xla_without_a_gpu(monkeypatch):
    monkeypatch.setattr(registry, "_forced", False)
    assert registry.resolve(None) == "xla"
    assert registry.decode_kernels("xla", Q, KEYS) is None
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
        found.append(registry.decode_kernels(registry.resolve(None), Q, KEYS))
        return x + 1

    traced(jnp.float32(0.0))
    found.append(registry.decode_kernels(registry.AUTO, Q, KEYS))
    assert found == [decode, decode]
    assert calls == [((128, 4, "bfloat16"), 2.0)]


def test_kernels_that_fail_their_check_are_not_chosen(monkeypatch):
    def check(*_):
        raise ArithmeticError("outputs are wrong")

    monkeypatch.setattr(self_check, "decode_step", check)
    with pytest.warns(RuntimeWarning, match="plain XLA runs instead: outputs are wrong"):
        assert registry.decode_kernels(registry.AUTO, Q, KEYS) is None
    assert registry.decode_kernels(registry.AUTO, Q, KEYS) is None  # without another warning
    assert registry.decode_kernels("mosaic", Q, KEYS) is decode  # a name means that one


@pytest.mark.parametrize(("arrays", "split"), [(WIDE, False), ((Q, KEYS), True)])
def test_what_kernels_cannot_take_is_left_to_xla_or_refused(monkeypatch, arrays, split):
    monkeypatch.setattr(self_check, "decode_step", lambda *_: pytest.fail("nothing to check"))
    assert registry.decode_kernels(registry.AUTO, *arrays, split=split) is None
    with pytest.raises(NotImplementedError, match="take"):
        registry.decode_kernels("mosaic", *arrays, split=split)
