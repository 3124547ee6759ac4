"""What `build` and `append` do with their parsed arguments: from a text to a tree file.

All that can fail cheaply fails before a model is loaded.
"""

import os
import shlex
import time

import jax

from squeezejax import models, text
from squeezejax.command_line.commands import (
    asked_model,
    check_out,
    model_directory,
    read_context,
    read_model_config,
    squeeze_config,
    warn_of_length,
)
from squeezejax.command_line.trust import EMBEDDED, is_trusted, model_notes
from squeezejax.command_line.waiting import waiting_for
from squeezejax.memory import readable_bytes
from squeezejax.offline import unfinished
from squeezejax.offline.progress import Bar
from squeezejax.storage import files as storage


def build(arguments):
    """`squeezejax build`."""
    context = read_context(arguments.context)
    check_out(arguments.out, arguments.force, arguments.context)
    config = squeeze_config(arguments)
    folder = model_directory(arguments.model)
    model_config = read_model_config(folder)
    with waiting_for("reading the text"):
        tokenizer = text.load_tokenizer(folder)
        prepared = text.prepare(tokenizer, context)
    count = len(prepared.tokens)
    if count <= config.always_read:
        raise ValueError(
            f"{arguments.context} has {count} tokens only, and sinks and window take {config.always_read}: "
            "nothing is left to squeeze; give a longer text or a smaller --window"
        )
    _check_vocabulary(prepared.tokens, model_config)
    warn_of_length(count, model_config)
    # Beside the tree, and kept until that is safe on the disk.
    checkpoint = None if arguments.no_checkpoint else f"{arguments.out}.unfinished"
    if checkpoint is not None:
        unfinished.check_free(checkpoint)
    watch = _Watch(arguments.quiet)
    with waiting_for("loading the model"):
        params = models.load(folder, dtype=arguments.dtype)
    key = jax.random.key(arguments.seed)
    model = _model_name(arguments.model, folder)
    notes = {**model_notes(model), "context": os.path.abspath(arguments.context)}
    text.build(
        params,
        tokenizer,
        prepared,
        config,
        key=key,
        progress=watch,
        checkpoint=checkpoint,
        finished=lambda document: _write(arguments.out, document, notes, count, watch),
    )


class _Watch:
    """Receives a build's progress: draws a bar, unless quiet, and knows where the time went."""

    def __init__(self, quiet: bool):
        """The time runs from here."""
        self._show, self._started = None if quiet else Bar(), time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, progress):
        """One report."""
        self.seconds = dict(progress.seconds)
        if self._show is not None:
            self._show(progress)

    def summary(self, writing: float) -> tuple[float, str]:
        """Seconds in all, and by kind of work; `writing` the tree came last."""
        total = time.perf_counter() - self._started
        spent = self.seconds | {"writing": writing}
        spent["loading and the rest"] = total - sum(spent.values())
        return total, ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in spent.items())


def _write(path, document: text.Document, notes: dict[str, str], num_tokens: int, watch: _Watch):
    """Saves a tree, and says how large it is and where the time went."""
    started = time.perf_counter()
    text.save(path, document, notes)
    total, spent = watch.summary(time.perf_counter() - started)
    size = readable_bytes(os.path.getsize(path))
    print(f"{path}: {num_tokens:,} tokens squeezed in {total:.1f} s, {size}")
    print(f"({spent})")
    model = "" if is_trusted(notes) else f" --model {shlex.quote(notes.get('model', 'DIR'))}"
    print(f'ask with: squeezejax ask --tree {shlex.quote(str(path))}{model} "…"')


def append(arguments):
    """`squeezejax append`."""
    more = read_context(arguments.context)
    check_out(arguments.out, arguments.force, arguments.context)
    header = storage.read_header(arguments.tree)
    prompt = text.Prompt.from_notes(header.notes)
    folder = asked_model(arguments.model, header.notes)
    model_config = read_model_config(folder)
    with waiting_for("reading the text"):
        tokenizer = text.load_tokenizer(folder)
        prepared = text.prepare(tokenizer, more, after=prompt)
    count = len(prepared.tokens)
    _check_vocabulary(prepared.tokens, model_config)
    watch = _Watch(arguments.quiet)
    with waiting_for("loading model and tree"):
        params = models.load(folder, dtype=header.tensors["keys"].dtype)
        document = text.load(arguments.tree, params)
    warn_of_length(document.tree.context_length + count, model_config)
    key = jax.random.key(arguments.seed)
    document = text.append(params, tokenizer, document, prepared, key=key, progress=watch)
    sources = [header.notes.get("context", "?"), os.path.abspath(arguments.context)]
    named = {} if arguments.model is None else model_notes(_model_name(arguments.model, folder))
    _write(arguments.out, document, {**named, "context": ", ".join(sources)}, count, watch)


def _model_name(given: str, folder) -> str:
    """How a tree's notes name the model that made it."""
    return EMBEDDED if given == EMBEDDED else os.path.abspath(folder)


def _check_vocabulary(ids, model_config):
    if max(ids) >= model_config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token id {max(ids)}, but the model knows only {model_config.vocab_size} tokens: "
            "they do not belong together"
        )
