"""From records to tables, and whether the library's default keeps what is promised."""

import collections
import dataclasses
from pathlib import Path

import numpy as np

from benchmarks.quality import report

MEASURES = ("kl", "kl_median", "same", "loss", "kept", "read", "missed", "estimated", "error", "sinks_share")
REFERENCE = "exact"  # what the others are paired with


@dataclasses.dataclass(frozen=True)
class Bound:
    """The worst that the library's default may come to, on average over a quick run's texts."""

    measure: str  # "lm" or "needles"
    name: str
    most: float | None = None
    least: float | None = None


# At an eighth of the bytes: what the default came to, and room for other texts.
BOUNDS = {
    "smollm2": (
        Bound("lm", "kl", most=0.005),  # 0.0033 to 0.0042 a text
        Bound("lm", "same", least=0.94),  # 0.96
        Bound("needles", "right_lost", most=0.03),
    ),
    "embedded": (
        Bound("lm", "kl", most=0.0015),  # 0.0008
        Bound("lm", "same", least=0.9),  # 0.939
        Bound("needles", "right_lost", most=0.03),  # 0
    ),
}
BUDGET = 0.125


def summarize(records: list[dict]) -> list[dict]:
    """One row for each measure, length, match, budget and method: means over texts, and the distance to exact keys.

    `kl_more`: the KL that the method has more than exact keys at the same budget on the same texts, and `right_lost`:
    dense attention's share of right tokens less the method's, both with 95 % intervals by bootstrap over texts.
    """
    groups = collections.defaultdict(dict)
    for record in records:
        where = record["measure"], record["length"], record["match"], record["budget"], record["method"]
        groups[where][record["text"]] = record
    rows = []
    for where, members in sorted(groups.items(), key=lambda item: (item[0][:4], _mean(item[1].values(), "kl"))):
        measure, length, match, budget, _ = where
        row = dict(zip(("measure", "length", "match", "budget", "method"), where, strict=True))
        row["texts"] = len(members)
        row |= {name: _mean(members.values(), name) for name in MEASURES if all(name in m for m in members.values())}
        exact = groups.get((measure, length, match, budget, REFERENCE), {})
        dense = groups.get((measure, length, "dense", 1.0, "dense"), {})
        row |= _paired("kl_more", members, exact, lambda a, b: [a["kl"] - b["kl"]])
        if measure == "needles":
            row["right"] = _each(members.values(), "right")
            row["exact"] = _each(members.values(), "exact")
            row |= _paired("right_lost", members, dense, lambda a, b: np.subtract(b["right"], a["right"]).tolist())
        rows.append(row)
    return rows


def _mean(members, name: str) -> float:
    return float(np.mean([member[name] for member in members]))


def _each(members, name: str) -> float:
    return float(np.mean([x for member in members for x in member[name]]))


def _paired(name: str, members: dict, others: dict, difference) -> dict:
    """Mean difference over the texts that both have, with its interval; nothing where they share none."""
    shared = [text for text in members if text in others]
    if not shared:
        return {}
    mean, low, high = report.interval([difference(members[text], others[text]) for text in shared])
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def per_head(records: list[dict]) -> list[dict]:
    """One row for each measure, length, match, budget, method, layer and key/value head: means over texts."""
    groups = collections.defaultdict(list)
    for record in records:
        where = record["measure"], record["length"], record["match"], record["budget"], record["method"]
        groups[where].append(record["heads"])
    rows = []
    for where, members in sorted(groups.items()):
        names = [name for name in members[0] if all(name in heads for heads in members)]
        means = {name: np.mean([heads[name] for heads in members], axis=0) for name in names}
        L, K = means["kept"].shape
        for layer, head in np.ndindex(L, K):
            row = dict(zip(("measure", "length", "match", "budget", "method"), where, strict=True))
            row |= {"layer": layer, "head": head}
            # What is known of every query head is averaged over the key/value head's group.
            rows.append(row | {name: float(np.mean(np.split(x[layer], K)[head])) for name, x in means.items()})
    return rows


def write(folder: Path, records: list[dict]) -> list[dict]:
    """summary.csv and heads.csv -> the rows of the first."""
    rows = summarize(records)
    names = list(dict.fromkeys(name for row in rows for name in row))
    report.write_csv(folder / "summary.csv", [{name: row.get(name, "") for name in names} for row in rows])
    heads = per_head(records)
    names = list(dict.fromkeys(name for row in heads for name in row))
    report.write_csv(folder / "heads.csv", [{name: row.get(name, "") for name in names} for row in heads])
    return rows


def lines(rows: list[dict]) -> list[str]:
    """The tables for a terminal, one for each measure, length and budget."""
    shown, last = [], None
    for row in rows:
        where = row["measure"], row["length"], row["match"], row["budget"]
        if where != last:
            last = where
            measure, length, match, budget = where
            what = {"bytes": "of the bytes", "keys": "of the keys", "asked": "sparsity, as it comes"}.get(match, "")
            shown += ["", f"{measure}, {length} tokens squeezed, {match} {what and f'({budget:g} {what})'}"]
            shown += [
                f"{'method':<34}{'texts':>6}{'bytes':>8}{'kept':>7}{'KL':>9}{'more than exact keys':>27}"
                f"{'same top':>9}{'missed':>8}{'says':>8}{'digits':>8}{'answers':>8}"
            ]
        number = lambda name, width, form, row=row: f"{row[name]:>{width}{form}}" if name in row else " " * width
        more = f"{row['kl_more']:.4f} [{row['kl_more_low']:.4f}, {row['kl_more_high']:.4f}]" if "kl_more" in row else ""
        shown.append(
            f"{row['method']:<34}{row['texts']:>6}{number('read', 8, '.4f')}{number('kept', 7, '.3f')}"
            f"{number('kl', 9, '.4f')}{more:>27}{number('same', 9, '.3f')}{number('missed', 8, '.3f')}"
            f"{number('estimated', 8, '.3f')}{number('right', 8, '.3f')}{number('exact', 8, '.3f')}"
        )
    return shown


def check(rows: list[dict], model: str, default: str) -> list[str]:
    """What of the library's default is worse than the bounds of this model, in words; nothing for other models."""
    failed = []
    for bound in BOUNDS.get(model, ()):
        at = [
            row
            for row in rows
            if (row["measure"], row["match"], row["budget"], row["method"]) == (bound.measure, "bytes", BUDGET, default)
        ]
        if not at:
            failed.append(f"{bound.measure} {bound.name}: not measured; the index alone may take {BUDGET:g}")
        for row in at:
            value, where = row[bound.name], f"{bound.measure} at {row['length']} tokens, {BUDGET:g} of the bytes"
            if bound.most is not None and value > bound.most:
                failed.append(f"{where}: {bound.name} is {value:.4f}, at most {bound.most:g} is allowed")
            if bound.least is not None and value < bound.least:
                failed.append(f"{where}: {bound.name} is {value:.4f}, at least {bound.least:g} is wanted")
    return failed
