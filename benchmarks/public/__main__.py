"""LongBench, RULER, L-Eval, PreFixQA-style sets on a checkpoint: questions answered densely and at every sparsity.

    python -m benchmarks.public --model DIR --out DIR --sparsities 0.7 0.9
        --longbench FILE.jsonl … --longbench-config LongBench/LongBench/config
        --ruler 4096/niah_single_1/validation.jsonl …
        --leval LEval-data/Closed-ended-tasks/tpo.jsonl …
        --prefixqa FILE.jsonl …

Nothing is downloaded: all is given by path (longbench.py, ruler.py, leval.py and prefixqa.py say in which form). Each
distinct context is squeezed once, and all its questions are asked over that one tree. DIR keeps records.jsonl, a line
an answer; the same command goes on after an interruption, and in the end prints a table and writes it to summary.csv.
"""

import argparse
import ast
import dataclasses
import json
from pathlib import Path

from benchmarks.public import leval, longbench, metrics, prefixqa, ruler, summary
from benchmarks.public.prompts import measure_room
from benchmarks.public.run import Setup, group, run
from benchmarks.public.samples import Item
from benchmarks.quality import report
from squeezejax import SqueezeConfig, models
from squeezejax.chat import prompts as chat
from squeezejax.command_line.cli import describe
from squeezejax.command_line.commands import model_directory, read_model_config


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.public", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint directory, or: embedded")
    parser.add_argument("--out", type=Path, required=True, help="directory of records and table")
    parser.add_argument("--longbench", type=Path, nargs="+", default=[], metavar="FILE", help="LongBench's JSONL")
    parser.add_argument("--longbench-config", type=Path, metavar="DIR", help="LongBench/config of a clone of LongBench")
    parser.add_argument("--ruler", type=Path, nargs="+", default=[], metavar="FILE", help="RULER's JSONL")
    parser.add_argument("--leval", type=Path, nargs="+", default=[], metavar="FILE", help="L-Eval's JSONL")
    parser.add_argument("--prefixqa", type=Path, nargs="+", default=[], metavar="FILE", help="JSONL, our own schema")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.7, 0.9], help="default: 0.7 0.9")
    parser.add_argument(
        "--cluster-fractions",
        type=float,
        nargs="+",
        default=SqueezeConfig().cluster_fractions,
        help="clusters per key, coarse to fine (default: the library's, 0.05)",
    )
    parser.add_argument(
        "--config",
        default="",
        metavar="FIELD=VALUE,…",
        help="other fields of SqueezeConfig, such as 'coarse_margin=8,observation_window=64'",
    )
    parser.add_argument("--tail", action="store_true", help="estimate keys that are not kept by their clusters")
    parser.add_argument(
        "--likelihood-tokens",
        type=int,
        default=32,
        help="measure how likely the right answer's first so many tokens are, one by one; 0 = do not (default: 32)",
    )
    parser.add_argument("--max-length", type=int, help="tokens of a prompt (default: what the model can handle)")
    parser.add_argument(
        "--multiple",
        type=int,
        default=1,
        help="round contexts down to a multiple of so many tokens and read the rest with the question: programs are "
        "compiled for every length of context, 512 spares most of that (default: 1)",
    )
    parser.add_argument("--batch", type=int, default=8, help="questions of one context asked together (default: 8)")
    parser.add_argument("--limit", type=int, help="only so many questions of each file, its first ones")
    parser.add_argument("--trees", type=Path, help="directory that keeps the trees, which can be large")
    parser.add_argument("--implementation", choices=["xla", "mosaic"], default="xla", help="default: xla")
    return parser


def read_all(arguments) -> list[Item]:
    """The questions of all files, after all checks that need no model."""
    for name in ("max_length", "multiple", "batch", "limit"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    items = []
    config = longbench.read_config(arguments.longbench_config) if arguments.longbench else None
    for path in arguments.longbench:
        items += longbench.read(path, config)[: arguments.limit]
    for reader, paths in ((ruler, arguments.ruler), (leval, arguments.leval), (prefixqa, arguments.prefixqa)):
        for path in paths:
            items += reader.read(path)[: arguments.limit]
    if not items:
        raise ValueError("nothing to ask: give files with --longbench, --ruler, --leval or --prefixqa")
    known = set()
    for item in items:
        if item.key in known:
            raise ValueError(f"{item.key} comes twice: give every file once")
        known.add(item.key)
    metrics.check_installed(items)
    return items


def parse_config(text: str, base: SqueezeConfig) -> SqueezeConfig:
    """'field=value,…' as changes of a configuration. Raises ValueError for what makes no sense."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        changes = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if call.args or None in changes:
            raise ValueError("give field=value, with commas between")
        return dataclasses.replace(base, **changes)
    except (SyntaxError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--config {text}: {error}") from error


def check_settings(path: Path, settings: dict):
    """Raises ValueError where records were made with other settings, which must not be mixed with new ones."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    differ = [name for name, value in settings.items() if known.get(name, value) != value]
    if differ:
        raise ValueError(
            f"{path.parent} has answers of another run, with another {', '.join(differ)}: name another --out"
        )


def main(argv=None) -> None:
    """Command line."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    records, settings_file = arguments.out / "records.jsonl", arguments.out / "settings.json"
    settings = {name: getattr(arguments, name) for name in ("max_length", "multiple", "tail", "likelihood_tokens")}
    try:
        if arguments.likelihood_tokens < 0:
            raise ValueError(f"--likelihood-tokens must be at least 0, got {arguments.likelihood_tokens}")
        config = parse_config(arguments.config, SqueezeConfig(cluster_fractions=arguments.cluster_fractions))
        settings["tree"] = str(config)
        items = read_all(arguments)
        check_settings(settings_file, settings)
        folder = model_directory(arguments.model)
        positions = read_model_config(folder).max_positions
        tokenizer = chat.load_tokenizer(folder)
        for members in group(items):
            measure_room(tokenizer, members, positions=positions, max_length=arguments.max_length)
        params = models.load(folder)
        settings |= {"model": params.config.fingerprint}
        check_settings(settings_file, settings)
        for wanted in filter(None, (arguments.out, arguments.trees)):
            wanted.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {describe(error)}\n")
    settings_file.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    setup = Setup(
        params=params,
        tokenizer=tokenizer,
        sparsities=tuple(dict.fromkeys(arguments.sparsities)),
        config=config,
        max_length=arguments.max_length,
        multiple=arguments.multiple,
        batch=arguments.batch,
        trees=arguments.trees,
        implementation=arguments.implementation,
        tail=arguments.tail,
        likelihood_tokens=arguments.likelihood_tokens,
    )
    run(setup, items, records, lambda line: print(line, flush=True))
    rows = summary.summarize(report.load(records), items, setup.sparsities)
    report.write_csv(arguments.out / "summary.csv", rows)
    print(*summary.lines(rows), sep="\n")


if __name__ == "__main__":
    main()
