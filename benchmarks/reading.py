"""How long a CPU takes to read a context, against transformers: `python -m benchmarks.reading`.

The same checkpoint, the same tokens, the same number of threads; each library in a process of its own, since two OpenMP
runtimes in one process spin against each other; the processes take turns, so that a busy minute of the machine hits
both. What is read is every layer over the whole context, keys and values kept, by `squeezejax.squeeze`'s own function
here, and by one forward pass with a cache there. Beside it the limit: what the matrix products alone would take at the
rate at which the faster library multiplies large matrices on this machine.

A model's positions may end before the context does; reading beyond them takes the same time, and means nothing.
"""

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.real.model import directory
from benchmarks.timing import machine, once

LIBRARIES = ("squeezejax", "transformers")
DTYPES = ("float32", "bfloat16")


def main(arguments=None):
    """Runs the benchmark, or one of the processes that it consists of."""
    options = _parse(arguments)
    if options.worker:
        _serve(options)
        return
    model = directory(options.model)
    report = {"machine": machine("torch", "transformers"), "model": str(model.name), "layers": options.layers}
    report["rows"] = rows = []
    for dtype in options.dtypes:
        with contextlib.ExitStack() as open_workers:
            workers = {
                name: open_workers.enter_context(Worker(_command(name, dtype, model, options))) for name in LIBRARIES
            }
            limit = max(max(worker.ask("products") for worker in workers.values()) for _ in range(2))
            for tokens in options.tokens:
                row = _compare(workers, tokens, 1 if tokens > 8192 else options.rounds)
                row = {"dtype": dtype, "tokens": tokens, "gemm_gflops": limit / 1e9, **row}
                row["limit_seconds"] = _operations(model, tokens, options.layers) / limit
                rows.append(row)
                print(_line(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


class Worker:
    """A process that answers questions of a line with a number each, so that several can take turns."""

    def __init__(self, command: list[str]):
        """Arguments of Python."""
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()

    def ask(self, what) -> float:
        """The answer: here, seconds of reading so many tokens, or operations a second of "products"."""
        print(what, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("a process of the benchmark ended: its message is above")
        return float(answer)


def _command(library: str, dtype: str, model: Path, options) -> list[str]:
    command = ["-m", "benchmarks.reading", "--worker", library, "--dtypes", dtype, "--model", str(model)]
    command += ["--threads", str(options.threads)]
    return command + (["--layers", str(options.layers)] if options.layers else [])


def _compare(workers, tokens: int, rounds: int) -> dict:
    """Every library in turn, after a first round that compiles where that is cheap."""
    seconds = {name: [] for name in workers}
    for count in range(rounds + 1):
        for name, worker in workers.items():
            taken = worker.ask(tokens)
            if count:
                seconds[name].append(taken)
    ours, theirs = (seconds[name] for name in LIBRARIES)
    return {**seconds, "times": statistics.median(b / a for a, b in zip(ours, theirs, strict=True))}


def _line(row) -> str:
    ours, theirs = (statistics.median(row[name]) for name in LIBRARIES)
    return (
        f"{row['dtype']:8} {row['tokens']:6} tokens: squeezejax {ours:6.2f} s, transformers {theirs:6.2f} s, "
        f"{row['times']:.2f} times; products alone at {row['gemm_gflops']:.0f} GFLOP/s {row['limit_seconds']:.2f} s"
    )


def _operations(model: Path, tokens: int, layers: int | None) -> float:
    """Floating-point operations of all products, half of the pairs of tokens counted in attention."""
    config = json.loads((model / "config.json").read_text())
    D, N, F = (config[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size"))
    K, H = config.get("num_key_value_heads", N), config.get("head_dim", D // N)
    a_token = 2 * D * (2 * N * H + 2 * K * H + 3 * F) + 2 * N * H * tokens
    return float((layers or config["num_hidden_layers"]) * tokens * a_token)


def _serve(options):
    """Answers the questions that come on standard input, one number a line."""
    read, multiply = (_ours if options.worker == "squeezejax" else _theirs)(options)
    for line in sys.stdin:
        question = line.strip()
        if question == "products":
            multiply()
            print(2 * 2048**3 / min(once(multiply)[0] for _ in range(5)), flush=True)
        else:
            ids = _token_ids(int(question))
            print(once(functools.partial(read, ids))[0], flush=True)


def _token_ids(count: int) -> list[int]:
    return [1 + i * 7919 % 30011 for i in range(count)]


def _ours(options):
    import jax.numpy as jnp

    from squeezejax import models
    from squeezejax.offline.progress import Reporter
    from squeezejax.offline.squeeze import embed_chunked, prefill_layer

    params = models.load(options.model, dtype=jnp.dtype(options.dtypes[0]))
    quiet = Reporter(1, 1.0, None)

    def read(ids):
        x = embed_chunked(params, jnp.asarray([ids], jnp.int32))
        kept = []
        for layer in range(options.layers or params.config.num_layers):
            x, *found = prefill_layer(params, layer, x, len(ids), 100, quiet)
            kept.append(found)
        return x, kept

    square = jnp.ones((2048, 2048), params.embedding[...].dtype)
    return read, lambda: jnp.matmul(square, square)


def _theirs(options):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtypes[0])
    layers = {} if options.layers is None else {"num_hidden_layers": options.layers}
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **layers).eval()

    def read(ids):
        with torch.inference_mode():
            return model.model(torch.tensor([ids]), use_cache=True)

    square = torch.ones((2048, 2048), dtype=dtype)
    return read, lambda: square @ square


def _parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint directory (default: SmolLM2, fetched)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=3, help="of every library; beyond 8,192 tokens always one")
    parser.add_argument("--layers", type=int, help="read with the first layers only")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; JAX takes all cores that the process may")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
