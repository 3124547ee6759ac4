"""Compiles every kernel configuration in use for an H200, without a GPU: `python -m benchmarks.gpu.compile_kernels`.

Fails on any spill, where two warpgroups reduce through the same shared memory, and where a whole decode step
(selection, attention, window and user tokens, merge) has other kernels, more launches or more temporaries than it
should; two processes share the work. Writes what it found to benchmarks/results/compile_h200.md. Says nothing about
speed.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import pathlib
import re
import sys

from benchmarks.gpu import deviceless  # before JAX: it sets its environment

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip

import squeezejax  # isort: skip
from benchmarks.gpu import compile_offline  # isort: skip
from squeezejax.online.generate import _prefill_and_decode  # isort: skip
from squeezejax.models.config import LlamaConfig  # isort: skip
from squeezejax.models.llama import Llama  # isort: skip
from squeezejax.pallas_kernels import registry  # isort: skip
from squeezejax.pallas_kernels.interface import Reading  # isort: skip
from squeezejax.online.sampling import sampling_of  # isort: skip
from squeezejax.tree import Level, Tree  # isort: skip

TABLE = pathlib.Path(__file__).parents[1] / "results" / "compile_h200.md"
CODES = 4, 2  # bits of the default index
# Of one layer's keys and values, at most, for every user: none of these is copied. A layer's float32 centroids, which
# are where they cannot be fetched from where they lie, are 0.05 of it.
TEMPORARIES = 0.06
LAUNCHES = ("fusion", "custom-call", "copy", "while", "conditional", "reduce", "dot", "sort", "scatter", "gather",
            "dynamic-slice", "dynamic-update-slice", "transpose", "pad", "concatenate", "slice", "broadcast",
            "iota", "convert", "add")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one decode step."""

    head_dim: int
    group: int
    kv_heads: int = 8
    users: int = 1
    num_keys: int = 131_072
    fractions: tuple[float, ...] = (0.05,)
    dtype: str = "bfloat16"
    layers: int = 2
    window: int = 100
    room: int = 256
    bits: tuple[int, int] | None = None  # of centroids' and of keys' codes, by our rule; None: the paper's

    def __str__(self):
        heads = f"{self.kv_heads * self.group} / {self.kv_heads} of {self.head_dim}"
        users = f", {self.users} users" if self.users > 1 else ""
        index = ", codes of {} and {} bits".format(*self.bits) if self.bits else ""
        return f"{heads}, {self.num_keys // 1024}K, {len(self.fractions)} level(s), {self.dtype}{users}{index}"

    @property
    def coded_keys(self) -> bool:
        """Whether single keys have codes."""
        return self.bits is not None and self.bits[1] > 0

    @property
    def num_thresholds(self) -> int:
        """Of one selection: one a level, and one for keys with codes."""
        return len(self.fractions) + self.coded_keys

    @property
    def num_kernels(self) -> int:
        """Scores, marks and lists of each level; scores and lists of keys' codes; attention; merge."""
        return 3 * len(self.fractions) + 2 * self.coded_keys + 2

    @property
    def most_launches(self) -> int:
        """The kernels, sums between them by XLA, copies of a layer's clusters where heads are few and odd (two), one
        thing more for many users, and for codes the queries' parts and terms."""
        return 8 * len(self.fractions) + (23 if self.bits else 4)


# A kernel depends on the size of heads, on whether groups are of more than 8, and on whether lists are read; hardly on
# how many keys, heads and users there are.
CASES = (
    *(Case(head_dim, 4) for head_dim in (64, 96, 128, 192, 256)),
    *(Case(head_dim, 16) for head_dim in (128, 256)),
    Case(64, 4, dtype="float16"),
    Case(128, 1, kv_heads=32),
    Case(128, 8, kv_heads=1),
    Case(128, 4, num_keys=2**19, fractions=(0.01, 0.05)),
    Case(128, 4, num_keys=2**21, fractions=(0.002, 0.01, 0.05)),
    Case(128, 4, users=32, fractions=(0.01, 0.05)),
    *(Case(head_dim, 4, bits=CODES) for head_dim in (64, 128, 256)),
    Case(128, 4, bits=(8, 1)),
    Case(128, 4, users=8, fractions=(0.01, 0.05), bits=CODES),
    Case(64, 16, fractions=(0.01, 0.05), bits=CODES),
    *(Case(head_dim, 16, fractions=(0.01, 0.05), bits=(8, 4)) for head_dim in (128, 256)),
)


def tree_shapes(case: Case) -> Tree:
    """The shapes of a calibrated tree."""
    shape = jax.ShapeDtypeStruct
    shared = {"cluster_fractions": case.fractions, "observation_window": case.window}
    if case.bits:
        config = squeezejax.SqueezeConfig(**shared, index_bits=case.bits[0], key_bits=case.bits[1])
    else:
        config = squeezejax.SqueezeConfig.paper(**shared)
    L, K, H, S = case.layers, case.kv_heads, case.head_dim, case.num_keys
    R, W = -(-S // 8) * 8, config.always_read
    clusters = config.num_clusters(S)
    fields = [5] * (len(clusters) - 1) + [3]  # counts, starts, parents, and above the finest where children are
    coded = lambda C, bits: (shape((L, K, C, bits * H // 8), jnp.uint8), shape((L, K, C), jnp.bfloat16))
    levels = []
    for C, n in zip(clusters, fields, strict=True):
        level = Level(shape((L, K, C, H), jnp.float32), *[shape((L, K, C), jnp.int32)] * n)
        if case.bits:
            names = dict(zip(("codes", "steps"), coded(C, config.index_bits), strict=True))
            names |= {"offset": shape((L, K, H), jnp.float32), "spreads": shape((L, K, C), jnp.bfloat16)}
            level = dataclasses.replace(level, centroids=None, **names)
        levels.append(level)
    tree = Tree(
        keys=shape((L, K, R, H), case.dtype),
        values=shape((L, K, R, H), case.dtype),
        order=shape((L, K, R), jnp.int32),
        window_keys=shape((L, K, W, H), case.dtype),
        window_values=shape((L, K, W, H), case.dtype),
        levels=tuple(levels),
        config=config,
        num_keys=S,
    )
    if case.bits:
        tree = dataclasses.replace(tree, denominators=shape((L, K, case.group, 2), jnp.float32))
    if case.coded_keys:
        names = dict(zip(("key_codes", "key_steps"), coded(R, config.key_bits), strict=True))
        tree = dataclasses.replace(tree, **names)
    return tree


def compile_step(case: Case, implementation: str = "mosaic") -> deviceless.Program:
    """One decode step of one layer: the public `attend` with T = 1, layer, thresholds and lengths traced."""
    shape = jax.ShapeDtypeStruct
    B, K, H = case.users, case.kv_heads, case.head_dim
    own = shape((B, case.room, K, H), case.dtype)
    arguments = (tree_shapes(case), shape((B, 1, K * case.group, H), case.dtype), own, own, shape((), jnp.int32),
                 shape((case.num_thresholds,), jnp.float32), *[shape((B,), jnp.int32)] * 2)  # fmt: skip

    def step(tree, q, k, v, layer, log_T, start, lengths):
        return squeezejax.attend(
            tree, q, k, v, layer=layer, log_thresholds=log_T, start=start, lengths=lengths,
            implementation=implementation,
        )  # fmt: skip

    with registry.force_mosaic():
        return deviceless.compile_program(step, *deviceless.on_device(arguments))


def compile_generate(case: Case, num_tokens: int = 16) -> deviceless.Program:
    """The whole jitted `generate` of a small random model: user tokens, then a loop of decode steps."""
    heads = {"num_heads": case.kv_heads * case.group, "num_kv_heads": case.kv_heads, "head_dim": case.head_dim}
    config = LlamaConfig(vocab_size=512, model_dim=512, mlp_dim=1024, num_layers=case.layers, **heads)
    params = jax.eval_shape(lambda: Llama(config, key=jax.random.key(0), dtype=jnp.dtype(case.dtype)))
    shape = jax.ShapeDtypeStruct
    tokens, log_T = shape((case.users, 8), jnp.int32), shape((case.num_thresholds,), jnp.float32)
    sampling = sampling_of(0.0, None, None, None, ())

    def run(params, tree, tokens, lengths, log_T):
        reading = Reading(log_T, implementation="mosaic")
        return _prefill_and_decode(params, tree, tokens, lengths, reading, sampling, num_tokens, num_tokens)

    arguments = (params, tree_shapes(case), tokens, shape((case.users,), jnp.int32), log_T)
    with registry.force_mosaic():
        return deviceless.compile_program(run, *deviceless.on_device(arguments))


def launches(program: deviceless.Program, kernel: str | None = None) -> list[str]:
    """The operations that the device launches: of the entry computation, or of the one that a kernel is called in."""
    return [name for name, kind in operations(program, kernel) if kind in LAUNCHES]


def operations(program: deviceless.Program, kernel: str | None = None):
    """(name, kind) of the operations of the entry computation, or of the one that a kernel is called in."""
    computations = re.findall(r"^(?:ENTRY )?%\S+ \(.*?^\}", program.text, flags=re.MULTILINE | re.DOTALL)
    wanted = "ENTRY" if kernel is None else rf".*custom-call.*/{kernel}/"
    found = next(text for text in computations if re.match(wanted, text, flags=re.DOTALL))
    return re.findall(r"^\s+(?:ROOT )?%(\S+) = .*? ([a-z][a-z-]*)\(", found, flags=re.MULTILINE)


def all_cases() -> list:
    """(decode step, or None for another thing; name, how to compile it) of everything in the table."""
    steps = [(case, str(case), functools.partial(compile_step, case)) for case in CASES]
    return steps + [(None, name, compiled) for name, compiled in compile_offline.cases()]


def compile_row(index: int):
    """One case: (is it a decode step, row of the table, what is wrong)."""
    case, name, compiled = all_cases()[index]
    program = compiled()
    used = ", ".join(f"{k.name} {k.registers} / {k.shared_memory / 1024:.0f}" for k in program.kernels)
    wrong = [f"{k.name} spills {k.spilled} bytes" for k in program.kernels if k.spilled]
    wrong += [f"{k.name}, {race}" for k in program.kernels for race in k.wrong]
    wrong += [] if case is None else faults(case, program)
    counted = "" if case is None else f" {len(launches(program))} |"
    row = f"| {name} |{counted} {program.temporaries / 1e6:.1f} | {used} |"
    return case is not None, row, [f"{name}: {sentence}" for sentence in wrong]


def faults(case: Case, program: deviceless.Program):
    """What is wrong with a decode step as a whole, in sentences."""
    if len(program.kernels) != case.num_kernels:
        yield f"{len(program.kernels)} kernels, not {case.num_kernels}"
    if len(launches(program)) > case.most_launches:
        yield f"{len(launches(program))} launches, more than {case.most_launches}"
    cache = 2 * case.kv_heads * case.num_keys * case.head_dim * 2
    if program.temporaries > TEMPORARIES * case.users * cache:
        yield f"temporaries take {program.temporaries} bytes, a layer's keys and values {cache}"


def main():
    """Compiles all cases, prints and writes the table, and exits with 1 if anything is wrong with a kernel."""
    found = []
    # Not forked: every process has a JAX, and a folder for the assembler's reports, of its own.
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for is_step, row, wrong in pool.map(compile_row, range(len(all_cases()))):
            print(row, flush=True)
            found.append((is_step, row, wrong))
    wrong = [sentence for _, _, some in found for sentence in some]
    lines = [
        "# Kernels compiled for an H200, without one",
        "",
        f"Written by `python -m benchmarks.gpu.compile_kernels`, JAX {jax.__version__}. One decode step of one layer,",
        "the public `attend` with T = 1: selection, attention to kept keys, window and user tokens, merge. Registers a",
        "thread, shared memory in KB.",
        "Nothing here ran on a GPU; speeds are unmeasured.",
        "",
        "| step | launches | temporaries, MB | kernels: registers / shared memory |",
        "|---|---|---|---|",
        *(row for is_step, row, _ in found if is_step),
        "",
        "| offline and prefill | temporaries, MB | kernels: registers / shared memory |",
        "|---|---|---|",
        *(row for is_step, row, _ in found if not is_step),
        "",
        f"Spills, scratch that two warpgroups reduce through, kernels, launches or temporaries that should not be: "
        f"{'; '.join(wrong) or 'none'}.",
    ]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
