"""Text in, text out: squeeze a text once, ask it as often as you like, talk about it. What the command line is made of.

    tokenizer = squeezejax.text.load_tokenizer(path)  # or one of transformers'
    document = squeezejax.text.build(params, tokenizer, essay)
    for piece in squeezejax.text.ask(params, tokenizer, document, "Who wrote it?"):
        print(piece, end="", flush=True)

The text and the question are one message of the user, in the model's chat template. `save` writes what `squeezejax ask`
reads, and `load` reads what `squeezejax build` and `append` write: the same questions make the same token ids either
way. Models come from wherever you like: `params` and the tokenizer are arguments.
"""

import dataclasses
from collections.abc import Callable, Iterator

from squeezejax.chat import prompts
from squeezejax.chat.prompts import Prompt, load_tokenizer
from squeezejax.chat.stops import StopStrings
from squeezejax.chat.stream import Options, Session
from squeezejax.config import SqueezeConfig
from squeezejax.offline.append import append as append_tokens
from squeezejax.offline.progress import Progress
from squeezejax.offline.squeeze import squeeze
from squeezejax.storage import files
from squeezejax.tree import Tree

__all__ = [
    "Chat",
    "Document",
    "Options",
    "Prepared",
    "Prompt",
    "Record",
    "Reply",
    "append",
    "ask",
    "build",
    "load",
    "load_tokenizer",
    "prepare",
    "save",
]


@dataclasses.dataclass(frozen=True)
class Document:
    """A squeezed text, and what is needed to ask it."""

    tree: Tree
    prompt: Prompt  # what follows the squeezed tokens: the end of the text, the template's words around a question
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # kept in its file; see `Header.notes`


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A text as token ids, before a model has read it; for those who look at them first. `prepare` makes it."""

    tokens: list[int]  # those to squeeze, or to append
    prompt: Prompt


def prepare(tokenizer, text: str, *, after: Document | Prompt | None = None) -> Prepared:
    """The tokens of a text that are to be squeezed, white space at its ends dropped; `after`, what it is appended to.

    Raises ValueError for an empty text, a chat template that does not insert messages as they are, and a text at whose
    end the tokenizer leaves no place to cut.
    """
    text = text.strip()
    if not text:
        raise ValueError("the text is empty")
    if after is None:
        return Prepared(*prompts.split_prompt(tokenizer, text))
    return Prepared(*prompts.extend_prompt(tokenizer, after.prompt if isinstance(after, Document) else after, text))


def build(
    params,
    tokenizer,
    text: str | Prepared,
    config: SqueezeConfig = SqueezeConfig(),  # noqa: B008 - frozen
    *,
    key=None,
    progress: Callable[[Progress], None] | bool | None = None,
    checkpoint=None,
    finished: Callable[[Document], None] | None = None,
) -> Document:
    """Squeezes a text, once for any number of questions.

    `key`, `progress` and `checkpoint` are as for `squeezejax.squeeze`; `finished` receives the document before the
    checkpoint is removed: save it there, and no kill can lose it. Raises as `prepare` and `squeeze` do.
    """
    made = text if isinstance(text, Prepared) else prepare(tokenizer, text)
    document = lambda tree: Document(tree, made.prompt)
    tell = None if finished is None else lambda tree: finished(document(tree))
    options = {"key": key, "progress": progress, "checkpoint": checkpoint, "finished": tell}
    return document(squeeze(params, made.tokens, config, **options))


def append(
    params,
    tokenizer,
    document: Document,
    text: str | Prepared,
    *,
    key=None,
    progress: Callable[[Progress], None] | bool | None = None,
) -> Document:
    """The longer document in which `text` follows after an empty line; only its keys are clustered.

    `key` and `progress` are as for `squeezejax.append`. Raises as that and `prepare` do.
    """
    made = text if isinstance(text, Prepared) else prepare(tokenizer, text, after=document)
    tree = append_tokens(params, document.tree, made.tokens, key=key, progress=progress)
    return dataclasses.replace(document, tree=tree, prompt=made.prompt)


def save(path, document: Document, notes: dict[str, str] | None = None):
    """Writes a document to one file, which `squeezejax ask --tree` reads, too; `notes` join those that it has.

    A note "context" with the path of the text's file has `squeezejax ask --explain` find it. Raises as
    `squeezejax.save` does.
    """
    files.save(path, document.tree, {**document.notes, **(notes or {}), **document.prompt.to_notes()})


def load(path, params=None, *, mesh=None) -> Document:
    """The document in a file that `save`, `squeezejax build` or `squeezejax append` wrote.

    `params` and `mesh` are as for `squeezejax.load`, which says what is raised; so is ValueError for a file of
    `squeezejax.save`, which holds a tree alone.
    """
    notes = files.read_header(path).notes
    prompt = Prompt.from_notes(notes)
    others = {name: note for name, note in notes.items() if name not in prompt.to_notes()}
    return Document(files.load(path, params, mesh=mesh), prompt, others)


@dataclasses.dataclass(frozen=True)
class Record:
    """A reply that has come to its end, and what it took."""

    text: str
    tokens: tuple[int, ...]  # ids, a stop token at the end included
    question: tuple[int, ...]  # ids of all that followed the squeezed ones and was there before the reply
    ended_by: str  # "stop token", "length", or the stop string
    seconds: float  # from the question's first token to the reply's last
    kept_fraction: (
        float  # kept clustered keys / S, mean over the reply's tokens (not that with which a stop string came)
    )
    prefill_kept_fraction: float  # the same while the question was read
    dense_because: str | None  # why every key was read; None where keys were chosen

    def __str__(self) -> str:
        """One line for a terminal."""
        count = len(self.tokens)
        rate = f"{count / self.seconds:.1f} tokens/s" if self.seconds else "no time measured"
        kept = f"{self.kept_fraction:.1%} in replying, {self.prefill_kept_fraction:.1%} in reading the question"
        dense = "" if self.dense_because is None else f" (every key was read: {self.dense_because})"
        return (
            f"{count} tokens in {self.seconds:.2f} s ({rate}, reading the question included); keys of the context "
            f"kept: {kept}{dense}"
        )


class Reply(Iterator[str]):
    """A reply as pieces of text, each as soon as it is known; nothing is computed before the first is asked for.

    White space at its beginning is left out; characters come whole; of a stop string nothing comes. `text` and `record`
    go on to the end.
    """

    def __init__(self, session: Session, tokenizer, ids: list[int]):
        self._session, self._ids = session, ids
        self._said: list[str] = []
        self._record: Record | None = None
        self._pieces = self._run(prompts.Detokenizer(tokenizer), StopStrings(session.options.stop))

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def text(self) -> str:
        """The whole reply."""
        return self.record.text

    @property
    def record(self) -> Record:
        """What the reply took."""
        for _ in self:
            pass
        if self._record is None:
            raise RuntimeError("the reply was broken off, so there is no record of it; `said()` is what had come")
        return self._record

    def said(self) -> str:
        """The text that has come so far."""
        return "".join(self._said)

    def close(self):
        """Breaks the reply off where it is."""
        self._pieces.close()

    def rehearse(self):
        """Compiles what the reply needs and changes nothing, so that its `seconds` are not the compiler's."""
        self._session.rehearse(self._ids)

    def _run(self, words: prompts.Detokenizer, stops: StopStrings) -> Iterator[str]:
        tokens: list[int] = []
        for token in self._session.reply(self._ids):
            tokens.append(token)
            yield from self._say(stops.push(words.push(token)))
            if stops.found is not None:
                break
        else:
            yield from self._say(stops.push(words.flush()))
            yield from self._say(stops.flush())
        stats, options = self._session.stats, self._session.options
        stopped = "stop token" if tokens[-1] in options.stop_tokens else "length"
        self._record = Record(
            text=self.said(),
            tokens=tuple(tokens),
            question=tuple(self._ids),
            ended_by=stopped if stops.found is None else stops.found,
            seconds=stats.seconds,
            kept_fraction=stats.kept,
            prefill_kept_fraction=stats.prefill_kept,
            dense_because=self._session.why_dense(),
        )

    def _say(self, piece: str) -> Iterator[str]:
        piece = piece if self._said else piece.lstrip()
        if piece:
            self._said.append(piece)
            yield piece


def ask(params, tokenizer, document: Document, question: str, options: Options = Options()) -> Reply:  # noqa: B008
    """One question of the text alone, answered piece by piece.

    Equal questions with equal options get equal answers, at a temperature too: `options.seed` decides. Raises
    ValueError for an empty question; the reply, once iterated, as `squeezejax.prefill` and `decode` do.
    """
    ids = prompts.question_ids(tokenizer, document.prompt, question)
    return Reply(_session(params, tokenizer, document, options), tokenizer, ids)


class Chat:
    """A conversation about a text: every question sees the earlier ones and their replies."""

    def __init__(self, params, tokenizer, document: Document, options: Options = Options()):  # noqa: B008 - frozen
        self._tokenizer, self._prompt = tokenizer, document.prompt
        self._session = _session(params, tokenizer, document, options)
        self._turns: list[tuple[str, Reply]] = []

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Questions and replies so far; of a reply that was not read to its end, what had come of it."""
        return [(question, reply.said()) for question, reply in self._turns]

    def ask(self, question: str) -> Reply:
        """The next turn. A reply that was not read to its end goes into the conversation as far as it had come.

        Raises ValueError for an empty question and for a chat template that renders the beginning of a conversation
        otherwise once it goes on.
        """
        ids = prompts.conversation_ids(self._tokenizer, self._prompt, self.turns, question)
        if self._turns:
            self._turns[-1][1].close()
        reply = Reply(self._session, self._tokenizer, ids)
        self._turns.append((question, reply))
        return reply


def _session(params, tokenizer, document: Document, options: Options) -> Session:
    """A conversation's beginning, with the model's own stop tokens besides those asked for."""
    ends = prompts.stop_tokens(tokenizer, params.config)
    options = dataclasses.replace(options, stop_tokens=tuple(dict.fromkeys((*options.stop_tokens, *ends))))
    return Session(params, document.tree, options)
