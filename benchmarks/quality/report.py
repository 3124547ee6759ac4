"""From records of runs to tables and figures: paired differences with confidence intervals, CSV and PNG."""

import collections
import csv
import json
from pathlib import Path

import numpy as np

RESAMPLED = 2000


def load(path: Path) -> list[dict]:
    """The records that `benchmarks.quality` has written so far; a line cut short by an interruption is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def interval(differences: list[list[float]], seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of paired differences, a list of questions for each context; 95 %, by bootstrap over contexts.

    Questions of one context share its clusters and its luck: contexts are drawn again, not questions.
    """
    sums = np.array([np.sum(one) for one in differences])
    sizes = np.array([len(one) for one in differences])
    draws = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLED, len(sums)))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / sizes.sum()), float(low), float(high)


def summarize(records: list[dict]) -> list[dict]:
    """One row for each length, task (and all tasks together), match, method and budget: means, and what dense loses.

    `exact`, `found`: shares of replies right, and of looked-up tokens right; `found_lost`: dense's `found` less the
    method's on the same questions, in points, with its 95 % interval.
    """
    context = lambda record: (record["length"], record["task"], record["seed"])
    dense = {context(record): record for record in records if record["method"] == "dense"}
    groups = collections.defaultdict(list)
    for record in records:
        if context(record) in dense:
            for task in (record["task"], "all"):
                groups[record["length"], task, record["match"], record["method"], record["budget"]].append(record)
    rows = []
    for (length, task, match, method, budget), members in sorted(groups.items()):
        pairs = [(dense[context(record)]["found"], record["found"]) for record in members]
        lost = interval([np.subtract(*pair).tolist() for pair in pairs])
        mean = lambda name, members=members: float(np.mean([np.mean(record[name]) for record in members]))
        row = {"length": length, "task": task, "match": match, "method": method, "budget": budget}
        row |= {"contexts": len(members), "questions": sum(len(record["exact"]) for record in members)}
        row |= {name: mean(name) for name in ("kept", "read", "exact", "found", "mass", "error")}
        row |= dict(zip(("found_lost", "low", "high"), (100 * value for value in lost), strict=True))
        rows.append(row)
    return rows


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows with the same names, numbers to five digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()})


def per_head(records: list[dict]) -> list[dict]:
    """Kept fraction, mass and error of every layer and head, for each length, match, method and budget."""
    groups = collections.defaultdict(list)
    for record in records:
        groups[record["length"], record["match"], record["method"], record["budget"]].append(record)
    rows = []
    for (length, match, method, budget), members in sorted(groups.items()):
        means = {name: np.mean([record[name] for record in members], axis=0) for name in ("kept", "mass", "error")}
        group = means["mass"].shape[1] // means["kept"].shape[1]
        for layer, head in np.ndindex(means["mass"].shape):
            row = {"length": length, "match": match, "method": method, "budget": budget, "layer": layer, "head": head}
            heads = {"kept": head // group, "mass": head, "error": head}
            rows.append(row | {name: float(means[name][layer, at]) for name, at in heads.items()})
    return rows


def write_figures(folder: Path, rows: list[dict], heads: list[dict]) -> list[Path]:
    """Replies and mass over what is read, and kept fractions by layer and head. Needs the `plots` extra."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    # Where the index alone exceeds a budget nothing is kept, and there is nothing to show.
    together = [row for row in rows if row["task"] == "all" and row["method"] != "dense" and row["kept"] > 0]
    colors = dict(zip(dict.fromkeys(row["method"] for row in together), pyplot.get_cmap("tab20").colors, strict=False))
    for length in sorted({row["length"] for row in together}):
        for match, axis in (("keys", "kept"), ("bytes", "read")):
            here = [row for row in together if row["length"] == length and row["match"] == match]
            budgets = sorted({row["budget"] for row in here})
            figure, panels = pyplot.subplots(1, 3, figsize=(17, 5))
            for panel, name, title in (
                (panels[0], "found_lost", "points lost to dense attention"),
                (panels[1], "mass", "attention mass attended to"),
                (panels[2], "error", "error of the attention output"),
            ):
                for method in dict.fromkeys(row["method"] for row in here):
                    curve = sorted((row for row in here if row["method"] == method), key=lambda row: row[axis])
                    style = {"color": colors[method], "linestyle": "-" if method.startswith("squeezed") else "--"}
                    values = ([row[axis] for row in curve], [row[name] for row in curve])
                    panel.plot(*values, marker="o", markersize=4, label=method, **style)
                panel.set(xscale="log", xlabel=f"{axis}, fraction of dense", title=title)
                panel.set_xticks(budgets, [f"{budget:g}" for budget in budgets], minor=False)
                panel.minorticks_off()
            panels[2].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
            figure.suptitle(f"{length} tokens, equal {match}")
            written.append(_save(figure, folder / f"{match}-{length}.png"))
    written += _head_maps(pyplot, folder, heads)
    return written


def _head_maps(pyplot, folder: Path, heads: list[dict]) -> list[Path]:
    written = []
    squeezed = [row for row in heads if row["method"] == "squeezed" and row["match"] == "keys"]
    for length in sorted({row["length"] for row in squeezed}):
        budgets = sorted({row["budget"] for row in squeezed if row["length"] == length}, reverse=True)
        figure, panels = pyplot.subplots(1, len(budgets), figsize=(3 * len(budgets), 3), squeeze=False)
        for panel, budget in zip(panels[0], budgets, strict=True):
            cells = [row for row in squeezed if row["length"] == length and row["budget"] == budget]
            grid = np.zeros([1 + max(row[name] for row in cells) for name in ("layer", "head")])
            for row in cells:
                grid[row["layer"], row["head"]] = row["kept"]
            panel.imshow(grid, vmin=0)
            for at, value in np.ndenumerate(grid):
                panel.text(at[1], at[0], f"{value:.2f}", ha="center", va="center", color="white", fontsize=7)
            panel.set(title=f"budget {budget:g}", xlabel="head", ylabel="layer")
        written.append(_save(figure, folder / f"heads-{length}.png"))
    return written


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    figure.clear()
    return path
