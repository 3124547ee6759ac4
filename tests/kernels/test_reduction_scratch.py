"""No two warpgroups of a kernel reduce across their warps through the same shared memory: read from compiled code.

Interpreters know nothing of that memory, and a GPU shows the race rarely. That the kernels in use are free of it is
part of `python -m benchmarks.gpu.compile_kernels`; here, that a race would be found.
"""

import importlib.util
import json

import jax
import pytest
from processes import run_python

if jax.__version_info__ < (0, 11) or importlib.util.find_spec("jax_plugins") is None:
    pytest.skip("compiling for an H200 needs jax[cuda13]", allow_module_level=True)

PROGRAM = """
import json, sys
from benchmarks.gpu import deviceless
import jax, jax.numpy as jnp
import jax.experimental.pallas as pl, jax.experimental.pallas.mosaic_gpu as plgpu
from squeezejax.pallas_kernels.hopper.mosaic import ALONG, DOWN, MATRIX, compiler_params, load

def reduce(warpgroups, axis, across_warps):
    "One warpgroup of two, or both, sums a matrix along an axis."
    def body(x, *outs):
        mine = jax.lax.axis_index("warpgroup")
        for i in warpgroups:
            @pl.when(mine == i)
            def _(i=i):
                found = jnp.sum(load(x, MATRIX), axis=axis)
                outs[i][...] = plgpu.layout_cast(found, (ALONG, DOWN)[axis])

    out = jax.ShapeDtypeStruct((64,), jnp.float32)
    kernel = plgpu.kernel(
        body, out_type=[out, out], num_threads=2, thread_name="warpgroup", kernel_name="reduce",
        compiler_params=compiler_params(across_warps=across_warps),
    )
    shape = deviceless.on_device(jax.ShapeDtypeStruct((64, 64), jnp.float32))
    try:
        [kernel] = deviceless.compile_program(kernel, shape).kernels
        return list(kernel.wrong)
    except Exception as error:
        return str(error)

print(json.dumps([reduce(*arguments) for arguments in json.loads(sys.argv[1])]))
"""


def test_two_warpgroups_that_reduce_through_one_scratch_are_found():
    """Down the rows, which lie in four warps, a sum needs the scratch; along the columns it does not."""
    cases = ([0, 1], 0, True), ([0], 0, True), ([1], 0, True), ([0, 1], 1, True), ([0, 1], 1, False), ([0], 0, False)
    run = run_python("-c", PROGRAM, json.dumps(cases))
    assert run.returncode == 0, run.stderr[-3000:]
    both, one, other, within, guarded, refused = json.loads(run.stdout.splitlines()[-1])
    assert len(both) == 1
    assert "warpgroups (0,) and (1,) reduce through bytes" in both[0]
    assert one == other == within == guarded == []
    assert "scratch" in refused  # a kernel that does not say that it reduces across warps does not compile
