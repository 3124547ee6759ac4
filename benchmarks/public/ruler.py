"""RULER (https://github.com/NVIDIA/RULER, Apache-2.0): the files that its scripts/data/prepare.py writes.

A line has input, the whole prompt; outputs, the strings to be found; and, from its newer versions, answer_prefix, with
which the reply begins. No line names its task: the file's folder does (niah_single_1/validation.jsonl, as RULER writes
it), or the file itself (niah_single_1.jsonl).

Prompts are taken as they stand, so prepare them for the model with RULER's own --model_template_type. What is asked
begins at the last "What " of a needle task and at the last "Question:" of the others; all before that is fixed. In
question answering this includes the instruction repeated after the documents, the same for every question.
"""

from pathlib import Path
from typing import NamedTuple

from benchmarks.public.samples import Item, not_blank, read_lines, strings


class _Task(NamedTuple):
    metric: str
    max_new_tokens: int
    asks: str  # what a question begins with


_TASKS = {  # by a task's name up to "_"
    "niah": _Task("contains_all", 128, "What "),
    "vt": _Task("contains_all", 30, "Question:"),
    "cwe": _Task("contains_all", 120, "Question:"),
    "fwe": _Task("contains_all", 50, "Question:"),
    "qa": _Task("contains_any", 32, "Question:"),
}


def read(path: Path) -> list[Item]:
    """The questions in one file. Raises FileNotFoundError or ValueError with a sentence that says where."""
    name = path.absolute().parent.name if path.stem in ("validation", "test") else path.stem
    task = _TASKS.get(name.split("_")[0])
    items = []
    for where, number, record in read_lines(path, {"input": str, "outputs": list}):
        if task is None:
            raise ValueError(
                f"{path}: RULER has no task {name!r}; name the file or its folder after one: niah_…, vt, cwe, fwe, qa_…"
            )
        prefix = record.get("answer_prefix", "")
        if not isinstance(prefix, str):
            raise ValueError(f"{where}: the field 'answer_prefix' must be a string")
        context, asks, question = record["input"].rpartition(task.asks)
        if not asks:
            raise ValueError(f"{where}: no {task.asks!r} in its input, so it is no sample of {name}")
        not_blank(where, "text before the question", context)
        fixed = context.rstrip()
        items.append(
            Item(
                suite="ruler",
                dataset=name,
                subset=_length(record),
                id=str(number),  # `index` is not unique in RULER's needle tasks
                context=fixed,
                question=context[len(fixed) :] + asks + question + prefix,
                answers=strings(where, record, "outputs"),
                metric=task.metric,
                max_new_tokens=task.max_new_tokens,
                chat=False,
            )
        )
    return items


def _length(record: dict) -> str:
    """The length that a sample was made for: `length` is its own, a little less, and RULER's are powers of two."""
    length = record.get("length")
    return str(1 << (length - 1).bit_length()) if isinstance(length, int) and length > 0 else ""
