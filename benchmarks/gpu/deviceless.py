"""Compiling for an H200 on a machine without a GPU, and reading what each kernel uses.

Import before anything else touches JAX. Needs `jax[cuda13]` (its plugin and compiler), no GPU.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import re
import tempfile

_DUMP = pathlib.Path(tempfile.mkdtemp(prefix="squeezejax_mosaic_"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ.update(MOSAIC_GPU_DUMP_TO=str(_DUMP), MOSAIC_GPU_DUMP_PTX="1", MOSAIC_GPU_DUMP_PTXAS="1")

from benchmarks.gpu import mosaic_code  # noqa: E402

import jax  # noqa: E402 # isort: skip
import jax.experimental.mosaic.gpu.constraints as mosaic_constraints  # noqa: E402 # isort: skip
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

# Among the dumps is a text of all that layouts have to fulfil: nobody reads it, and it takes a quarter of the time.
mosaic_constraints.ConstraintSystem.__str__ = lambda _: ""

TARGET_TEXT = pathlib.Path(__file__).with_name("h200.textproto").read_text()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the assembler says of one Mosaic kernel."""

    name: str
    registers: int
    shared_memory: int  # bytes
    spilled: int  # bytes of spill stores and loads, and of stack
    blocks: int  # CTAs of a grid of one axis
    wrong: tuple[str, ...]  # reductions of several warpgroups through the same shared memory (mosaic_code.py)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted program, compiled for an H200."""

    text: str  # optimised HLO
    temporaries: int  # bytes
    kernels: tuple[Kernel, ...]  # Mosaic kernels, in order of compilation


@functools.cache
def sharding(capability: str = "9.0") -> NamedSharding:
    """The one device that programs are compiled for: an H200, or what it would be with another compute capability."""
    major, minor = capability.split(".")
    target = re.sub(r"(cuda_compute_capability \{)[^}]*", rf"\1 major: {major} minor: {minor} ", TARGET_TEXT)
    topology = topologies.get_topology_desc("", platform="cuda", topology="1x1x1", target_config=target)
    return NamedSharding(topologies.make_mesh(topology, (1,), ("device",)), PartitionSpec())


def on_device(tree, capability: str = "9.0"):
    """Shapes and dtypes of a pytree of arrays (or of their descriptions), placed on the device to compile for."""
    place = sharding(capability)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def mesh(axes: dict[str, int]) -> Mesh:
    """H200s of one host, as many as the axes of this mesh have."""
    devices = math.prod(axes.values())
    topology = topologies.get_topology_desc("", platform="cuda", topology=f"1x1x{devices}", target_config=TARGET_TEXT)
    return topologies.make_mesh(topology, tuple(axes.values()), tuple(axes))


def on_devices(tree, shardings):
    """`on_device` for arrays that lie on a mesh."""
    describe = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.tree.map(describe, tree, shardings)


def compile_program(function, *args, out_shardings=None, capability: str = "9.0") -> Program:
    """Compiles a function of `on_device` arguments; the GPU's code is made, nothing runs."""
    for path in _DUMP.iterdir():
        path.unlink()
    from squeezejax.pallas_kernels.hopper import mosaic  # which older JAX lacks

    target = min(sharding(capability).device_set, key=lambda device: device.id)
    with _silence_stderr(), mosaic.compile_for(target):
        compiled = jax.jit(function, out_shardings=out_shardings or sharding(capability)).lower(*args).compile()
    return Program(compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes, tuple(_kernels()))


def _kernels():
    for path in sorted(_DUMP.glob("*.ptxas"), key=lambda path: int(path.stem.rsplit("_", 1)[1])):
        report = path.read_text()
        resources = path.with_suffix(".resources.txt").read_text()
        shared_memory = int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1])
        registers = int(re.search(r"[Uu]sed (\d+) registers", report)[1])
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        spilled = sum(int(n) for found in spills for n in found)
        code = path.with_suffix(".after_layout_inference.txt").read_text()
        blocks, wrong = mosaic_code.num_blocks(code), tuple(mosaic_code.shared_scratch(code))
        yield Kernel(path.stem.rsplit("_", 1)[0], registers, shared_memory, spilled, blocks, wrong)


@contextlib.contextmanager
def _silence_stderr():
    """The dump looks for a disassembler that it does not need, and complains to the file descriptor."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
