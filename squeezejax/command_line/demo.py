"""`squeezejax demo`: the embedded model answers questions about a text, densely and squeezed, side by side."""

import dataclasses
import os
import shlex
import statistics
import sys
import textwrap
import time

import jax
import numpy as np

from squeezejax import models, text
from squeezejax.chat import prompts as chat
from squeezejax.command_line.commands import check_out, model_directory
from squeezejax.command_line.trust import EMBEDDED
from squeezejax.config import SqueezeConfig
from squeezejax.models.embedded.text import make_document
from squeezejax.online.generate import dense_generate, generate
from squeezejax.storage import files as storage

MAX_NEW_TOKENS = 16  # a right reply has 9 tokens, its end included
# Named, so that nothing falls back to dense attention behind the reader's back.
IMPLEMENTATION = "xla"


@dataclasses.dataclass(frozen=True)
class Answer:
    """One reply, and what it took."""

    reply: str
    right: bool
    kept: float  # fraction of the clustered keys that a decode step read, on average
    tokens: int
    seconds: float  # question and reply, without compilation


def demo(arguments):
    """`squeezejax demo`."""
    if arguments.out is not None:
        text_file = f"{arguments.out}.txt"
        for file in (arguments.out, text_file):
            check_out(file, arguments.force)
    folder = model_directory(EMBEDDED)
    chronicle = make_document(arguments.seed, *document_size(arguments.tokens))
    facts = choose_facts(chronicle.facts, arguments.questions)
    tokenizer = text.load_tokenizer(folder)
    prepared = text.prepare(tokenizer, chronicle.text)
    params = models.load(folder)
    _introduce(chronicle, len(prepared.tokens), params)
    squeezed = text.build(params, tokenizer, prepared, SqueezeConfig(sparsity=arguments.sparsity), progress=True)
    tree = squeezed.tree
    if arguments.out is not None:
        with storage.replacing(os.path.realpath(text_file)) as file:
            file.write(chronicle.text.encode())
        text.save(arguments.out, squeezed, {"model": EMBEDDED, "context": os.path.abspath(text_file)})
    print(f"\nAnswers at sparsity {arguments.sparsity:g}, dense and squeezed in turn (compiling first):", flush=True)
    asked = [chat.question_ids(tokenizer, squeezed.prompt, fact.question) for fact in facts]
    ask = _answerer(params, tree, tokenizer)
    ways = (dense_generate, generate)
    for way in ways:
        ask(way, asked[0], facts[0])  # compiles, and is not timed
    answers: dict = {way: [] for way in ways}
    for number, (fact, question) in enumerate(zip(facts, asked, strict=True)):
        # Every other question goes first to the other way, so that neither always finds the caches warm.
        for way in ways if number % 2 == 0 else ways[::-1]:
            answers[way].append(ask(way, question, fact))
        _print_answers(number + 1, fact, answers[dense_generate][-1], answers[generate][-1])
    print("\n" + summarize(answers[dense_generate], answers[generate], tree.num_keys, tree.window_keys.shape[2]))
    lost = any(a.right and not b.right for a, b in zip(answers[dense_generate], answers[generate], strict=True))
    print("\n" + what_next(arguments.out, facts[0].question, lost))


def document_size(tokens: int) -> tuple[int, int]:
    """Tokens and facts of a text, as dense with facts as those on which the embedded model is evaluated."""
    return tokens, min(64, max(4, tokens // 50))


def choose_facts(facts, count: int) -> list:
    """`count` of the facts, spread evenly over the text; all, where there are fewer."""
    count = min(count, len(facts))
    return [facts[(2 * i + 1) * len(facts) // (2 * count)] for i in range(count)]


def summarize(dense: list[Answer], squeezed: list[Answer], num_keys: int, window: int) -> str:
    """Right answers, keys kept and time per token of both, as measured."""
    count, same = len(dense), sum(a.reply == b.reply for a, b in zip(dense, squeezed, strict=True))
    kept = statistics.mean(answer.kept for answer in squeezed)
    # Medians: whatever else runs on the machine disturbs single answers.
    times = [statistics.median(map(_pace, way)) for way in (dense, squeezed)]
    ratio = times[0] / times[1]
    pace = f"{ratio:.2f} times as fast" if ratio >= 1 else f"{1 / ratio:.2f} times as slow"
    return "\n".join(
        [
            f"right answers   dense {sum(a.right for a in dense)} of {count}, "
            f"squeezed {sum(a.right for a in squeezed)} of {count}; the same words in {same} of {count}",
            f"keys read       dense all {num_keys:,}, squeezed {kept:.1%} of them for a token of the answer",
            f"                (and both the last {window} keys of the text, and the question)",
            f"time per token  dense {times[0]:.2f} ms, squeezed {times[1]:.2f} ms: squeezed was {pace}",
            f"                (medians of {count}, question and answer, without compilation; measured here and now,",
            "                in a text too short to tell much of speed)",
        ]
    )


def what_next(out: str | None, question: str, lost: bool) -> str:
    """Commands to try after this one; `lost`: whether squeezing made a right answer wrong."""
    fewer, more = "fewer keys: when do answers go wrong?", "more keys: does the wrong answer come right?"
    commands = {
        "squeezejax demo --out demo.tree": "keep the squeezed text, to ask it yourself",
        f"squeezejax demo --sparsity {0.7 if lost else 0.98}": f"read {more if lost else fewer}",
        "squeezejax build --help": "your own text, and any Llama, Mistral or Qwen checkpoint",
    }
    if out is not None:
        tree = f"{shlex.quote(out)} --implementation {IMPLEMENTATION}"  # as the answers above
        del commands["squeezejax demo --out demo.tree"]
        commands = {
            f'squeezejax ask --tree {tree} --stats "{question}"': "",
            f"squeezejax ask --tree {tree} --chat": "ask in the words of the questions above",
            f'squeezejax ask --tree {tree} --explain page.html "{question}"': "see what was read",
            f"squeezejax info {shlex.quote(out)}": "what the squeezed text holds",
            **commands,
        }
    lines = [f"  {command:40} {purpose}".rstrip() for command, purpose in commands.items()]
    return "\n".join(["what next?", *lines])


def _introduce(chronicle, num_tokens: int, params):
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    example = chronicle.facts[0]
    print(f"A Llama of {weights / 1e6:.1f} M parameters reads a chronicle of {num_tokens:,} tokens, which begins:\n")
    print(textwrap.indent(textwrap.fill(chronicle.text[:400].rsplit(". ", 1)[0] + ". …", 96), "  "))
    print(f'\n{len(chronicle.facts)} facts are hidden in it, such as "{example.sentence}"\n', flush=True)


def _answerer(params, tree, tokenizer):
    """ask(way, ids, fact) -> Answer, where way is `generate` or `dense_generate`."""
    stop = chat.stop_tokens(tokenizer, params.config)

    def ask(way, ids: list[int], fact) -> Answer:
        started = time.perf_counter()
        generation = jax.block_until_ready(
            way(
                params,
                tree,
                ids,
                max_new_tokens=MAX_NEW_TOKENS,
                stop_tokens=stop,
                implementation=IMPLEMENTATION,
            )
        )
        seconds = time.perf_counter() - started
        count = int(generation.lengths[0])
        reply = chat.decode(tokenizer, np.asarray(generation.tokens[0, :count])).strip()
        return Answer(reply, reply == fact.reply, float(generation.kept_fraction[0]), count, seconds)

    return ask


def _pace(answer: Answer) -> float:
    """Milliseconds a token."""
    return 1000 * answer.seconds / max(1, answer.tokens)


def _print_answers(number: int, fact, dense: Answer, squeezed: Answer):
    print(f"\n{number}. {fact.question}")
    for name, answer in (("dense", dense), ("squeezed", squeezed)):
        reply = textwrap.shorten(answer.reply, 46, placeholder=" …")
        verdict = "right" if answer.right else "WRONG"
        print(f"   {name:9} {reply:46} {verdict}   keys read {answer.kept:6.1%}  {_pace(answer):5.2f} ms/token")
    if not (dense.right and squeezed.right):
        print(f"   {'text':9} {fact.sentence}")
    sys.stdout.flush()
