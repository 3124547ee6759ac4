"""From records of runs to tables and figures: paired differences with confidence intervals, CSV and PNG."""

import collections
import csv
import importlib.util
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

RESAMPLED = 2000
MATCHES = ("bytes", "keys")
SHOWN = {  # methods in figures: label, color, line
    "exact": ("oracle: every head its best keys, as many", "black", ":"),
    "squeezed_fine_two": ("squeezed, 5 % → 20 % centroids in 4 bits", "tab:red", "-"),
    "squeezed_fine_two_tail": ("the same, the rest estimated by mean values", "tab:purple", "-"),
    "squeezed_flat": ("squeezed, 5 % centroids", "tab:orange", "-"),
    "squeezed": ("squeezed, 1 % → 5 % centroids", "gold", "-"),
    "quest": ("Quest", "tab:blue", "--"),
    "quest_4_bits": ("Quest, index in 4 bits", "tab:cyan", "--"),
    "snapkv": ("SnapKV", "tab:green", "--"),
    "window": ("window and sinks", "tab:gray", "--"),
}


def write(folder: Path, methods: Iterable[str], ablations: dict) -> None:
    """Tables and figures of all that is on record in a folder; methods by name, ablations as in variants.py."""
    records = load(folder / "records.jsonl")
    main = [record for record in records if record["method"] in {*methods, "dense"}]
    names = {ablation: [method.name for method in varied] for ablation, varied in ablations.items()}
    rows, heads, varied = summarize(main), per_head(main), compare(records, names)
    tables = {"summary.csv": rows, "heads.csv": heads, "ablations.csv": varied}
    for name, table in tables.items():
        if table:
            write_csv(folder / name, table)
    if importlib.util.find_spec("matplotlib"):
        write_figures(folder, rows, heads, varied)
    else:
        print("no figures: matplotlib is not installed (pip install 'squeezejax[plots]')")


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
    dense = {_context(record): record for record in records if record["method"] == "dense"}
    groups = collections.defaultdict(list)
    for record in records:
        if _context(record) in dense:
            for task in (record["task"], "all"):
                groups[record["length"], task, record["match"], record["method"], record["budget"]].append(record)
    rows = []
    for (length, task, match, method, budget), members in sorted(groups.items()):
        row = {"length": length, "task": task, "match": match, "method": method, "budget": budget}
        row |= _means(members)
        row |= _difference("found_lost", "low", "high", [dense[_context(record)] for record in members], members)
        rows.append(row)
    return rows


def compare(records: list[dict], ablations: dict[str, list[str]]) -> list[dict]:
    """One row for each ablation, length, match, budget and variant: means, and what it gains on the first variant.

    `found_gained`: in points, on contexts that both were run on, with its 95 % interval.
    """
    groups = collections.defaultdict(dict)
    for record in records:
        groups[record["length"], record["match"], record["budget"], record["method"]][_context(record)] = record
    rows = []
    for (ablation, names), (length, match, budget) in itertools.product(
        ablations.items(), sorted({where[:3] for where in groups})
    ):
        usual, *others = (groups.get((length, match, budget, name), {}) for name in names)
        for name, variant in zip(names, (usual, *others) if any(others) else (), strict=False):
            shared = [context for context in usual if context in variant]
            if shared:
                pairs = [usual[context] for context in shared], [variant[context] for context in shared]
                row = {"ablation": ablation, "length": length, "match": match, "budget": budget, "variant": name}
                row |= _means(pairs[1]) | {"setting": float(np.mean([record["setting"] for record in pairs[1]]))}
                rows.append(row | _difference("found_gained", "low", "high", *reversed(pairs)))
    return rows


def _context(record: dict) -> tuple:
    return record["length"], record["task"], record["seed"]


def _means(records: list[dict]) -> dict:
    mean = lambda name: float(np.mean([np.mean(record[name]) for record in records]))
    counts = {"contexts": len(records), "questions": sum(len(record["exact"]) for record in records)}
    return counts | {name: mean(name) for name in ("kept", "read", "asked", "exact", "found", "mass", "error")}


def _difference(name: str, low: str, high: str, ones: list[dict], others: list[dict]) -> dict:
    """What `ones` found more than `others` on the same contexts, in points, and its interval."""
    pairs = zip(ones, others, strict=True)
    found = interval([np.subtract(one["found"], other["found"]).tolist() for one, other in pairs])
    return dict(zip((name, low, high), (100 * value for value in found), strict=True))


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


def write_figures(folder: Path, rows: list[dict], heads: list[dict], varied: list[dict]) -> list[Path]:
    """Replies and mass over the budget, kept fractions by layer and head, and ablations. Needs the `plots` extra."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Where hardly anything but the index fits in a budget there is nothing to show.
    together = [row for row in rows if row["task"] == "all" and row["method"] in SHOWN and row["kept"] > 0.004]
    dense = {row["length"]: row["found"] for row in rows if row["task"] == "all" and row["method"] == "dense"}
    written = []
    for length, match in itertools.product(sorted(dense), MATCHES):
        # The oracle's index is all keys: only at equal keys is there anything to see of it.
        wanted = lambda row, match=match: row["match"] == ("keys" if row["method"] == "exact" else match)
        here = [row for row in together if row["length"] == length and wanted(row)]
        if here:
            for what in ("accuracy", "mass"):
                figure = _over_budget(pyplot, what, match, here, dense[length])
                written.append(_save(figure, folder / f"{what}-{match}-{length}.png"))
    return written + _head_maps(pyplot, folder, heads) + _ablations(pyplot, folder, varied)


def _over_budget(pyplot, what: str, match: str, rows: list[dict], dense: float):
    """One panel: accuracy or mass of the methods shown over what they attend to or read."""
    figure, panel = pyplot.subplots(figsize=(10, 5))
    for method, (label, color, line) in SHOWN.items():
        measured = "kept" if match == "keys" or method == "exact" else "read"
        curve = sorted((row for row in rows if row["method"] == method), key=lambda row: row[measured])
        if not curve:
            continue
        x, style = [row[measured] for row in curve], {"color": color, "linestyle": line, "label": label, "marker": "o"}
        if what == "mass":
            panel.plot(x, [100 * row["mass"] for row in curve], markersize=4, **style)
        else:
            lost, low, high = (np.array([row[name] for row in curve]) for name in ("found_lost", "low", "high"))
            bars = np.maximum([high - lost, lost - low], 0)
            panel.errorbar(x, 100 * dense - lost, bars, markersize=4, elinewidth=1, capsize=2, **style)
    if what == "accuracy":
        panel.axhline(100 * dense, color="black", linewidth=1, label="dense attention")
    budgets = sorted({row["budget"] for row in rows})
    panel.set(xscale="log", title=f"{rows[0]['length']:,} tokens, {rows[0]['contexts']} contexts")
    panel.set_ylabel("looked-up tokens right, %" if what == "accuracy" else "attention mass attended to, %")
    panel.set_xlabel("keys attended to" if match == "keys" else "bytes read, index included")
    panel.set_xticks(budgets, [f"1/{1 / budget:g}" for budget in budgets])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _ablations(pyplot, folder: Path, varied: list[dict]) -> list[Path]:
    """What each variant finds more than the usual one at equal bytes, and its mass, a figure a length."""
    written = []
    for length in sorted({row["length"] for row in varied}):
        here = [row for row in varied if row["length"] == length and row["match"] == "bytes"]
        members = {
            name: [row for row in here if row["ablation"] == name] for name in {row["ablation"]: 0 for row in here}
        }
        labels = {name: [*dict.fromkeys(row["variant"] for row in rows)] for name, rows in members.items()}
        heights = [len(names) for names in labels.values()]
        shape = {"figsize": (12, 0.32 * sum(heights) + 0.75 * len(heights)), "height_ratios": heights}
        figure, panels = pyplot.subplots(len(heights), 2, squeeze=False, sharex="col", **shape)
        for (left, right), (name, rows) in zip(panels, members.items(), strict=True):
            budgets = sorted({row["budget"] for row in rows}, reverse=True)
            for shift, budget in enumerate(budgets):
                points = [row for row in rows if row["budget"] == budget]
                y = [labels[name].index(row["variant"]) + 0.2 * shift for row in points]
                gained, low, high = (np.array([row[key] for row in points]) for key in ("found_gained", "low", "high"))
                style = {"fmt": "o", "markersize": 4, "label": f"1/{1 / budget:g} of the bytes"}
                left.errorbar(gained, y, xerr=np.maximum([gained - low, high - gained], 0), **style)
                right.plot([100 * row["mass"] for row in points], y, "o", markersize=4)
            left.set(title=name, ylim=(len(labels[name]) - 0.5, -0.5))
            left.set_yticks(range(len(labels[name])), labels[name])
            right.set(ylim=left.get_ylim(), yticks=[])
            for panel in (left, right):
                panel.grid(alpha=0.3)
            left.axvline(0, color="black", linewidth=1)
        panels[0, 0].legend(fontsize=8)
        panels[-1, 0].set_xlabel("points found more than by the first of each group")
        panels[-1, 1].set_xlabel("attention mass attended to, %")
        written.append(_save(figure, folder / f"ablations-{length}.png"))
    return written


def _head_maps(pyplot, folder: Path, heads: list[dict]) -> list[Path]:
    written = []
    squeezed = [row for row in heads if row["method"] == "squeezed" and row["match"] == "keys"]
    for length in sorted({row["length"] for row in squeezed}):
        budgets = sorted({row["budget"] for row in squeezed if row["length"] == length}, reverse=True)
        shape = {"figsize": (2.6 * len(budgets), 3.2), "sharey": True, "squeeze": False}
        figure, panels = pyplot.subplots(1, len(budgets), **shape)
        for panel, budget in zip(panels[0], budgets, strict=True):
            cells = [row for row in squeezed if row["length"] == length and row["budget"] == budget]
            grid = np.zeros([1 + max(row[name] for row in cells) for name in ("layer", "head")])
            for row in cells:
                grid[row["layer"], row["head"]] = row["kept"]
            panel.imshow(grid, vmin=0)
            for at, value in np.ndenumerate(grid):
                panel.text(at[1], at[0], f"{value:.2f}", ha="center", va="center", color="white", fontsize=7)
            panel.set(title=f"budget {budget:g}", xlabel="head")
            panel.set(xticks=range(grid.shape[1]), yticks=range(grid.shape[0]))
        panels[0, 0].set_ylabel("layer")
        written.append(_save(figure, folder / f"heads-{length}.png"))
    return written


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    figure.clear()
    return path
