"""What `ask` does with its parsed arguments, and the checks of files and models that commands share.

All that can fail cheaply fails before a model is loaded.
"""

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path

from squeezejax import models, text
from squeezejax.chat import prompts
from squeezejax.chat.shown import shown, shown_line
from squeezejax.command_line.trust import EMBEDDED, check_trusted
from squeezejax.command_line.waiting import waiting_for
from squeezejax.config import SqueezeConfig
from squeezejax.explain import page as explain_page
from squeezejax.explain.answer import explain
from squeezejax.explain.text import context_files, context_ids, pieces
from squeezejax.models.config import parse_config
from squeezejax.offline.thresholds import expected_missed_mass, sparsity_for
from squeezejax.online.fallback import why_dense
from squeezejax.storage import files as storage

MOST_MISSED = 0.05  # of attention; with more, `ask --stats` names a sparsity that misses less

# ---- files and models


def read_context(path) -> str:
    """The text in a file, without white space at its ends. Raises ValueError for one that is empty or not UTF-8."""
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start} is {data[error.start]:#04x})") from error
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def check_out(path, force: bool, *inputs):
    """Raises an error unless a file may be written to path; a file that is there only with force, an input never."""
    target = Path(os.path.realpath(path))  # a link is followed, as `save` does
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file to write")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is a device or a pipe, no file; name a file to write")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} does not exist, so nothing can be written to {path}")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{target.parent} cannot be written to")
    if target.exists():
        if any(target.samefile(source) for source in inputs):
            raise ValueError(f"{path} is the text itself or the tree; write to another file")
        if not force:
            raise ValueError(f"{path} exists; give --force to replace it")


def model_directory(name: str) -> Path:
    """The checkpoint directory that a user names."""
    return Path(models.__file__).parent / "embedded" if name == EMBEDDED else Path(name).expanduser()


def read_model_config(folder: Path):
    """The `LlamaConfig` of a checkpoint directory, before any of its weights are looked at."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no model directory at {folder}; models are not downloaded, give a local path")
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a Hugging Face checkpoint directory")
    try:
        return parse_config(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, RecursionError) as error:  # AttributeError: JSON, but no object
        raise ValueError(f"{file}: {error}") from error


def warn_of_length(tokens: int, model_config):
    """Says on standard error where a text is longer than those the model was trained for."""
    longest = model_config.max_positions
    if longest is not None and tokens > longest:
        print(
            f"squeezejax: warning: {tokens:,} tokens, but the model was trained for at most {longest:,}; "
            "expect wrong answers",
            file=sys.stderr,
        )


def squeeze_config(arguments) -> SqueezeConfig:
    """The configuration that options name, the rest being the defaults or, with --paper, the paper's."""
    names = {field.name for field in dataclasses.fields(SqueezeConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return SqueezeConfig.paper(**given) if arguments.paper else SqueezeConfig(**given)


# ---- ask


@dataclasses.dataclass(frozen=True)
class _Asking:
    """All that answering needs, loaded."""

    params: object
    tokenizer: object
    document: text.Document
    options: text.Options
    stats: bool

    @property
    def sparsity(self) -> float:
        """The one asked for, or else the tree's."""
        given = self.options.reading["sparsity"]
        return self.document.tree.config.sparsity if given is None else given


def ask(arguments):
    """`squeezejax ask`."""
    _check_ask(arguments)
    header = storage.read_header(arguments.tree)
    prompt = text.Prompt.from_notes(header.notes)
    folder = asked_model(arguments.model, header.notes)
    model_config = read_model_config(folder)
    with waiting_for("loading the tokenizer"):
        tokenizer = text.load_tokenizer(folder)
    asked = [prompts.question_ids(tokenizer, prompt, question) for question in arguments.questions]
    context = None if arguments.explain is None else _read_squeezed(arguments, tokenizer, header)
    with waiting_for("loading the model"):
        params = models.load(folder, dtype=header.tensors["keys"].dtype)
    with waiting_for("loading the tree"):
        document = text.load(arguments.tree, params)
    longest = max((len(ids) for ids in asked), default=0) + arguments.max_new_tokens
    warn_of_length(document.tree.context_length + longest, model_config)
    asking = _Asking(params, tokenizer, document, _options(arguments), arguments.stats)
    _say_if_dense(asking)
    if arguments.chat:
        return _chat(asking, list(arguments.questions))
    for number, question in enumerate(arguments.questions):
        if len(asked) > 1:
            print(("\n" if number else "") + f"> {shown(question)}")
        record = _answer(asking, text.ask(params, tokenizer, document, question, asking.options))
    if context is not None:
        _explain(asking, record, context, arguments)


def _options(arguments) -> text.Options:
    """What the options of `ask` say about replies."""
    given = vars(arguments)
    return text.Options(
        **{field.name: given[field.name] for field in dataclasses.fields(text.Options) if field.name in given}
    )


def _say_if_dense(asking: _Asking):
    """Says on standard error that every key will be read, though a sparsity was asked for, and why."""
    why = why_dense(asking.document.tree, asking.sparsity, asking.options.implementation)
    if asking.sparsity > 0 and why is not None:
        why = why.replace("a named implementation", "--implementation xla")
        print(f"squeezejax: every key is read: {why}", file=sys.stderr)


def _check_ask(arguments):
    if not arguments.questions and not arguments.chat:
        raise ValueError("nothing to ask: give a question in quotes, or --chat")
    if not all(map(str.strip, arguments.questions)):
        raise ValueError("the question is empty")
    if arguments.dense and arguments.sparsity is not None:
        raise ValueError("--dense reads every key, so it has no --sparsity")
    if arguments.dense and arguments.chat:
        raise ValueError("--dense answers single questions only; for a chat that keeps every key give --sparsity 0")
    if arguments.explain is not None:
        _check_explain(arguments)
    elif arguments.context or arguments.force:
        raise ValueError("--context and --force go with --explain")
    if arguments.temperature == 0 and (arguments.top_k, arguments.top_p) != (None, None):
        raise ValueError("--top-k and --top-p need a --temperature above 0")
    if arguments.top_p == 0:
        raise ValueError("--top-p must be above 0")


def _check_explain(arguments):
    if arguments.chat or len(arguments.questions) != 1:
        raise ValueError("--explain shows how one question was answered: ask it alone, without --chat")
    if arguments.dense:
        raise ValueError("--dense keeps every key, so there is nothing to explain; for all attention give --sparsity 0")
    check_out(arguments.explain, arguments.force, arguments.tree, *(arguments.context or ()))


def _read_squeezed(arguments, tokenizer, header) -> list[int]:
    """Ids of the whole squeezed context, from its files."""
    files = context_files(arguments.context, header.notes)
    check_out(arguments.explain, arguments.force, *files)
    return context_ids(tokenizer, [read_context(file) for file in files], header)


def asked_model(model: str | None, notes: dict[str, str]) -> Path:
    """The checkpoint directory given, or else the one that the notes of a tree of this user name, if it is there."""
    if model is not None:
        return model_directory(model)
    if "model" not in notes:
        raise ValueError("the tree does not say which model made it: give --model")
    check_trusted(notes)
    folder = model_directory(notes["model"])
    if not folder.is_dir():
        raise FileNotFoundError(f"the tree was made with the model in {folder}, which is gone: say with --model where")
    return folder


def _answer(asking: _Asking, reply: text.Reply) -> text.Record:
    """Prints a reply as it comes."""
    with waiting_for("reading the question"):
        if asking.stats:
            reply.rehearse()
        first = next(reply, "")
    for piece in itertools.chain([first], reply):
        print(shown(piece), end="", flush=True)
    print()
    if asking.stats:
        print(f"[{reply.record}]", file=sys.stderr)
        _say_what_is_missed(asking)
    return reply.record


def _say_what_is_missed(asking: _Asking):
    """Says on standard error what the sparsity costs, as the build measured it, where it did."""
    tree, sparsity = asking.document.tree, asking.sparsity
    if tree.missed_masses is None or sparsity <= 0:
        return
    missed = float(expected_missed_mass(tree, sparsity))
    advice = ""
    if missed > MOST_MISSED:
        advice = f"; for at most {MOST_MISSED:.0%} ask with --sparsity {sparsity_for(tree, MOST_MISSED):.2f}"
    where = "measured at the text's end when it was built"
    print(f"[at sparsity {sparsity:g} some {missed:.1%} of attention is missed, {where}{advice}]", file=sys.stderr)


def _explain(asking: _Asking, record: text.Record, context: list[int], arguments):
    """Writes the page that shows what was read for an answer."""
    options, tokenizer, tree = asking.options, asking.tokenizer, asking.document.tree
    (question,) = arguments.questions
    # The same program and the same random numbers: only what is kept differs.
    all_read = dataclasses.replace(options, sparsity=None, dense=True)
    dense = text.ask(asking.params, tokenizer, asking.document, question, all_read).record
    about = explain_page.About(
        question=question.strip(),
        answer=pieces(tokenizer, record.tokens),
        dense_answer=None if dense.tokens == record.tokens else dense.text.rstrip(),
        context=pieces(tokenizer, context),
        sparsity=asking.sparsity,
        tree=os.path.basename(arguments.tree),
    )
    found = explain(asking.params, tree, record.question, record.tokens, **options.reading)
    with storage.replacing(os.path.realpath(arguments.explain)) as file:
        file.write(explain_page.render(found, about).encode())
    print(f"[what was read, as a page for a browser: {arguments.explain}]", file=sys.stderr)


def _chat(asking: _Asking, given: list[str]):
    """One conversation: the questions given, then turns from the terminal until an empty line or its end."""
    print("Every turn sees the earlier ones; an empty line ends the chat.", file=sys.stderr)
    chat = text.Chat(asking.params, asking.tokenizer, asking.document, asking.options)
    while question := _next_turn(given):
        _answer(asking, chat.ask(question))


def _next_turn(given: list[str]) -> str:
    """The next question, shown as if typed; an empty one at the end."""
    if given:
        question = given.pop(0)
    elif sys.stdin.isatty():
        try:
            return input("you> ").strip()
        except EOFError:
            print()
            return ""
    else:
        question = sys.stdin.readline().strip()
    if question:
        print(f"you> {shown_line(question)}", flush=True)
    return question
