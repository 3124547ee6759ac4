"""Asks every question densely and at every sparsity, over one tree for each distinct context; a record an answer."""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

import squeezejax
from benchmarks.public import likelihood, metrics
from benchmarks.public.prompts import Prompts, tokenize
from benchmarks.public.samples import Item
from benchmarks.quality import report
from squeezejax.chat import prompts as chat

PADDING = 64  # questions' tokens are padded to multiples of it, so that few shapes are compiled
DENSE = None  # in place of a sparsity
MOST_LENGTHS = 32  # of contexts whose programs are kept


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model, and how it is asked."""

    params: object
    tokenizer: object
    sparsities: tuple[float, ...]
    config: squeezejax.SqueezeConfig = squeezejax.SqueezeConfig()
    max_length: int | None = None  # tokens of a prompt, before its chat template
    multiple: int = 1  # of which a fixed context's length is one
    batch: int = 8  # questions of one context asked together
    trees: Path | None = None  # where trees are kept
    # By name: left to itself, squeezejax would answer densely where selecting cannot pay.
    implementation: str = "xla"
    tail: bool = False  # keys not kept are estimated
    likelihood_tokens: int = 32  # first tokens of the right answer whose likelihood is measured; 0 = not at all

    @property
    def estimate(self) -> squeezejax.Estimate | None:
        """The option of `generate` that `tail` stands for."""
        return squeezejax.Estimate(tail=True) if self.tail else None


def run(setup: Setup, items: list[Item], records: Path, say: Callable[[str], None]):
    """Appends to `records` what is not there yet, and says how far it is."""
    keep_whole_lines(records)
    done = {(record["key"], record["sparsity"]) for record in report.load(records)}
    contexts = group(items)
    lengths = set()
    with records.open("a", encoding="utf-8") as file:
        for number, members in enumerate(contexts, 1):
            wanted = {
                sparsity: [at for at, item in enumerate(members) if (item.key, sparsity) not in done]
                for sparsity in (DENSE, *setup.sparsities)
            }
            if not any(wanted.values()):
                continue
            length = answer(setup, members, wanted, file)
            say(f"context {number} of {len(contexts)}, {members[0].dataset} {members[0].id}: {length} tokens")
            lengths.add(length)
            if len(lengths) == MOST_LENGTHS:
                jax.clear_caches()  # each program takes some 50 memory maps, and the kernel allows 65,530
                lengths.clear()


def keep_whole_lines(path: Path):
    """Cuts off a last line that an interruption left unfinished, so that the next does not continue it."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def group(items: list[Item]) -> list[list[Item]]:
    """Questions by context, contexts in the order in which they come."""
    groups = collections.defaultdict(list)
    for item in items:
        groups[item.context, item.chat].append(item)
    return list(groups.values())


def answer(setup: Setup, members: list[Item], wanted: dict[float | None, list[int]], file) -> int:
    """Asks the wanted ones of a context's questions, a record each; returns the fixed part's length in tokens."""
    # All of a context's questions decide where its fixed part ends, asked already or not: the tree stays the same.
    prompts = tokenize(
        setup.tokenizer,
        members,
        positions=setup.params.config.max_positions,
        max_length=setup.max_length,
        multiple=setup.multiple,
    )
    tree = context_tree(setup, prompts.fixed)
    context = hashlib.sha256(prompts.fixed.tobytes()).hexdigest()[:16]
    for sparsity, indices in wanted.items():
        for part in batches(members, indices, setup.batch):
            replies = ask(setup, tree, members, prompts, part, sparsity)
            likely = gold_likelihoods(setup, tree, members, prompts, part, sparsity)
            for at, (reply, kept, kept_reading), log_likelihood in zip(part, replies, likely, strict=True):
                item = members[at]
                record = {name: getattr(item, name) for name in ("key", "suite", "dataset", "subset")}
                record |= {"sparsity": sparsity, "score": metrics.score(item, reply), "reply": reply}
                record |= {"kept": kept, "kept_reading": kept_reading}
                record |= {} if log_likelihood is None else {"log_likelihood": round(log_likelihood, 4)}
                record |= {"context": context, "tokens": len(prompts.fixed), "dropped": prompts.dropped}
                file.write(json.dumps(record) + "\n")
            file.flush()
    return len(prompts.fixed)


def context_tree(setup: Setup, fixed: np.ndarray):
    """The tree of a context: built, or loaded where it was kept."""
    config = setup.config
    if len(fixed) <= config.observation_window:  # very short samples: half of them is the window
        config = dataclasses.replace(config, observation_window=len(fixed) // 2)
    if setup.trees is None:
        return finish(setup, squeezejax.squeeze(setup.params, fixed, config))
    build = f"{setup.params.config.fingerprint} {config}".encode() + fixed.tobytes()
    path = setup.trees / f"{hashlib.sha256(build).hexdigest()[:32]}.tree"
    if path.exists():
        return finish(setup, squeezejax.load(path, setup.params))
    tree = squeezejax.squeeze(setup.params, fixed, config)
    squeezejax.save(path, tree)
    return finish(setup, tree)


def finish(setup: Setup, tree):
    """The tree with what the tail needs, where it is asked for."""
    return squeezejax.add_value_centroids(tree) if setup.tail else tree


def batches(members: list[Item], indices: list[int], size: int) -> Iterator[list[int]]:
    """Questions that can be asked together: of one context, with replies that end alike."""
    ends = lambda at: (members[at].max_new_tokens, members[at].stop_at_newline)
    for _, alike in itertools.groupby(sorted(indices, key=ends), ends):
        alike = list(alike)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def ask(setup: Setup, tree, members: list[Item], prompts: Prompts, part: list[int], sparsity) -> list[tuple]:
    """(reply, kept fraction while replying, while reading the question) for each question of a batch."""
    first = members[part[0]]
    tokens, lengths = pad(setup, prompts, part)
    stop = chat.stop_tokens(setup.tokenizer, setup.params.config)
    if first.stop_at_newline:
        stop += (chat.encode(setup.tokenizer, "\n")[-1],)
    options = {"sparsity": sparsity, "estimate": setup.estimate} if sparsity is not DENSE else {}
    generate = squeezejax.generate if sparsity is not DENSE else squeezejax.dense_generate
    generation = generate(
        setup.params,
        tree,
        tokens,
        lengths=lengths,
        max_new_tokens=first.max_new_tokens,
        stop_tokens=stop,
        implementation=setup.implementation,
        **options,
    )
    lengths, replies = np.asarray(generation.lengths), np.asarray(generation.tokens)
    kept = np.stack([generation.kept_fraction, generation.prefill_kept_fraction], axis=1, dtype=float).round(6).tolist()
    texts = [chat.decode(setup.tokenizer, row[:length]) for row, length in zip(replies, lengths, strict=True)]
    return [(text, *fractions) for text, fractions in zip(texts, kept, strict=True)]


def pad(setup: Setup, prompts: Prompts, part: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The questions of a batch, padded at the end: tokens i32[B T] and lengths i32[B]."""
    questions = [prompts.questions[at] for at in part]
    multiple = max(PADDING, setup.multiple)
    tokens = np.zeros((len(part), -(-max(map(len, questions)) // multiple) * multiple), np.int32)
    for row, ids in zip(tokens, questions, strict=True):
        row[: len(ids)] = ids
    return tokens, np.array([len(ids) for ids in questions], np.int32)


def gold_likelihoods(setup: Setup, tree, members: list[Item], prompts: Prompts, part: list[int], sparsity) -> list:
    """Mean log-likelihood of a token of each question's right answer; None where none is to be measured."""
    if not setup.likelihood_tokens:
        return [None] * len(part)
    answers = [likelihood.gold_ids(setup.tokenizer, members[at], setup.likelihood_tokens) for at in part]
    tokens, lengths = pad(setup, prompts, part)
    # Sparsity 0 keeps every key: dense attention over the same cache.
    options = {"sparsity": 0.0} if sparsity is DENSE else {"sparsity": sparsity, "estimate": setup.estimate}
    return likelihood.of_answers(
        setup.params, tree, tokens, lengths, answers, implementation=setup.implementation, **options
    )
