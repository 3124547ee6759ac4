"""L-Eval (https://github.com/OpenLMLab/LEval, arXiv 2307.11088): many questions about each document.

A line of its files has input, the document; instructions, the questions; outputs, the right answers; and evaluation,
how its authors score it: exam (exactly), f1, rouge, LLM, human. Here exam asks for the letters of the right choices, or
for true or false, or for the answer to be in the reply; judgements by a model or by people are replaced by F1.

The prompt is L-Eval's in short: the document, the question, and that nothing but the answer is wanted, in the model's
chat template where it has one. The document is fixed. In multidoc_qa, a conversation, every turn is asked by itself.
"""

import json
import re
from pathlib import Path

from benchmarks.public.samples import Item, not_blank, read_lines, strings

HEAD = "Document is as follows.\n"
QUESTION = "\n\nQuestion: {}\nPlease directly give the answer without any additional output or explanation.\nAnswer:"
LENGTHS = {"exam": 32, "f1": 64, "LLM": 64, "human": 64, "rouge": 256}  # tokens of a reply
_CHOICE = re.compile(r"\(?([A-H]+)\)?(?=$|[\s.,:])")


def read(path: Path) -> list[Item]:
    """The questions in one file. Raises FileNotFoundError or ValueError with a sentence that says where."""
    items = []
    for where, number, record in read_lines(path, {"input": str, "instructions": list, "outputs": list}):
        questions, answers = (strings(where, record, name) for name in ("instructions", "outputs"))
        if len(questions) != len(answers):
            raise ValueError(f"{where} has {len(questions)} instructions and {len(answers)} outputs")
        kind = record.get("evaluation", "f1")
        if kind not in LENGTHS:
            raise ValueError(f"{where}: no evaluation {json.dumps(kind)}; there are {', '.join(LENGTHS)}")
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True), 1):
            metric, wanted = how(kind, answer)
            if not wanted.strip():
                continue  # a few answers are empty
            items.append(
                Item(
                    suite="leval",
                    dataset=path.stem,
                    subset="",
                    id=f"{number}/{i}",
                    context=HEAD + not_blank(where, "input", record["input"]).strip(),
                    question=QUESTION.format(question.strip()),
                    answers=(wanted,),
                    metric=metric,
                    max_new_tokens=LENGTHS[kind],
                    chat=True,
                )
            )
    return items


def how(evaluation: str, answer: str) -> tuple[str, str]:
    """(metric, what is wanted) for an answer as the file has it."""
    answer = answer.strip()
    if evaluation != "exam":
        return ("rouge_l" if evaluation == "rouge" else "f1"), answer
    if found := _CHOICE.match(answer):
        return "choice", found[1]
    if found := re.match(r"(True|False) \[fact", answer):
        return "contains_any", found[1]
    return "contains_any", answer
