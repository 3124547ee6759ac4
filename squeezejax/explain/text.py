"""The text behind a tree's context tokens: found again, checked against the tree's hash, and cut into passages."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from squeezejax.chat import prompts as chat
from squeezejax.offline.squeeze import hash_tokens
from squeezejax.storage.files import Header

LONGEST_PASSAGE = 64  # tokens
# Where a sentence or a line ends, in the text of one token and the white space that the next begins with.
_END = re.compile(r"[\n。！？]|[.!?][\"'”’)]?\s")


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one token adds to a text; nothing for one that only begins a character."""

    text: str
    special: bool = False  # a mark of the chat template, by its name


def context_files(given: list[str] | None, notes: dict[str, str]) -> list[str]:
    """The files whose texts were squeezed, in order: those given, or else those that the tree's notes name.

    Raises FileNotFoundError where the latter are gone.
    """
    if given:
        return given
    named = notes.get("context", "?").split(", ")
    if not all(Path(name).is_file() for name in named):
        raise FileNotFoundError(
            f"a tree does not hold its text, which was in {', '.join(named)} and is there no more: say where with "
            "--context FILE, once for `build` and once for every `append`"
        )
    return named


def context_ids(tokenizer, texts: list[str], header: Header) -> list[int]:
    """Ids of all context tokens of a tree file, from the text that was squeezed and those that were appended to it.

    Raises ValueError unless their hash is the tree's.
    """
    ids, prompt = chat.split_prompt(tokenizer, texts[0])
    digest = hash_tokens(np.array(ids, np.int32))
    for text in texts[1:]:
        more, prompt = chat.extend_prompt(tokenizer, prompt, text)
        digest = hash_tokens(np.array(more, np.int32), before=digest)
        ids += more
    if np.asarray(digest).tobytes().hex() != header.context_hash:
        raise ValueError(
            f"the text given, {len(ids):,} tokens, is not the one that was squeezed: its hash is another. Give with "
            "--context the file that `build` read, unchanged, and then every file that `append` read, in this order"
        )
    return ids


def pieces(tokenizer, ids) -> list[Piece]:
    """The text of every token; joined, they are the whole text, with the names of special tokens in it."""
    special = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    stream = chat.Detokenizer(tokenizer)
    found = []
    for token in map(int, ids):
        text = stream.push(token)
        if token in special:
            found.append(Piece(text + tokenizer.convert_ids_to_tokens(token), special=True))
        else:
            found.append(Piece(text))
    if found and (rest := stream.flush()):
        found[-1] = dataclasses.replace(found[-1], text=found[-1].text + rest)
    return found


def passages(pieces: list[Piece], window_start: int) -> list[range]:
    """Sentences and lines, as ranges of tokens that follow one another; none crosses the window's start."""
    starts = [0]
    for i in range(1, len(pieces)):
        before, text = pieces[i - 1].text, pieces[i].text
        # White space alone still belongs to what has ended.
        ended = text.strip() and _END.search(before + (" " if text[0].isspace() else ""))
        if ended or i == window_start or i - starts[-1] == LONGEST_PASSAGE:
            starts.append(i)
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(pieces)], strict=True)]
