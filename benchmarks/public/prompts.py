"""From the questions of one context to token ids; contexts that do not fit are cut in the middle, as by LongBench.

A prompt is tokenized whole. What all prompts of a context share, up to the context's end, is the fixed part; whatever
token joins context and question belongs to the question. So the ids of both parts are exactly those of the prompt.
"""

import dataclasses

import numpy as np

from benchmarks.public.samples import Item
from squeezejax.chat import prompts as chat

SEAM = 8  # tokens that two halves may gain where they are joined


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of one context."""

    fixed: np.ndarray  # i32[S+W]
    questions: list[np.ndarray]  # i32[T] each, what follows
    dropped: int  # tokens of the context that did not fit


def tokenize(tokenizer, items: list[Item], *, positions=None, max_length=None, multiple: int = 1) -> Prompts:
    """The prompts of questions that share context and kind.

    `positions` is the number of tokens that the model can handle, replies included, `max_length` the most that a
    prompt may have before it goes into the chat template; None is no limit. The fixed part has a multiple of `multiple`
    tokens (if it has so many): fewer different lengths compile fewer programs, and the rest is read with the question.

    Raises ValueError as `measure_room` does.
    """
    asked, room = measure_room(tokenizer, items, positions=positions, max_length=max_length)
    context, dropped = _cut_middle(tokenizer, items[0].context, asked, room)
    parts = [_parts(tokenizer, item, context) for item in items]
    head = _ids(tokenizer, items[0], parts[0][0])
    wholes = [_ids(tokenizer, items[0], whole) for _, whole in parts]
    length = min(_common(head, whole) for whole in wholes)
    length -= length % multiple if length >= multiple else 0
    if length == 0 or any(len(whole) == length for whole in wholes):
        raise ValueError(f"{items[0].key}: no token ends between its context and its question")
    return Prompts(wholes[0][:length], [whole[length:] for whole in wholes], dropped)


def measure_room(tokenizer, items: list[Item], *, positions=None, max_length=None) -> tuple[int, int | None]:
    """(tokens of the longest question, the most that a prompt may have before it goes into the chat template or None).

    Raises ValueError where the question leaves no room for its context, and for a chat template that does not show the
    user's message as it is.
    """
    asked = max(len(chat.encode(tokenizer, item.question)) for item in items)
    limits = [] if max_length is None else [max_length]
    if positions is not None:
        longest = max(item.max_new_tokens for item in items)
        limits.append(positions - longest - _frame(tokenizer, items[0]) - SEAM)
    room = min(limits, default=None)
    if room is not None and room <= asked:
        raise ValueError(
            f"{items[0].key}: its question has {asked} tokens and a prompt may have {room}, so no context fits; "
            "leave the file out or take a model for longer texts"
        )
    return asked, room


def _cut_middle(tokenizer, context: str, asked: int, room: int | None) -> tuple[str, int]:
    """(context, tokens dropped), so that with a question of `asked` tokens a prompt has `room` tokens.

    The first half of the prompt's tokens stay and the last half, as in LongBench, but for a question that takes more
    than half: it stays whole.
    """
    ids = chat.encode(tokenizer, context)
    dropped = 0 if room is None else len(ids) + asked - room
    if dropped <= 0:
        return context, 0
    back = max(room // 2 - asked, 0)
    front = room - asked - back
    halves = (ids[:front], ids[len(ids) - back :])
    # Special tokens that are written out in a prompt stay.
    return "".join(tokenizer.decode(half, clean_up_tokenization_spaces=False) for half in halves), dropped


def _parts(tokenizer, item: Item, context: str) -> tuple[str, str]:
    """(the prompt up to its context's end, the whole prompt), as text."""
    prompt = context + item.question
    if not _uses_template(tokenizer, item):
        return context, prompt
    whole = chat.render(tokenizer, [chat.user(prompt)])
    start = whole.find(prompt.strip())  # some templates strip messages
    if start < 0:
        raise ValueError("the model's chat template does not write the user's message as it is")
    return whole[: start + len(context.lstrip())], whole


def _uses_template(tokenizer, item: Item) -> bool:
    return item.chat and bool(tokenizer.chat_template)


def _ids(tokenizer, item: Item, text: str) -> np.ndarray:
    """Token ids i32[T]; a beginning of sequence where the tokenizer adds one and the text does not have it."""
    written = _uses_template(tokenizer, item) or (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    ids = chat.encode(tokenizer, text) if written else tokenizer(text, verbose=False)["input_ids"]
    return np.array(ids, np.int32)


def _frame(tokenizer, item: Item) -> int:
    """Tokens that template and tokenizer put around a prompt."""
    short = dataclasses.replace(item, question="b")
    return len(_ids(tokenizer, item, _parts(tokenizer, short, "a ")[1])) - len(chat.encode(tokenizer, "a b"))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two prompts begin with alike."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
