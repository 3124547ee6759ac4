"""LongBench v1 and LongBench-E (https://github.com/THUDM/LongBench, MIT): its files, its prompts, its rules.

A JSONL file holds one dataset; a line has input, context, answers, length, dataset, language, all_classes and _id.
Prompts and reply lengths are read from LongBench's own folder LongBench/config (dataset2prompt.json,
dataset2maxlen.json), so that they are the published ones to the letter; none of its text is in this repository.

A prompt is fixed up to the end of the context, its opening instruction included; the rest, which may repeat the
instruction, is the question. All published prompts have the context before the question. Where a prompt has {input}
before {context}, the fixed part holds the question, and no two questions share it.
"""

import json
import string
from pathlib import Path
from typing import NamedTuple

from benchmarks.public.samples import Item, check_fields, not_blank, read_lines, strings

FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")  # a reply ends with its first line
CODE = ("lcc", "repobench-p")
# Few-shot examples and code are to be continued: no chat template.
METRICS = {
    "narrativeqa": "f1",
    "qasper": "f1",
    "multifieldqa_en": "f1",
    "multifieldqa_zh": "f1_chinese",
    "hotpotqa": "f1",
    "2wikimqa": "f1",
    "musique": "f1",
    "dureader": "rouge_l_chinese",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "vcsum": "rouge_l_chinese",
    "trec": "classification",
    "triviaqa": "f1",
    "samsum": "rouge_l",
    "lsht": "classification",
    "passage_count": "count",
    "passage_retrieval_en": "retrieval",
    "passage_retrieval_zh": "retrieval",
    "lcc": "code_similarity",
    "repobench-p": "code_similarity",
}
_PROMPTS, _LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"


class Config(NamedTuple):
    """LongBench's own configuration."""

    prompts: dict[str, str]  # dataset -> template of {context} and {input}
    max_new_tokens: dict[str, int]


def read_config(folder: Path | None) -> Config:
    """Prompts and lengths of replies. Raises FileNotFoundError or ValueError, saying what to give instead."""
    if folder is None:
        raise ValueError("--longbench needs --longbench-config, the folder LongBench/config of a clone of LongBench")
    contents = []
    for name in Config._fields:
        path = folder / {"prompts": _PROMPTS, "max_new_tokens": _LENGTHS}[name]
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {path.name}: give the folder LongBench/config of a clone of "
                "https://github.com/THUDM/LongBench"
            )
        try:
            contents.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error})") from error
    return Config(*contents)


def read(path: Path, config: Config) -> list[Item]:
    """The questions in one file. Raises FileNotFoundError or ValueError with a sentence that says where."""
    items = []
    fields = {"input": str, "context": str, "answers": list, "dataset": str, "_id": str}
    for where, _, record in read_lines(path, fields):
        dataset = record["dataset"].removesuffix("_e")
        if dataset not in METRICS:
            raise ValueError(f"{where}: no dataset {dataset!r} in LongBench; there are {', '.join(METRICS)}")
        is_even = path.stem.endswith("_e") or record["dataset"].endswith("_e")
        classes = ()
        if METRICS[dataset] == "classification":
            check_fields(where, record, {"all_classes": list})
            classes = strings(where, record, "all_classes")
        not_blank(where, "context", record["context"])
        before, after = _halves(config, dataset)
        items.append(
            Item(
                suite="longbench-e" if is_even else "longbench",
                dataset=dataset,
                subset=_interval(where, record) if is_even else "",
                id=record["_id"],
                context=before.format(input=record["input"]) + record["context"],
                question=after.format(input=record["input"]),
                answers=_answers(where, record, METRICS[dataset]),
                metric=METRICS[dataset],
                max_new_tokens=config.max_new_tokens[dataset],
                chat=dataset not in (*FEW_SHOT, *CODE),
                classes=classes,
                first_line=dataset in FEW_SHOT,
                stop_at_newline=dataset == "samsum",
            )
        )
    return items


def _answers(where: str, record: dict, metric: str) -> tuple[str, ...]:
    answers = strings(where, record, "answers")
    if metric == "retrieval" and not all(any(map(str.isdecimal, answer)) for answer in answers):
        raise ValueError(f"{where}: the answers of {record['dataset']} must name a paragraph by its number")
    return answers


def _halves(config: Config, dataset: str) -> tuple[str, str]:
    """A prompt's template before and after its context."""
    template, length = config.prompts.get(dataset), config.max_new_tokens.get(dataset)
    if not isinstance(template, str) or not isinstance(length, int):
        raise ValueError(f"{_PROMPTS} or {_LENGTHS} has no entry for {dataset}: give LongBench's own folder")
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{_PROMPTS}: the prompt of {dataset} is no template ({error})") from error
    if names.count("context") != 1 or not set(names) <= {"context", "input"}:
        raise ValueError(f"{_PROMPTS}: the prompt of {dataset} must have {{context}} once, and else only {{input}}")
    before, after = template.split("{context}")
    return before, after


def _interval(where: str, record: dict) -> str:
    """LongBench-E's tables have three intervals of words."""
    check_fields(where, record, {"length": int})
    return "0-4k" if record["length"] < 4000 else "4-8k" if record["length"] < 8000 else "8k+"
