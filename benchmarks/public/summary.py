"""From records to one table: score, kept fraction, and what dense attention had more on the same questions."""

import collections

import numpy as np

from benchmarks.public.run import DENSE
from benchmarks.public.samples import Item
from benchmarks.quality import report


def summarize(records: list[dict], items: list[Item], sparsities) -> list[dict]:
    """A row for each dataset, subset of lengths and sparsity; "average" rows are means over a suite's datasets.

    Of the records only those that answer `items`. Scores are 0 to 100; `lost` is dense attention's score less the
    sparsity's, in points, with a 95 % interval by bootstrap over contexts.
    """
    asked = {item.key for item in items}
    scores = {(one["key"], one["sparsity"]): one for one in records if one["key"] in asked}
    groups = collections.defaultdict(list)
    for item in items:
        groups[item.suite, item.dataset, item.subset].append(item.key)
    rows = []
    for (suite, dataset, subset), keys in groups.items():
        for sparsity in (DENSE, *sparsities):
            pairs = [(scores[key, DENSE], scores[key, sparsity]) for key in keys]
            name = {"suite": suite, "dataset": dataset, "subset": subset}
            rows.append(name | {"sparsity": "dense" if sparsity is DENSE else sparsity} | _compare(pairs))
    return rows + _averages(rows)


def _compare(pairs: list[tuple[dict, dict]]) -> dict:
    """Pairs of records (dense, squeezed) of the same questions."""
    lost = collections.defaultdict(list)
    for dense, squeezed in pairs:
        lost[squeezed["context"]].append(100 * (dense["score"] - squeezed["score"]))
    mean = lambda name: float(np.mean([squeezed[name] for _, squeezed in pairs]))
    row = {"questions": len(pairs), "contexts": len(lost), "score": 100 * mean("score")}
    row |= {"kept": mean("kept"), "kept_reading": mean("kept_reading")}
    row |= dict(zip(("lost", "low", "high"), report.interval(list(lost.values())), strict=True))
    return row | _likelihoods(pairs)


def _likelihoods(pairs: list[tuple[dict, dict]]) -> dict:
    """`log_likelihood` of a token of the right answer, and what dense attention had more, with its interval."""
    names = ("log_likelihood", "likelihood_lost", "likelihood_low", "likelihood_high")
    if any("log_likelihood" not in record for pair in pairs for record in pair):
        return dict.fromkeys(names, "")
    lost = collections.defaultdict(list)
    for dense, squeezed in pairs:
        lost[squeezed["context"]].append(dense["log_likelihood"] - squeezed["log_likelihood"])
    mean = float(np.mean([squeezed["log_likelihood"] for _, squeezed in pairs]))
    return dict(zip(names, (mean, *report.interval(list(lost.values()))), strict=True))


def _averages(rows: list[dict]) -> list[dict]:
    """Where there are several datasets: means of their rows; questions and contexts add up."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["suite"], row["subset"], row["sparsity"]].append(row)
    averages = []
    for (suite, subset, sparsity), members in groups.items():
        if len(members) > 1:
            row = {"suite": suite, "dataset": "average", "subset": subset, "sparsity": sparsity}
            row |= {name: sum(one[name] for one in members) for name in ("questions", "contexts")}
            row |= {name: float(np.mean([one[name] for one in members])) for name in ("score", "kept", "kept_reading")}
            row |= {"lost": float(np.mean([one["lost"] for one in members])), "low": "", "high": ""}
            for name in ("log_likelihood", "likelihood_lost"):
                known = all(one[name] != "" for one in members)
                row[name] = float(np.mean([one[name] for one in members])) if known else ""
            averages.append(row | {"likelihood_low": "", "likelihood_high": ""})
    return averages


def lines(rows: list[dict]) -> list[str]:
    """The table for a terminal."""
    titles = f"{'dataset':<32}{'sparsity':>9}{'questions':>10}{'score':>8}{'kept':>8}{'lost to dense':>24}"
    shown = [f"{titles}{'log-lik.':>10}{'lost':>24}"]
    for row in rows:
        name = " ".join(filter(None, (row["suite"], row["dataset"], row["subset"])))
        lost = "" if row["sparsity"] == "dense" else f"{row['lost']:.2f}"
        if lost and row["low"] != "":
            lost += f" [{row['low']:.2f}, {row['high']:.2f}]"
        numbers = f"{row['questions']:>10}{row['score']:>8.2f}{row['kept']:>8.3f}"
        likely, less = (f"{row[name]:.3f}" if row[name] != "" else "" for name in ("log_likelihood", "likelihood_lost"))
        less = "" if row["sparsity"] == "dense" else less
        if less and row["likelihood_low"] != "":
            less += f" [{row['likelihood_low']:.3f}, {row['likelihood_high']:.3f}]"
        shown.append(f"{name:<32}{row['sparsity']:>9}{numbers}{lost:>24}{likely:>10}{less:>24}")
    return shown
