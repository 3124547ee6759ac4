"""From a text and a question to token ids: tokenizers, chat templates, and where a rendered prompt is cut in two.

A prompt is one user message, the context, an empty line and the question, put into the model's chat template. The
tokens of its beginning, up to about the end of the context, are squeezed once; `Prompt` holds what is needed to render
and tokenize the short rest for any question, so that both parts together are exactly the whole prompt's tokens.
"""

import contextlib
import dataclasses
import sys
import time

from squeezejax.chat.tokenizer import first_line, load_tokenizer

__all__ = ["load_tokenizer"]  # and all that is defined here

JOINT = "\n\n"  # between the context and the question
STAND_IN = "⟨the squeezed context⟩"  # what later turns render in its place
ANCHOR_LENGTH = 64  # characters before the cut that are tokenized along
LONGEST_RENDERING = 10.0  # seconds; templates take milliseconds
LONGEST_REST = 400  # characters of context that may be left for the question's side of the cut

# Two questions with nothing in common tell what in a rendered prompt depends on the question.
_PLACEHOLDERS = ("Which placeholder is this?", "7 others, perhaps…")
# Beginnings of questions of every kind that a tokenizer may tell apart.
_PROBES = ("Why", "how", "7", "(a", "'s", '"To', "—", "É", "何", "🙂")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What follows a squeezed context in its prompt: the context's own end, an empty line, the question, a suffix."""

    anchor: str  # the text right before the cut; tokens after it come out as in the whole prompt
    rest: str  # the context's last characters, which share tokens with what follows; mostly a full stop, or nothing
    suffix: str  # what the template writes after the question
    template: str  # "chat", or "plain" for a tokenizer that has no chat template

    def to_notes(self) -> dict[str, str]:
        """As notes for `squeezejax.save`."""
        return {f"prompt_{field}": value for field, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_notes(cls, notes: dict[str, str]) -> "Prompt":
        """Raises ValueError for a tree whose notes say nothing of its prompt."""
        names = [field.name for field in dataclasses.fields(cls)]
        if any(f"prompt_{name}" not in notes for name in names):
            raise ValueError("the tree has no notes on its prompt: only trees made by `squeezejax build` can be asked")
        return cls(**{name: notes[f"prompt_{name}"] for name in names})


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of text as it stands: nothing added, and special tokens written out in it recognised."""
    # verbose=False: no remark on texts beyond model_max_length.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def user(content: str) -> dict[str, str]:
    """One message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """One message of the model."""
    return {"role": "assistant", "content": content}


def render(tokenizer, messages) -> str:
    """The text of a conversation up to where the model is to go on.

    By the tokenizer's chat template; without one, every message stands by itself, with a line break after the user's
    and an empty line after the model's. Raises ValueError for messages that the template refuses, and for a template
    that is not done in 10 seconds.
    """
    if not tokenizer.chat_template:
        return "".join(turn["content"] + ("\n" if turn["role"] == "user" else "\n\n") for turn in messages)
    try:
        with _time_limit():
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever the template's own code raises
        raise ValueError(f"the model's chat template cannot render the conversation ({first_line(error)})") from error


@contextlib.contextmanager
def _time_limit():
    """TimeoutError in a template that runs for longer than LONGEST_RENDERING: Jinja's sandbox lets loops nest."""
    end = time.monotonic() + LONGEST_RENDERING

    def watch(frame, event, _):
        if frame.f_code.co_filename != "<template>":
            return None
        if event == "line" and time.monotonic() > end:
            raise TimeoutError(f"it is not done after {LONGEST_RENDERING:g} seconds")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def whole_prompt_ids(tokenizer, messages) -> list[int]:
    """Ids of a whole rendered conversation: what a model that squeezes nothing would be given."""
    return _lead(tokenizer) + encode(tokenizer, render(tokenizer, messages))


def split_prompt(tokenizer, context: str) -> tuple[list[int], Prompt]:
    """Ids of the prompt's beginning, to squeeze, and the `Prompt` from which `question_ids` makes the rest.

    The cut is the last place, at or before the end of the context, where the tokens on either side are the same
    whatever the question is. Raises ValueError for a template that does not insert messages as they are, and for a
    context at whose end the tokenizer leaves no such place.
    """
    before, suffix = _around(tokenizer, context)
    wholes = [whole_prompt_ids(tokenizer, [user(context + JOINT + question)]) for question in _PLACEHOLDERS]
    lead = _lead(tokenizer)
    blank = Prompt("", "", suffix, "chat" if tokenizer.chat_template else "plain")
    return _cut(tokenizer, blank, before.removesuffix(JOINT), 1, lambda head: lead + encode(tokenizer, head), wholes)


def extend_prompt(tokenizer, prompt: Prompt, text: str) -> tuple[list[int], Prompt]:
    """Ids that append an empty line and `text` to a squeezed context, and the `Prompt` of the longer one.

    As if the whole context had been tokenized at once. Raises ValueError as `split_prompt` does.
    """
    start = len(prompt.anchor)
    whole = prompt.anchor + prompt.rest + JOINT + text
    tails = [whole[start:] + JOINT + question + prompt.suffix for question in _PLACEHOLDERS]
    wholes = [_after_cut(tokenizer, prompt, tail) for tail in tails]
    return _cut(tokenizer, prompt, whole, start + 1, lambda head: _after_cut(tokenizer, prompt, head[start:]), wholes)


def _cut(tokenizer, prompt: Prompt, text: str, least: int, head_ids, wholes):
    """Cuts text, which a question follows, as late as possible but not before `least` characters -> (ids, Prompt).

    head_ids(text up to the cut) are the ids to squeeze; with those that follow they must make the ids `wholes` of
    the placeholder questions.
    """
    for cut in range(len(text), max(len(text) - LONGEST_REST, least) - 1, -1):
        new = dataclasses.replace(prompt, anchor=text[max(cut - ANCHOR_LENGTH, 0) : cut], rest=text[cut:])
        if not all(_holds(tokenizer, new, probe) for probe in _PROBES):
            continue
        head = head_ids(text[:cut])
        tails = [question_ids(tokenizer, new, question) for question in _PLACEHOLDERS]
        if all(head + tail == whole for tail, whole in zip(tails, wholes, strict=True)):
            return head, new
    raise ValueError(
        f"no token ends within the context's last {LONGEST_REST} characters whatever follows, so the prompt cannot be "
        "cut there: end the context with a sentence in plain words"
    )


def question_ids(tokenizer, prompt: Prompt, question: str) -> list[int]:
    """Ids that follow the squeezed ones and ask `question` alone. Raises ValueError for an empty question."""
    return _after_cut(tokenizer, prompt, prompt.rest + JOINT + _stripped(question) + prompt.suffix)


def conversation_ids(tokenizer, prompt: Prompt, turns, question: str) -> list[int]:
    """Ids that follow the squeezed ones in a conversation: `turns`, pairs (question, reply), then `question`.

    They are the ids of the whole conversation as the template renders it, less the squeezed ones; a caller that has
    read some of them already goes on from the first that is new (templates may write earlier replies otherwise than
    the model did, without its thoughts for example). Only what stands before the end of the context cannot be undone.
    Raises ValueError for an empty question, and for a template that renders that part otherwise once the conversation
    goes on (such as one that moves its system prompt to the latest message, or leaves out old messages), or that is not
    the one with which the context was squeezed.
    """
    if not turns:
        return question_ids(tokenizer, prompt, question)
    opening, *later = [_stripped(asked) for asked in (*(asked for asked, _ in turns), question)]
    messages = [user(STAND_IN + JOINT + opening)]
    before, stand_in, after = render(tokenizer, messages).partition(STAND_IN)
    if not stand_in or after != JOINT + opening + prompt.suffix:
        raise ValueError("the model's chat template is not the one with which the context was squeezed; build it again")
    for (_, reply), asked in zip(turns, later, strict=True):
        messages += [assistant(reply.strip()), user(asked)]
    whole = render(tokenizer, messages)
    if not whole.startswith(before + STAND_IN + JOINT):
        raise ValueError(
            "the model's chat template rewrites the beginning of a conversation when it goes on, so that the squeezed "
            "context no longer fits: ask single questions instead"
        )
    return _after_cut(tokenizer, prompt, prompt.rest + whole[len(before) + len(STAND_IN) :])


def stop_tokens(tokenizer, config) -> tuple[int, ...]:
    """Ids that end a reply: the model's, where its configuration has `stop_tokens`, and the tokenizer's own."""
    ids = [*getattr(config, "stop_tokens", ()), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(token for token in ids if token is not None))


class Detokenizer:
    """Turns a stream of ids into a stream of text; bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # ids whose text has been given out
        self._context = 0  # ids from here on are decoded; those before _shown settle spaces between words

    def push(self, token: int) -> str:
        """The text that `token` completes, maybe none."""
        self._ids.append(token)
        known, text = self._decode(self._shown), self._decode(None)
        if text.endswith("\ufffd"):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(known) :]

    def flush(self) -> str:
        """What is left at the end of the stream, with � for a character that never was completed."""
        known, text = self._decode(self._shown), self._decode(None)
        self._context = self._shown = len(self._ids)
        return text[len(known) :]

    def _decode(self, end: int | None) -> str:
        return decode(self._tokenizer, self._ids[self._context : end])


def decode(tokenizer, ids) -> str:
    """Text of ids, special tokens left out."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _around(tokenizer, context: str) -> tuple[str, str]:
    """What a rendered prompt has before and after the question."""
    parts = set()
    for question in _PLACEHOLDERS:
        whole = render(tokenizer, [user(context + JOINT + question)])
        parts.add(tuple(whole.split(question)))
    before, *after = parts.pop()
    if parts or len(after) != 1 or not before.endswith(JOINT):
        raise ValueError(
            "the model's chat template does not write the user's message as it is, exactly once, so the context cannot "
            "be told from the question"
        )
    return before, after[0]


def _lead(tokenizer) -> list[int]:
    """Ids before a prompt that has no template: the beginning of sequence, where the tokenizer adds one."""
    if tokenizer.chat_template or tokenizer.bos_token_id is None:
        return []
    return tokenizer("a")["input_ids"][:1] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []


def _holds(tokenizer, prompt: Prompt, question: str) -> bool:
    """Whether the tokens before the cut stay the same when this question follows."""
    anchor = encode(tokenizer, prompt.anchor)
    return encode(tokenizer, prompt.anchor + prompt.rest + JOINT + question)[: len(anchor)] == anchor


def _after_cut(tokenizer, prompt: Prompt, text: str) -> list[int]:
    """Ids of the text that follows the cut; by itself its first token could come out otherwise."""
    anchor = encode(tokenizer, prompt.anchor)
    ids = encode(tokenizer, prompt.anchor + text)
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else encode(tokenizer, text)


def _stripped(question: str) -> str:
    question = question.strip()
    if not question:
        raise ValueError("the question is empty")
    try:
        question.encode()
    except UnicodeEncodeError as error:  # what a terminal of another encoding makes of it
        raise ValueError("the question is not UTF-8 text") from error
    return question
