"""Many questions about one document, as in PreFixQA (the set that the Squeezed Attention paper made): our own schema.

One line of a JSONL file is one document:

    {"id": "contract-1",                  what to call it in records
     "context": "…",                      the document
     "questions": [
         {"question": "Who signed it?",
          "answers": ["Ada Moss"],        each of them is right; for contains_all, all are wanted
          "metric": "f1"}],               optional: f1 (default), f1_chinese, rouge_l, rouge_l_chinese, contains_any,
                                          contains_all, count or code_similarity (metrics.py)
     "max_new_tokens": 64}                optional, for all replies

The prompt is the document, an empty line and the question, in the model's chat template where it has one, and else as
it stands: for a base model, have questions end with something like "\\nAnswer:". The document is fixed.
"""

from pathlib import Path

from benchmarks.public.samples import Item, check_fields, not_blank, read_lines, strings
from squeezejax.chat.prompts import JOINT

METRICS = (
    "f1",
    "f1_chinese",
    "rouge_l",
    "rouge_l_chinese",
    "contains_any",
    "contains_all",
    "count",
    "code_similarity",
)
DEFAULT_METRIC, DEFAULT_LENGTH = "f1", 64


def read(path: Path) -> list[Item]:
    """The questions in one file. Raises FileNotFoundError or ValueError with a sentence that says where."""
    items = []
    for where, _, record in read_lines(path, {"id": str, "context": str, "questions": list}):
        context = not_blank(where, "context", record["context"])
        length = record.get("max_new_tokens", DEFAULT_LENGTH)
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"{where}: the field 'max_new_tokens' must be a whole number above 0")
        if not record["questions"]:
            raise ValueError(f"{where} has no questions")
        for number, question in enumerate(record["questions"], 1):
            here = f"{where}, question {number}"
            if not isinstance(question, dict):
                raise ValueError(f'{here} must be an object, {{"question": …, "answers": […]}}')
            check_fields(here, question, {"question": str, "answers": list})
            metric = question.get("metric", DEFAULT_METRIC)
            if metric not in METRICS:
                raise ValueError(f"{here}: no metric {metric!r}; there are {', '.join(METRICS)}")
            items.append(
                Item(
                    suite="prefixqa",
                    dataset=path.stem,
                    subset="",
                    id=f"{record['id']}/{number}",
                    context=context,
                    question=JOINT + not_blank(here, "question", question["question"]),
                    answers=strings(here, question, "answers"),
                    metric=metric,
                    max_new_tokens=length,
                    chat=True,
                )
            )
    return items
