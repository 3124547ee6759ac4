"""A user's first hour with a real model on a CPU, in one table: `python -m benchmarks.first_hour`.

A text is built into a tree, asked from a cold start, asked again, and asked on, next to dense attention over the same
tree and to transformers. Every part runs in processes of its own, so that nothing is compiled when it starts and the
peak of its memory is its own, and is written down when it is done: run again, the command goes on with what is missing.
Run it on a machine that does nothing else.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.reading import Worker
from benchmarks.real import texts
from benchmarks.real.model import directory
from benchmarks.timing import machine
from squeezejax.chat import prompts

QUESTION = "\nIn one sentence: what is the text about?"
NEW_TOKENS = 64  # of an answer
SPARSITY = 0.9
CONTENDERS = ("dense", "squeezed", "transformers")


def main(arguments=None):
    """Runs the parts that are missing, or one of the processes that they consist of, and prints the table."""
    options = _parse(arguments)
    model = directory(options.model)
    if options.process:
        PROCESSES[options.process](model, options)
        return
    found = json.loads(options.out.read_text()) if options.out.exists() else {"machine": machine("torch"), "rows": {}}
    options.work.mkdir(parents=True, exist_ok=True)
    for tokens in options.tokens:
        row = found["rows"].setdefault(str(tokens), {})
        for name, measure in {"build": _measure_build, "ask": _measure_ask, "speed": _measure_speed}.items():
            if name not in row:
                row[name] = measure(model, options, tokens)
                options.out.write_text(json.dumps(found, indent=1) + "\n")
                print(f"{tokens} tokens, {name}: {json.dumps(row[name])}", file=sys.stderr, flush=True)
    print("\n".join(table(found["rows"])))


def table(rows: dict) -> list[str]:
    """The report's rows as lines of Markdown."""
    lines = ["| | " + " | ".join(f"{int(tokens):,} tokens" for tokens in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name, text in _CELLS.items():
        lines.append(f"| {name} | " + " | ".join(text(row) for row in rows.values()) + " |")
    return lines


def break_even(row: dict, *, reading_again: bool) -> float:
    """Questions after which building was worth its time; ∞ where it never is.

    Against keeping a dense cache of the text: what clustering, calibration and writing cost, over what an answer gains.
    With `reading_again`: against transformers, which reads the text for every question.
    """
    build, speed = row["build"], row["speed"]
    answer = {name: NEW_TOKENS / speed[name] for name in CONTENDERS}
    if reading_again:
        cost, gain = build["seconds"], speed["transformers reading"] + answer["transformers"] - answer["squeezed"]
    else:
        cost, gain = build["seconds"] - build["kinds"]["prefill"], answer["dense"] - answer["squeezed"]
    return cost / gain if gain > 0 else float("inf")


def _kinds(row) -> str:
    return ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in row["build"]["kinds"].items())


def _peak(row, part: str) -> str:
    measured, planned = row[part]["peak"], row[part]["planned"]
    return f"{measured / 1e9:.2f} GB ({planned / 1e9:.2f})"


def _first(row, start: str) -> str:
    return f"{row['ask'][start]['first']:.1f} s, {row['ask'][start]['all']:.1f} s"


def _questions(row, **options) -> str:
    count = break_even(row, **options)
    return "never" if count == float("inf") else f"{count:.1f}"


_CELLS = {
    "build, s": lambda row: f"{row['build']['seconds']:.1f}",
    "of it, s": _kinds,
    "build, peak memory (planned)": lambda row: _peak(row, "build"),
    "tree file": lambda row: f"{row['build']['file'] / 1e6:.0f} MB",
    "first answer ever: first word, all": lambda row: _first(row, "cold"),
    "another process: first word, all": lambda row: _first(row, "warm"),
    "answering, peak memory (planned)": lambda row: _peak(row, "ask"),
    "tokens a second: dense": lambda row: f"{row['speed']['dense']:.1f}",
    f"squeezed, sparsity {SPARSITY}": lambda row: f"{row['speed']['squeezed']:.1f}",
    "transformers": lambda row: f"{row['speed']['transformers']:.1f}",
    "transformers reads the text in, s": lambda row: f"{row['speed']['transformers reading']:.1f}",
    "paid for itself after, questions: against a dense cache": lambda row: _questions(row, reading_again=False),
    "against transformers, reading again": lambda row: _questions(row, reading_again=True),
}


def _measure_build(model: Path, options, tokens: int) -> dict:
    finished = subprocess.run(_process("build", model, options, tokens), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout)


def _measure_ask(model: Path, options, tokens: int) -> dict:
    """The command line, with an empty compilation cache and then with what the first start left in it."""
    with tempfile.TemporaryDirectory(dir=options.work) as cache:
        command = [sys.executable, "-m", "squeezejax", "ask", "--tree", str(_tree(options, tokens))]
        command += ["--model", str(model), "--max-new-tokens", str(NEW_TOKENS), QUESTION.strip()]
        cold, warm = (_ask(command, os.environ | {"XDG_CACHE_HOME": cache}) for _ in range(2))
    return {"cold": cold, "warm": warm, "peak": warm.pop("peak"), "planned": _planned(model, tokens).resident_answering}


def _ask(command: list[str], environment) -> dict:
    """Seconds until the first byte of an answer and until its end, and the process's peak of memory in bytes."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        first = process.stdout.read(1) and time.perf_counter() - started
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not first:
        raise RuntimeError("squeezejax ask failed: its message is above")
    return {"first": first, "all": time.perf_counter() - started, "peak": 1024 * usage.ru_maxrss}


def _measure_speed(model: Path, options, tokens: int) -> dict:
    """Tokens a second of decoding, the libraries taking turns, and how long transformers reads."""
    with (
        Worker(_process("ours", model, options, tokens)[1:]) as ours,
        Worker(_process("theirs", model, options, tokens)[1:]) as theirs,
    ):
        rounds = {name: [] for name in CONTENDERS}
        reading = theirs.ask("read")
        for count in range(options.rounds + 1):  # the first compiles
            for name, taken in rounds.items():
                seconds = (theirs if name == "transformers" else ours).ask(name)
                if count:
                    taken.append(seconds)
        found = {name: NEW_TOKENS / statistics.median(taken) for name, taken in rounds.items()}
        return found | {"transformers reading": reading}


def _process(name: str, model: Path, options, tokens: int) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.first_hour", "--process", name, "--tokens", str(tokens)]
    command += ["--model", str(model), "--work", str(options.work), "--threads", str(options.threads)]
    return command + [part for path in options.texts for part in ("--texts", str(path))]


def _build(model: Path, options):
    """The process that makes a tree, and prints what it took."""
    from squeezejax import models, text

    tokens, kinds = options.tokens[0], {}
    tokenizer = prompts.load_tokenizer(model)
    context = prompts.decode(tokenizer, _ids(tokenizer, options, tokens))
    started = time.perf_counter()
    document = text.build(models.load(model), tokenizer, context, progress=lambda told: kinds.update(told.seconds))
    writing = time.perf_counter()
    text.save(_tree(options, tokens), document)
    kinds["writing"] = time.perf_counter() - writing
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"seconds": time.perf_counter() - started, "kinds": kinds, "peak": peak}
    found["file"] = _tree(options, tokens).stat().st_size
    print(json.dumps(found | {"planned": _planned(model, tokens).resident_building}))


def _planned(model: Path, tokens: int):
    """What `plan` says of memory."""
    import jax
    import jax.numpy as jnp

    from squeezejax.models.config import parse_config
    from squeezejax.models.llama import Llama
    from squeezejax.plan import plan

    config = parse_config(json.loads((model / "config.json").read_text()))
    return plan(jax.eval_shape(lambda: Llama(config, key=jax.random.key(0), dtype=jnp.float32)), tokens).memory


def _ours(model: Path, options):
    """The process that answers by squeezejax, a line of standard input at a time."""
    import jax.numpy as jnp

    import squeezejax
    from squeezejax import models

    params = models.load(model)
    tree = squeezejax.load(_tree(options, options.tokens[0]), params)
    question = jnp.asarray([prompts.encode(prompts.load_tokenizer(model), QUESTION)])
    answer = {
        "dense": lambda: squeezejax.dense_generate(params, tree, question, max_new_tokens=NEW_TOKENS),
        "squeezed": lambda: squeezejax.generate(
            params, tree, question, max_new_tokens=NEW_TOKENS, sparsity=SPARSITY, implementation="xla"
        ),
    }
    _serve({name: lambda call=call: call().tokens.block_until_ready() for name, call in answer.items()})


def _theirs(model: Path, options):
    """The process that reads and answers by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    text = torch.tensor([_ids(prompts.load_tokenizer(model), options, options.tokens[0])])
    question = torch.tensor([prompts.encode(prompts.load_tokenizer(model), QUESTION)])
    cache = None

    def read():
        nonlocal cache
        cache = loaded.model(text, use_cache=True).past_key_values

    def answer():
        ids = question
        for _ in range(NEW_TOKENS):
            ids = loaded(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        cache.crop(text.shape[1])

    with torch.inference_mode():
        _serve({"read": read, "transformers": answer})


def _serve(calls: dict):
    for line in sys.stdin:
        started = time.perf_counter()
        calls[line.strip()]()
        print(time.perf_counter() - started, flush=True)


PROCESSES = {"build": _build, "ours": _ours, "theirs": _theirs}


def _ids(tokenizer, options, tokens: int) -> list[int]:
    encode = functools.partial(prompts.encode, tokenizer)
    text = texts.read(options.texts, encode) if options.texts else texts.language_reference(encode)
    return text.stretch(0, tokens)


def _tree(options, tokens: int) -> Path:
    return options.work / f"{tokens}.tree"


def _parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint directory (default: SmolLM2, fetched)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 4000, 8000])
    parser.add_argument(
        "--texts", type=Path, action="append", default=[], help="text files (default: help() of Python)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of answers")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--work", type=Path, default=Path("/tmp/squeezejax-first-hour"), help="folder for trees")
    parser.add_argument("--out", type=Path, default=Path("first-hour.json"), help="the report, also of an earlier run")
    parser.add_argument("--process", choices=PROCESSES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
