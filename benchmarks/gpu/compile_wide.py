"""Compiles the backend "wide" for GPUs, without one, and counts: `python -m benchmarks.gpu.compile_wide`.

Launches, waits for the host and bytes of every path of one layer's step are read from the compiled program and written
to benchmarks/results/compile_wide.md, with the times that they come to under the assumptions below. Nothing runs on a
GPU. Exits with 1 where a step waits for a loop's length, or copies keys or values.
"""

import dataclasses
import pathlib
import sys

from benchmarks.gpu import deviceless  # before JAX: it sets its environment

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip

from benchmarks.gpu import program_text  # isort: skip
from benchmarks.gpu.compile_kernels import CODES, Case, tree_shapes  # isort: skip
from squeezejax.models.config import LlamaConfig  # isort: skip
from squeezejax.models.llama import Llama  # isort: skip
from squeezejax.online.attention import attend_user  # isort: skip
from squeezejax.online.generate import _decode, empty_state  # isort: skip
from squeezejax.online.sampling import sampling_of  # isort: skip
from squeezejax.pallas_kernels import registry  # isort: skip
from squeezejax.pallas_kernels.interface import Own, Reading  # isort: skip
from squeezejax.pallas_kernels.wide.attend import ROOMS  # isort: skip

TABLE = pathlib.Path(__file__).parents[1] / "results" / "compile_wide.md"
LAUNCH, WAIT = 1.5e-6, 10e-6  # seconds; assumed
EFFICIENCY = 0.85  # of the data sheet's bandwidth; assumed
INSTRUCTIONS = 2.0  # for a product of two numbers and its sum, unpacking and addresses included; assumed


@dataclasses.dataclass(frozen=True)
class Device:
    """What its data sheet says."""

    name: str
    capability: str
    bandwidth: float  # bytes a second
    rate: float  # 32-bit instructions of all lanes a second


DEVICES = (
    Device("A100", "8.0", 2.04e12, 108 * 64 * 1.41e9),
    Device("H200", "9.0", 4.8e12, 132 * 128 * 1.98e9),
    Device("B200", "10.0", 8.0e12, 148 * 128 * 1.85e9),
)
CASES = (Case(128, 4, bits=CODES), Case(128, 4), Case(128, 4, num_keys=2**19, bits=CODES))


def compile_step(case: Case, capability: str = "9.0") -> deviceless.Program:
    """One decode step of one layer as `generate` makes it, all that may be traced being so."""
    shape = jax.ShapeDtypeStruct
    B, K, H = case.users, case.kv_heads, case.head_dim
    tree = tree_shapes(case)
    tree = dataclasses.replace(tree, row_clusters=shape(tree.order.shape, jnp.int32))
    own = shape((B, case.room, K, H), case.dtype)
    arguments = (tree, shape((B, 1, K * case.group, H), case.dtype), own, own, shape((), jnp.int32),
                 shape((case.num_thresholds,), jnp.float32), *[shape((B,), jnp.int32)] * 2)  # fmt: skip

    def step(tree, q, k, v, layer, log_T, start, lengths):
        return attend_user(tree, q, Own(k, v, start, lengths), layer, Reading(log_T, implementation="wide"))

    with registry.force_wide():
        return deviceless.compile_program(step, *deviceless.on_device(arguments, capability), capability=capability)


def compile_token(case: Case, capability: str = "9.0") -> deviceless.Program:
    """The loop over generated tokens of a small random model."""
    heads = {"num_heads": case.kv_heads * case.group, "num_kv_heads": case.kv_heads, "head_dim": case.head_dim}
    config = LlamaConfig(vocab_size=512, model_dim=512, mlp_dim=1024, num_layers=case.layers, **heads)
    params = jax.eval_shape(lambda: Llama(config, key=jax.random.key(0), dtype=jnp.dtype(case.dtype)))
    tree = tree_shapes(case)
    state = jax.eval_shape(lambda *made: empty_state(*made, case.users, case.room), params, tree)
    log_T, sampling = jax.ShapeDtypeStruct((case.num_thresholds,), jnp.float32), sampling_of(0.0, None, None, None, ())

    def run(params, tree, state, log_T):
        return _decode(params, tree, state, Reading(log_T, implementation="wide"), sampling, 16, jnp.int32(16))[0]

    with registry.force_wide():
        arguments = deviceless.on_device((params, tree, state, log_T), capability)
        return deviceless.compile_program(run, *arguments, capability=capability)


def paths() -> dict[str, tuple[int, ...]]:
    """The branches that a step takes: where it reads every key, and in each room; selecting is "false"."""
    return {"every key": (1,)} | {f"room of 1/{round(1 / room)}": (0, i) for i, room in enumerate(ROOMS)}


@dataclasses.dataclass(frozen=True)
class Counted:
    """One path of a step."""

    launches: int
    waits: int
    bytes: int  # read and written, a room taken to be full
    products: float  # of queries with codes, keys and values

    def seconds(self, device: Device) -> float:
        """Predicted."""
        moving = self.bytes / (EFFICIENCY * device.bandwidth)
        return self.launches * LAUNCH + self.waits * WAIT + max(moving, self.products * INSTRUCTIONS / device.rate)


def count(case: Case, program: deviceless.Program, taken: tuple[int, ...]) -> Counted:
    """What a path comes to."""
    found = program_text.launches(program.text, taken)
    rows = case.users * case.kv_heads * case.num_keys * case.group * case.head_dim
    read = 1.0 if taken == (1,) else ROOMS[taken[1]]
    scored = rows if len(taken) == 2 and case.coded_keys else 0
    moved = sum(launch.read + launch.written for launch in found)
    return Counted(len(found), len(taken), int(moved), 2 * read * rows + scored)


def library_seconds(case: Case, device: Device) -> float:
    """Dense attention by the best library: keys and values once, at the same part of the bandwidth."""
    return 2 * case.kv_heads * case.num_keys * case.head_dim * 2 / (EFFICIENCY * device.bandwidth)


def faults(case: Case, program: deviceless.Program):
    """What is wrong with a step, in sentences."""
    unknown = [body for known, body in program_text.loops(program.text) if not known]
    if unknown:
        yield f"{case}: {len(unknown)} loops of a length that the device finds out"
    cache = 2 * case.kv_heads * case.num_keys * case.head_dim * 2
    for launch in program_text.launches(program.text, (1,)):
        if launch.written > cache / 4:
            yield f"{case}: {launch.name} writes {launch.written} bytes, as if it copied keys or values"


def rows_of(case: Case, device: Device):
    """(rows of the table, what is wrong) of one case on one device."""
    program = compile_step(case, device.capability)
    counted = {name: count(case, program, taken) for name, taken in paths().items()}
    library = library_seconds(case, device)
    for name, found in counted.items():
        seconds = found.seconds(device)
        yield (
            (
                f"| {device.name} | {case} | {name} | {found.launches} | {found.waits} | {found.bytes / 1e6:.0f} | "
                f"{seconds * 1e6:.0f} | {library * 1e6:.0f} | {library / seconds:.2f} | "
                f"{counted['every key'].seconds(device) / seconds:.2f} | {program.temporaries / 1e6:.0f} |"
            ),
            list(faults(case, program)),
        )


def main():
    """Compiles all cases, prints and writes the table."""
    wrong, rows = [], []
    for case in CASES:
        for device in DEVICES if case is CASES[0] else DEVICES[1:2]:
            for row, found in rows_of(case, device):
                print(row, flush=True)
                rows.append(row)
                wrong += found
    lines = [
        '# Decode steps of the backend "wide", compiled without a GPU',
        "",
        f"Written by `python -m benchmarks.gpu.compile_wide`, JAX {jax.__version__}, autotuning off. A decode step of",
        "one layer. Launches, waits for the host and bytes are counted from the compiled program, a room taken to be",
        f"full. Times are predicted: {LAUNCH * 1e6:g} µs a launch, {WAIT * 1e6:g} µs a wait, and the longer of bytes",
        f"at {EFFICIENCY:.0%} of the data sheet's bandwidth and {INSTRUCTIONS:g} instructions a product. **None ran.**",
        "The library's time is that of reading keys and values once at the same bandwidth.",
        "",
        "| device | step | path | launches | waits | MB moved | µs, predicted | library's dense, µs | over the library "
        "| over its own dense | temporaries, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Wrong: {'; '.join(dict.fromkeys(wrong)) or 'nothing'}.",
    ]
    TABLE.write_text("\n".join(lines) + "\n")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
