"""What accuracy a budget buys, ours next to other methods, with the embedded model or another in its format.

    python -m benchmarks.quality --out DIR [--lengths 2048 4096] [--tasks …] [--methods …] [--ablations …]

Every context is read once and asked all its questions by every method at every budget, at equal keys attended to and at
equal bytes read, index included. A budget is a fraction of dense attention's keys, or of its bytes. Thresholds and
masses decide their kept fraction only on average: they are set on held-apart contexts (the `train` split) so that this
average is the budget, and what they really kept and read is measured. DIR keeps `records.jsonl`, a line a run; the same
command goes on after an interruption, with more contexts or methods too, and several may run at once for different
lengths. In the end each writes summary.csv, ablations.csv, heads.csv and the figures (where matplotlib, the `plots`
extra, is installed) of all that is on record.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.embedded.batches import Encoder
from benchmarks.quality import measure, report, tasks
from benchmarks.quality.methods import Method
from benchmarks.quality.variants import ABLATIONS, METHODS
from squeezejax import models
from squeezejax.models import embedded

BUDGETS = (0.5, 0.25, 0.125, 0.0625, 0.03125, 0.02)
ABLATION_BUDGETS = (0.125, 0.0625)
TUNING_CONTEXTS = 1  # of each task
SETTINGS = {  # tried when tuning
    "sparsity": (0.3, 0.5, 0.65, 0.78, 0.86, 0.91, 0.94, 0.96, 0.975, 0.985, 0.993, 0.9985, 0.9997),
    "mass": (0.05, 0.15, 0.3, 0.45, 0.6, 0.7, 0.77, 0.83, 0.88, 0.92, 0.95, 0.97, 0.985, 0.995),
}
DENSE = {"match": "", "method": "dense", "budget": 1.0}


@dataclasses.dataclass
class Bench:
    """A model, and where records go."""

    params: object
    encoder: Encoder
    folder: Path

    def read(self, task: str, seed: int, length: int, split: str = "test"):
        """(a configuration's view of the context, made once, and its questions) of one sample."""
        sample = tasks.make_sample(task, seed, length, split=split)
        context = measure.read(self.params, measure.context_ids(self.encoder, sample, length))
        weights = measure.weights_of(self.params, length)
        return functools.cache(lambda config: measure.divide(context, config, weights)), measure.ask(
            self.encoder, sample
        )

    def tune(self, length: int, names: list[str], methods: list[Method], say) -> dict[str, dict]:
        """What is known of every method at this length: settings with what they keep and read on average, or, where
        the fraction to keep is set directly, what reading the index takes."""
        path = self.folder / f"tuning-{length}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        missing = [method for method in methods if method.name not in known]
        found = {method.name: [] for method in missing}
        for task in names if missing else ():
            for seed in range(TUNING_CONTEXTS):
                fixed_of, asked = self.read(task, seed, length, "train")
                for method in missing:
                    fixed = fixed_of(method.config)
                    index = method.build(fixed)
                    if method.kind not in SETTINGS:
                        known[method.name] = {"index": index_share(method, fixed, index)}
                        continue
                    runs = (measure.run(self.params, fixed, index, method, x, asked) for x in SETTINGS[method.kind])
                    found[method.name].append([(run.kept.mean(), run.read.mean()) for run in runs])
                say(f"{length} tokens, {task} {seed}: {len(missing)} methods tuned")
        for method in missing:
            if method.kind in SETTINGS:
                kept, read = np.mean(found[method.name], axis=0).T.tolist()
                known[method.name] = {"settings": SETTINGS[method.kind], "keys": kept, "bytes": read}
        path.write_text(json.dumps(known))
        return known

    def run(self, length: int, names: list[str], plan: list[tuple[Method, float]], contexts: int, say) -> None:
        """All runs at one length that are not on record yet; the plan has methods with their budgets."""
        records = self.folder / "records.jsonl"
        key = lambda record: tuple(record[name] for name in ("length", "task", "seed", "match", "method", "budget"))
        done = {key(record) for record in report.load(records)}
        methods = {method.name: method for method, _ in plan}
        known = self.tune(length, names, [*methods.values()], say)
        todo = [
            {"match": match, "method": method.name, "budget": budget}
            for method, budget in plan
            for match in report.MATCHES
            if can_meet(budget, match, known[method.name])
        ]
        with records.open("a", encoding="utf-8") as file:
            for seed in range(contexts):
                for task in names:
                    wanted = [{"length": length, "task": task, "seed": seed} | one for one in (DENSE, *todo)]
                    wanted = [record for record in wanted if key(record) not in done]
                    if not wanted:
                        continue
                    fixed_of, asked = self.read(task, seed, length)
                    indices = {}
                    for record in wanted:
                        dense = record["method"] == "dense"
                        method = METHODS["exact"] if dense else methods[record["method"]]
                        fixed = fixed_of(method.config)
                        if method.name not in indices:
                            indices[method.name] = method.build(fixed)
                        setting = 1.0 if dense else setting_for(record, known[method.name])
                        outcome = measure.run(self.params, fixed, indices[method.name], method, setting, asked)
                        values = {name: _plain(x) for name, x in vars(outcome).items()}
                        file.write(json.dumps(record | {"setting": setting} | values) + "\n")
                        file.flush()
                    say(f"{length} tokens, {task} {seed}: {len(wanted)} runs")


def can_meet(budget: float, match: str, known: dict) -> bool:
    """Whether a method can keep to a budget: where its index alone takes more, there is nothing to ask."""
    if "index" in known:
        return match == "keys" or budget > known["index"]
    return budget > 0.95 * min(known[match])


def setting_for(record: dict, known: dict) -> float:
    """The setting of a method that meets a record's budget."""
    budget, match = record["budget"], record["match"]
    if "index" in known:
        return budget - (known["index"] if match == "bytes" else 0)
    x, y = np.log(np.maximum(known[match], 1e-6)), known["settings"]
    order = np.argsort(x)
    return float(np.interp(np.log(budget), x[order], np.array(y)[order]))


def check_model(folder: Path, model: Path) -> None:
    """Makes the folder, or raises ValueError if what it holds is of another model's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        digest.update(path.read_bytes())
    note = folder / "model.txt"
    if note.exists() and note.read_text() != digest.hexdigest():
        raise ValueError(f"{folder} holds records of other weights than those in {model}: choose another --out")
    note.write_text(digest.hexdigest())


def index_share(method: Method, fixed, index) -> float:
    """Bytes of the index that a ranking method reads for one selection, as a fraction of all keys and values."""
    head = jax.tree.map(lambda leaf: leaf[0, 0], index)
    S, H = fixed.cache.keys.shape[2:]
    return float(method.choose(head, jnp.zeros((1, H)), jnp.ones(1, bool), jnp.int32(0)).index_read) / (2 * S)


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
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--ablations", nargs="*", default=[*ABLATIONS], choices=[*ABLATIONS])
    parser.add_argument("--ablation-budgets", type=float, nargs="+", default=ABLATION_BUDGETS)
    parser.add_argument("--contexts", type=int, default=8, help="of each task and length")
    arguments = parser.parse_args()
    check_model(arguments.out, arguments.model)
    bench = Bench(models.load(arguments.model), Encoder(arguments.model), arguments.out)
    plan = [(METHODS[name], budget) for name in arguments.methods for budget in arguments.budgets]
    varied = [method for name in arguments.ablations for method in ABLATIONS[name]]
    plan += [(method, budget) for method in varied for budget in arguments.ablation_budgets]
    for length in arguments.lengths:
        bench.run(
            length, arguments.tasks, [*dict.fromkeys(plan)], arguments.contexts, functools.partial(print, flush=True)
        )
    report.write(arguments.out, METHODS, ABLATIONS)


if __name__ == "__main__":
    main()
