"""What the Mosaic GPU kernels share: how their memory is laid out, and interpreting them on a CPU.

Importing this needs JAX ≥ 0.11; `registry` imports it only after checking that.
"""

import contextlib
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

GRANULE = 8  # rows that a kernel reads together: the height of a swizzle tile, the least that TMA can place
TILE = 64  # rows that a CTA works on together: the height of a wgmma
HEAD_DIMS = (64, 96, 128, 192, 256)  # that kernels take
MASKED = -1e30  # a score that counts for nothing; finite, so that a lane of nothing else stays free of NaN
FLOOR = -1e20  # maxima start here, above MASKED, so that a masked score has weight exp2(MASKED − FLOOR) = 0
LOG2E = math.log2(math.e)

# Transposed scores and outputs: key rows (or head entries) down the 64 rows of a wgmma, query rows along its columns.
MATRIX = plgpu.Layout.WGMMA
DOWN = MATRIX.reduce(1)  # a vector along a MATRIX's rows
ALONG = MATRIX.reduce(0)  # a vector along a MATRIX's columns

_interpreting = False
_compiling_for = None  # a device that is not here


@contextlib.contextmanager
def interpret():
    """Kernels traced inside run on the CPU, by Pallas's interpreter, which prints RACE DETECTED where it sees one."""
    global _interpreting
    _interpreting = True
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
    finally:
        _interpreting = False


def interpreting() -> bool:
    """Whether kernels are traced for the interpreter."""
    return _interpreting


@contextlib.contextmanager
def compile_for(device):
    """Kernels traced inside are meant for a device (of `jax.experimental.topologies`), and not for one that is here."""
    global _compiling_for
    before, _compiling_for = _compiling_for, device
    try:
        yield
    finally:
        _compiling_for = before


def multiprocessors() -> int:
    """How many the device has that kernels are traced for: 132 on an H100 SXM or H200, 114 on an H100 PCIe."""
    device = _compiling_for or jax.devices()[0]
    if device.platform != "gpu":
        raise NotImplementedError(f"the kernels need a GPU, the interpreter or `compile_for`, and this is {device}")
    return device.core_count


def count_ctas(per_multiprocessor: int) -> int:
    """CTAs of a kernel that shares its work out evenly, so many a multiprocessor."""
    return 3 if _interpreting else per_multiprocessor * multiprocessors()  # interpreting takes longer with every CTA


def check_heads(head_dim: int, *dtypes):
    """Raises NotImplementedError, with the reason, for sizes and dtypes (all the same) that no kernel takes."""
    if any(dtype not in (jnp.bfloat16, jnp.float16) or dtype != dtypes[0] for dtype in dtypes):
        given = " and ".join(map(str, dtypes))
        raise NotImplementedError(f"the kernels take bfloat16 or float16 throughout, got {given}")
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"the kernels take head sizes {HEAD_DIMS}, got {head_dim}")


def check_rows(num_rows: int):
    """Raises NotImplementedError for a cache whose heads do not begin with a granule."""
    if num_rows % GRANULE:
        raise NotImplementedError(f"the kernels take caches of a multiple of {GRANULE} rows, got {num_rows}")


def load(ref, layout):
    """Reads a reference straight into registers in a WGMMA-family layout."""
    if _interpreting:  # which knows no such loads
        return plgpu.layout_cast(ref[...], layout)
    return plgpu.load(ref, layout=layout, optimized=False)


def swizzled(head_dim: int, itemsize: int = 2):
    """Shared-memory transforms of rows of head_dim numbers, or of a part of them that is written at once.

    All operands of a wgmma must share one swizzle.
    """
    tile = next(size // itemsize for size in (128, 64, 32) if head_dim % (size // itemsize) == 0)
    return plgpu.TilingTransform((GRANULE, tile)), plgpu.SwizzleTransform(tile * itemsize)


def compiler_params(*, across_warps: bool = False, approx_math: bool = True, **options) -> plgpu.CompilerParams:
    """Options of every kernel here; more may be given.

    across_warps: one of its warpgroups reduces across its warps, or to a scalar. The shared memory for that is the same
    for all warpgroups, so no second one may; without it such a reduction does not compile.
    """
    if not across_warps:
        options["reduction_scratch_bytes"] = 0
    return plgpu.CompilerParams(
        approx_math=approx_math, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **options
    )


def products(shape, *pairs):
    """In a kernel: the sum of a·b over pairs of operands, by tensor cores in one float32 accumulator."""

    def multiply(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def columns(vector, shape):
    """A vector along the columns, repeated down the rows of `shape`."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(vector, shape, [1]), MATRIX)


def rows(vector, shape):
    """A vector down the rows, repeated along the columns of `shape`."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(vector, shape, [0]), MATRIX)


def full(shape, value, layout):
    """A constant float32 array in a layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
