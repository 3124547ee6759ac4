"""How often the embedded model answers exactly right, by length of the document, with dense attention.

    python -m benchmarks.embedded.evaluate

Documents come from held-out seeds. Every question is asked alone, right after the document; a reply counts where greedy
decoding gives it to the last token, <eos> included. That is so exactly when every token of the right reply has the
largest logit after the tokens before it, and so one forward pass per document judges all its questions: they lie side
by side after the document, and see it and themselves, not one another.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.embedded.batches import Encoder
from squeezejax import models
from squeezejax.models import Llama, embedded
from squeezejax.models.embedded import text
from squeezejax.pallas_kernels.layout import split_heads
from squeezejax.pallas_kernels.xla.softmax import partial_attention


@dataclasses.dataclass(frozen=True)
class Length:
    """One row of the table."""

    tokens: int  # of a document, at most
    facts: int  # of a document; all are asked
    documents: int


LENGTHS = (Length(256, 10, 24), Length(1024, 24, 12), Length(2048, 40, 8), Length(4096, 64, 6), Length(8192, 64, 6))
FIRST_SEED = 100_000  # held out: batches.FIRST_TRAINING_SEED is above


@functools.partial(jax.jit, static_argnames=("prefix", "block"))
def _predictions(params: Llama, tokens, document_length, branch, offsets, *, prefix, block=256):
    """Most likely next token i32[T] of tokens i32[T]: `prefix` rows of document (the first document_length real), then
    the questions, row i in question branch[i] at offsets[i] after the document; a document row's branch is −1."""
    T = tokens.shape[0]
    rows = jnp.arange(T)
    positions = jnp.where(rows < prefix, rows, document_length + offsets)
    starts = jnp.arange(0, T, block)

    def attend(carry, layer, q, k, v):
        padded = jnp.pad(split_heads(q, k.shape[2]), ((0, 0), (0, -T % block), (0, 0), (0, 0), (0, 0)))

        def one(start):
            row = start + jnp.arange(block)[:, None]
            own = jnp.take(branch, row, mode="clip")
            alike = jnp.where(rows[None, :] < prefix, rows[None, :] < document_length, branch[None, :] == own)
            seen = (rows[None, :] <= row) & alike
            queries = jax.lax.dynamic_slice_in_dim(padded, start, block, axis=1)
            return partial_attention(queries, k, v, seen[None])[0][0]

        out = jax.lax.map(one, starts)  # [blocks block K G H]
        return carry, out.reshape(1, -1, *q.shape[2:])[:, :T]

    x, _ = params.run_layers(params.embed(tokens[None]), positions[None], attend, None)
    return jnp.argmax(params.unembed(x)[0], axis=-1)


def exact_matches(params: Llama, encoder: Encoder, document: text.Document, num_tokens: int) -> np.ndarray:
    """Which facts of `document` (of at most `num_tokens` tokens) are answered exactly: bool[facts]."""
    prompt = [encoder.bos, *encoder.ids(document.text)]
    prefix = num_tokens + 1
    tokens = [*prompt, *[encoder.eos] * (prefix - len(prompt))]
    branch, offsets, judged = [-1] * prefix, [0] * prefix, []
    for index, fact in enumerate(document.facts):
        question, reply = encoder.turn(fact, first=True)
        first = len(tokens) + len(question)
        judged.append((first, first + len(reply)))
        tokens += question + reply
        branch += [index] * (len(question) + len(reply))
        offsets += range(len(question) + len(reply))
    arrays = (jnp.asarray(values, jnp.int32) for values in (tokens, len(prompt), branch, offsets))
    predicted = np.asarray(_predictions(params, *arrays, prefix=prefix))
    return np.array([bool(np.all(predicted[first - 1 : end - 1] == tokens[first:end])) for first, end in judged])


def evaluate(params: Llama, encoder: Encoder, lengths=LENGTHS, report=print) -> dict[int, float]:
    """Share of exact replies by document length; reports a table row by row."""
    report("| document tokens | facts | questions | exact |")
    report("|---:|---:|---:|---:|")
    shares = {}
    for length in lengths:
        seeds = range(FIRST_SEED, FIRST_SEED + length.documents)
        documents = [text.make_document(seed, length.tokens, length.facts) for seed in seeds]
        right = np.concatenate([exact_matches(params, encoder, document, length.tokens) for document in documents])
        shares[length.tokens] = float(right.mean())
        report(f"| {length.tokens} | {length.facts} | {right.size} | {100 * right.mean():.1f} % |")
    return shares


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Table of exact replies by document length, with dense attention.")
    parser.add_argument(
        "--model", type=Path, default=embedded.PATH, help="checkpoint directory (default: the committed one)"
    )
    directory = parser.parse_args().model
    evaluate(models.load(directory), Encoder(directory), report=functools.partial(print, flush=True))


if __name__ == "__main__":
    main()
