"""What the readers of all benchmarks hand on, one `Item` a question, and how they read JSONL files."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Item:
    """One question about one context, and how its reply is scored."""

    suite: str
    dataset: str
    subset: str  # of lengths, which tables keep apart; "" = none
    id: str
    context: str  # the prompt up to the end of what is fixed
    question: str  # the rest of the prompt, joint included
    answers: tuple[str, ...]
    metric: str  # in metrics.METRICS
    max_new_tokens: int
    chat: bool  # the prompt goes into the model's chat template, where it has one
    classes: tuple[str, ...] = ()  # all that a classification may answer
    first_line: bool = False  # only that of a reply is scored
    stop_at_newline: bool = False

    @functools.cached_property
    def key(self) -> str:
        """Names the question in records; another text, answer or metric has another key."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:12]
        return f"{self.suite}/{self.dataset}/{self.id}/{digest}"


def read_lines(path: Path, fields: dict[str, type]) -> Iterator[tuple[str, int, dict]]:
    """(where it stands, line number, object) of every line of a JSONL file; `fields` must be there, of these types.

    Raises FileNotFoundError, or ValueError with a sentence that says where.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: nothing is downloaded, give the path of a JSONL file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028, inside of strings
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error.msg}): every line must be one object") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where} is not a JSON object")
        check_fields(where, record, fields)
        yield where, number, record


def check_fields(where: str, record: dict, fields: dict[str, type]):
    """ValueError unless all fields are there, of these types."""
    for name, kind in fields.items():
        if name not in record:
            raise ValueError(f"{where} has no field {name!r}: it must have {', '.join(map(repr, fields))}")
        if not isinstance(record[name], kind):
            wanted = {str: "a string", list: "a list", int: "a whole number"}[kind]
            raise ValueError(f"{where}: the field {name!r} must be {wanted}, got {json.dumps(record[name])[:60]}")


def strings(where: str, record: dict, name: str) -> tuple[str, ...]:
    """A field that is a list of at least one string. Raises ValueError for any other."""
    values = record[name]
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: the field {name!r} must be a list of one or more strings")
    return tuple(values)


def not_blank(where: str, name: str, text: str) -> str:
    """The text. Raises ValueError where it is blank."""
    if not text.strip():
        raise ValueError(f"{where}: the {name} is empty")
    return text
