"""Measuring quality end to end: records that resume, budgets that are met, tables and intervals."""

import csv
import dataclasses
import json
import math
import sys

import numpy as np
import pytest

import squeezejax
from benchmarks.quality import __main__ as quality
from benchmarks.quality import methods, report, variants


def record(method, found, *, task="facts", seed=0, budget=0.1, match="keys"):
    """What a run leaves: two layers, two heads on one key/value head."""
    made = {"length": 64, "task": task, "seed": seed, "match": match, "method": method, "budget": budget}
    values = {"exact": [x == 1 for x in found], "found": found, "kept": [[0.1], [0.3]], "read": [[0.2], [0.4]]}
    values |= {"asked": [[0.5], [0.7]], "setting": 0.9}
    return made | values | {"mass": [[0.5, 0.6], [0.7, 0.8]], "error": [[0.4, 0.3], [0.2, 0.1]]}


def test_summary_of_a_few_records_by_hand():
    dense = {"match": "", "budget": 1.0}
    records = [
        record("dense", [1, 1, 0.5, 1], **dense),
        record("dense", [1, 1], task="single", **dense),
        record("quest", [1, 0.5, 0.5, 0]),
        record("quest", [1, 1], task="single"),
        record("quest", [0, 0], task="variables"),  # dense has not run there: not compared
    ]
    rows = {(row["task"], row["method"]): row for row in report.summarize(records)}
    assert set(rows) == {(task, method) for task in ("facts", "single", "all") for method in ("dense", "quest")}
    facts = rows["facts", "quest"]
    assert (facts["contexts"], facts["questions"], facts["exact"], facts["found"]) == (1, 4, 0.25, 0.5)
    assert math.isclose(facts["found_lost"], 100 * 1.5 / 4)
    assert math.isclose(facts["low"], facts["high"])  # one context: nothing to draw from
    everything = rows["all", "quest"]
    assert math.isclose(everything["found_lost"], 100 * 1.5 / 6)
    assert (everything["low"], everything["high"]) == (0, 37.5)
    assert [rows["all", "dense"][name] for name in ("found_lost", "low", "high")] == [0, 0, 0]
    np.testing.assert_allclose([facts[name] for name in ("kept", "read", "mass", "error")], [0.2, 0.3, 0.65, 0.25])
    heads = report.per_head(records)
    assert [row["kept"] for row in heads if row["method"] == "quest"] == pytest.approx([0.1, 0.1, 0.3, 0.3])
    assert [row["mass"] for row in heads if row["method"] == "quest"] == pytest.approx([0.5, 0.6, 0.7, 0.8])


def test_variants_are_compared_with_the_first_on_the_same_contexts():
    records = [
        record("flat", [1, 0.5]),
        record("flat", [1, 1], seed=1),
        record("flat", [0, 0], seed=2),  # the variants have not run here
        record("fine", [1, 1]),
        record("fine", [0.5, 1], seed=1),
        record("flat", [1, 1], budget=0.5),  # nor at this budget
    ]
    usual, fine = report.compare(records, {"fractions": ["flat", "fine", "finer"], "other": ["flat", "coarse"]})
    assert [usual[name] for name in ("ablation", "variant", "contexts", "found_gained")] == ["fractions", "flat", 3, 0]
    assert [fine[name] for name in ("variant", "budget", "contexts", "found_gained")] == ["fine", 0.1, 2, 0]
    assert (fine["low"], fine["high"]) == (-25, 25)  # half a token in two lost in one context, won in the other
    assert (fine["asked"], fine["setting"]) == pytest.approx((0.6, 0.9))


def test_intervals_narrow_with_contexts():
    rng = np.random.default_rng(0)
    few, many = ([rng.normal(1, 1, 8).tolist() for _ in range(contexts)] for contexts in (5, 200))
    (_, low, high), (mean, narrow_low, narrow_high) = report.interval(few), report.interval(many)
    assert low < 1 < high
    assert narrow_low < 1 < narrow_high
    assert (narrow_high - narrow_low) < (high - low) / 3
    # 1,600 independent questions: ± 1.96/40.
    assert narrow_high - mean == pytest.approx(1.96 / 40, rel=0.25)


def build_by_position(keys, values, config, *, weights=None):
    """A tree without K-means, which takes long to compile: clusters of neighbours."""
    S = keys.shape[2] - config.observation_window
    sizes = config.num_clusters(S)
    labels = lambda number, above: np.broadcast_to(np.arange(number) * above // number, (*keys.shape[:2], number))
    return squeezejax.build_tree(keys, values, config, labels=tuple(map(labels, (*sizes[1:], S), sizes)))


def test_one_command_from_model_to_tables_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "SETTINGS", {"sparsity": (0.5, 0.9)})
    flat, variant = variants.FLAT, methods.squeezed("4 bits", dataclasses.replace(variants.FLAT.config, index_bits=4))
    monkeypatch.setattr(quality, "ABLATIONS", {"bits": (flat, variant)})
    monkeypatch.setattr(methods, "build_tree", build_by_position)
    command = ["quality", "--out", str(tmp_path), "--lengths", "300", "--tasks", "single", "--contexts", "1"]
    command += ["--methods", "squeezed_flat", "quest", "--budgets", "0.25", "--ablation-budgets", "0.25"]
    monkeypatch.setattr(sys, "argv", command)
    quality.main()
    assert "single 0: 7 runs" in capsys.readouterr().out
    records = report.load(tmp_path / "records.jsonl")
    kept = {(one["method"], one["match"]): np.mean(one["kept"]) for one in records}
    read = {(one["method"], one["match"]): np.mean(one["read"]) for one in records}
    names = {"squeezed_flat", "quest"}
    assert set(kept) == {("dense", "")} | {(m, b) for m in names | {"4 bits"} for b in ("keys", "bytes")}
    assert kept["dense", ""] == 1
    # Pages are whole: up to 16 of some 200 keys more than asked for.
    assert 0.25 <= kept["quest", "keys"] <= 0.25 + 16 / 200
    assert 0.25 <= read["quest", "bytes"] <= 0.25 + 16 / 200
    assert read["quest", "keys"] == pytest.approx(
        kept["quest", "keys"] + 13 / 201, rel=1e-4
    )  # 13 pages of minima and maxima
    with (tmp_path / "summary.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {row["method"] for row in table} == names | {"dense"}
    with (tmp_path / "ablations.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["squeezed_flat", "4 bits"] * 2
    # A line that was cut short is run again, the others are not.
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    (tmp_path / "records.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20] + "\n")
    quality.main()
    assert "single 0: 1 runs" in capsys.readouterr().out
    again = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines() if line.endswith("}")]
    assert again == records
    (tmp_path / "model.txt").write_text("another")
    with pytest.raises(ValueError, match="records of other weights"):
        quality.main()
