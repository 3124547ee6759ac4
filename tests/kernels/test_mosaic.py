"""How many CTAs kernels get: as many as the device that they are compiled for has multiprocessors, here or not."""

import importlib.util
import json
import types

import jax
import pytest
from processes import run_python

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

from squeezejax.pallas_kernels.hopper import mosaic, sparse_decode


def test_ctas_follow_the_device():
    small = types.SimpleNamespace(platform="gpu", core_count=114)  # an H100 PCIe
    with mosaic.compile_for(small):
        assert mosaic.count_ctas(2) == 228
        assert sparse_decode.default_config(128, 4).num_ctas == 114
    with pytest.raises(NotImplementedError, match="need a GPU"):
        mosaic.count_ctas(1)


PROGRAM = """
import json, re, sys
from benchmarks.gpu import deviceless
import jax, jax.numpy as jnp
from squeezejax.pallas_kernels.hopper import sparse_prefill
deviceless.TARGET_TEXT = deviceless.TARGET_TEXT.replace("core_count: 132", "core_count: " + sys.argv[1])
shape = jax.ShapeDtypeStruct
q, cache = shape((2, 128, 64), jnp.bfloat16), shape((1, 2, 1024, 64), jnp.bfloat16)
lists = shape((2, 128), jnp.int32), shape((2,), jnp.int32), shape((), jnp.int32)
program = deviceless.compile_program(sparse_prefill.attend_items, *deviceless.on_device((q, cache, cache, *lists)))
print(json.dumps([kernel.blocks for kernel in program.kernels]))
"""


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="compiling for an H200 needs jax[cuda13]")
@pytest.mark.parametrize("multiprocessors", [132, 114])
def test_deviceless_programs_take_them_from_the_target(multiprocessors):
    run = run_python("-c", PROGRAM, str(multiprocessors))
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1])[0] == multiprocessors
