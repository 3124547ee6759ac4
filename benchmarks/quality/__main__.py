"""What accuracy a budget buys, ours next to other methods, with the embedded model or another in its format.

    python -m benchmarks.quality --out DIR [--lengths 2048 4096] [--tasks …] [--methods …] [--budgets …]

Every context is read once and asked all its questions by every method at every budget, at equal keys attended to and at
equal bytes read, index included. A budget is a fraction of dense attention's keys, or of its bytes. Thresholds and
masses decide their kept fraction only on average: they are set on held-apart contexts (the `train` split) so that this
average is the budget, and what they really kept and read is measured. DIR keeps `records.jsonl`, a line a run; the same
command goes on after an interruption, and in the end writes summary.csv, heads.csv and the figures (where matplotlib,
the `plots` extra, is installed).
"""

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality import measure, report, tasks
from benchmarks.quality.methods import METHODS, Method
from squeezejax import models
from squeezejax.models import embedded
from squeezejax.models.embedded.batches import Encoder

BUDGETS = (0.5, 0.25, 0.125, 0.0625, 0.03125)
MATCHES = ("keys", "bytes")
TUNING_CONTEXTS = 1  # of each task
SETTINGS = {  # tried when tuning
    "sparsity": (0.3, 0.5, 0.65, 0.75, 0.83, 0.89, 0.93, 0.96, 0.975, 0.985, 0.993, 0.998),
    "mass": (0.05, 0.15, 0.3, 0.45, 0.6, 0.7, 0.77, 0.83, 0.88, 0.92, 0.95, 0.97, 0.985, 0.995),
}


@dataclasses.dataclass
class Bench:
    """A model, and where records go."""

    params: object
    encoder: Encoder
    folder: Path

    def read(self, task: str, seed: int, length: int, split: str = "test"):
        """(context, its questions) of one sample."""
        sample = tasks.make_sample(task, seed, length, split=split)
        fixed = measure.read(self.params, measure.context_ids(self.encoder, sample, length))
        return fixed, measure.ask(self.encoder, sample)

    def curves(self, length: int, names: list[str], methods: list[Method]) -> dict[str, dict[str, list[float]]]:
        """For every method that needs tuning at this length: its settings, and what they keep and read on average."""
        path = self.folder / f"tuning-{length}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        missing = [method for method in methods if method.kind in SETTINGS and method.name not in known]
        if missing:
            found = {method.name: [[] for _ in SETTINGS[method.kind]] for method in missing}
            for task in names:
                for seed in range(TUNING_CONTEXTS):
                    fixed, asked = self.read(task, seed, length, "train")
                    for method in missing:
                        index = method.build(fixed)
                        for setting, outcomes in zip(SETTINGS[method.kind], found[method.name], strict=True):
                            outcome = measure.run(self.params, fixed, index, method, setting, asked)
                            outcomes.append((outcome.kept.mean(), outcome.read.mean()))
            for method in missing:
                kept, read = np.mean(found[method.name], axis=1).T.tolist()
                known[method.name] = {"settings": SETTINGS[method.kind], "keys": kept, "bytes": read}
            path.write_text(json.dumps(known))
        return known

    def run(self, length: int, names, methods, budgets, contexts: int, say) -> None:
        """All runs at one length that are not on record yet."""
        records = self.folder / "records.jsonl"
        key = lambda record: tuple(record[name] for name in ("length", "task", "seed", "match", "method", "budget"))
        done = {key(record) for record in report.load(records)}
        curves = self.curves(length, names, methods)
        with records.open("a", encoding="utf-8") as file:
            for seed in range(contexts):
                for task in names:
                    wanted = [
                        {"length": length, "task": task, "seed": seed, "match": m, "method": method.name, "budget": b}
                        for method in methods
                        for m in MATCHES
                        for b in budgets
                    ]
                    wanted.append(wanted[0] | {"match": "", "method": "dense", "budget": 1.0})
                    wanted = [record for record in wanted if key(record) not in done]
                    if not wanted:
                        continue
                    fixed, asked = self.read(task, seed, length)
                    indices = {}
                    for record in wanted:
                        method = METHODS["exact" if record["method"] == "dense" else record["method"]]
                        if method.name not in indices:
                            indices[method.name] = method.build(fixed)
                        setting = self.setting(method, record, curves, fixed)
                        outcome = measure.run(self.params, fixed, indices[method.name], method, setting, asked)
                        values = {name: _plain(x) for name, x in vars(outcome).items()}
                        file.write(json.dumps(record | {"setting": setting} | values) + "\n")
                        file.flush()
                    say(f"{length} tokens, {task} {seed}: {len(wanted)} runs")

    def setting(self, method: Method, record: dict, curves: dict, fixed) -> float:
        """The setting of a method that meets a record's budget."""
        budget = record["budget"]
        if method.kind in SETTINGS:
            curve = curves[method.name]
            x, y = np.log(np.maximum(curve[record["match"]], 1e-6)), curve["settings"]
            order = np.argsort(x)
            return float(np.interp(np.log(budget), x[order], np.array(y)[order]))
        if record["match"] == "bytes":
            budget -= index_share(method, fixed)
        return max(budget, 0.0)


def index_share(method: Method, fixed) -> float:
    """Bytes of the index that a ranking method reads for one selection, as a fraction of all keys and values."""
    head = jax.tree.map(lambda leaf: leaf[0, 0], method.build(fixed))
    H = fixed.keys.shape[3]
    choice = method.choose(head, jnp.zeros((1, H)), jnp.ones(1, bool), jnp.int32(0))
    return float(choice.index_read) / (2 * fixed.keys.shape[2])


def _plain(value):
    """What JSON can hold, numbers to six digits."""
    return np.round(value, 6).tolist() if isinstance(value, np.ndarray) else value


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of records, tables and figures")
    parser.add_argument("--model", type=Path, default=embedded.PATH, help="checkpoint in the embedded model's format")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096], help="tokens of a context")
    parser.add_argument("--tasks", nargs="+", default=[*tasks.TASKS], choices=[*tasks.TASKS])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--contexts", type=int, default=8, help="of each task and length")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(models.load(arguments.model), Encoder(arguments.model), arguments.out)
    methods = [METHODS[name] for name in arguments.methods]
    for length in arguments.lengths:
        say = lambda line: print(line, flush=True)
        bench.run(length, arguments.tasks, methods, arguments.budgets, arguments.contexts, say)
    records = report.load(arguments.out / "records.jsonl")
    rows, heads = report.summarize(records), report.per_head(records)
    report.write_csv(arguments.out / "summary.csv", rows)
    report.write_csv(arguments.out / "heads.csv", heads)
    if importlib.util.find_spec("matplotlib"):
        report.write_figures(arguments.out, rows, heads)
    else:
        print("no figures: matplotlib is not installed (pip install 'squeezejax[plots]')")


if __name__ == "__main__":
    main()
