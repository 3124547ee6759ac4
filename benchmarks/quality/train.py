"""Trains the embedded model further, on the suite of tasks.py, so that dense attention can do what is measured.

    nice -n 19 python -m benchmarks.quality.train --work DIR --start STATE --out DIR

`STATE` is the state of an earlier training (`state.npz` in the --work of `benchmarks.embedded.train`, or of this
command); without it training begins with random weights. `--work` keeps the state, written every --every steps; the
same command goes on from there. Batches mix all tasks, those that are learnt last more often, and conversations about
the chronicle as the embedded model has always been trained on them, so that it does not forget them.
"""

import argparse
import dataclasses
import functools
import random
from pathlib import Path

import jax
import numpy as np

from benchmarks.embedded import batches
from benchmarks.embedded.train import Phase, begin, finish, initial_weights, model_config, train
from benchmarks.quality import tasks
from squeezejax.models import embedded

TEXT_WEIGHT, REPLY_WEIGHT, ANSWER_WEIGHT = 0.1, 1.0, 10.0
SHARES = {  # of the sequences
    "single": 1,
    "multi_key": 3,
    "multi_value": 5,
    "multi_query": 1,
    "variables": 2,
    "common_words": 2,
    "frequent_words": 1,
    "facts": 1,
    "conversation": 1,
}
KINDS = tuple(kind for kind, share in SHARES.items() for _ in range(share))


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one batch looks like."""

    length: int  # tokens of a sequence, context and turns together
    batch: int
    questions: int  # of a sequence


# The committed weights: 7,650 steps, under three hours on two busy cores, from those of benchmarks/embedded/train.py.
# Not in one run of this table: 1,920 steps of 384 tokens with equal shares came before it, and the shares changed on
# the way (`variables` had four until its sentences were made simpler, `multi_value` five since the last three phases).
PHASES = (
    Phase(Shape(256, 13, 2), 2000, 1e-3, 1e-3, enough=0.97),
    Phase(Shape(384, 9, 3), 1000, 1e-3, 1e-3, enough=0.97),
    Phase(Shape(1024, 4, 8), 1800, 1e-3, 8e-4, enough=0.99),
    Phase(Shape(4608, 1, 16), 300, 8e-4, 4e-4),
    Phase(Shape(8704, 1, 16), 50, 4e-4, 2e-5),
    # The longest texts cost some of what was learnt at 4K, several values of a name most of all.
    Phase(Shape(4608, 1, 16), 90, 3.5e-4, 1.5e-4),
    Phase(Shape(8704, 1, 16), 12, 1.5e-4, 1.5e-4),
    Phase(Shape(4608, 1, 16), 70, 1.5e-4, 1e-5),
)


def sequence(encoder: batches.Encoder, shape: Shape, kind: str, seed: int):
    """One sequence of a kind: ids, weights and answer flags, each a list of at most `shape.length`."""
    rng = random.Random(f"{kind}/{seed}")
    if kind == "conversation":
        facts = (shape.questions, max(shape.questions, min(64, shape.length // 64)))
        conversation = batches.Shape(shape.length, 1, shape.questions, facts, crowded=0.3)
        return batches.conversation(encoder, rng, conversation, batches.FIRST_TRAINING_SEED + seed)
    # Every third context is shorter, so that no length is special; turns take what is left.
    size = shape.length - 60 * shape.questions
    size = rng.randint(size * 3 // 4, size) if rng.random() < 1 / 3 else size
    sample = tasks.make_sample(kind, seed, size, questions=shape.questions, split="train")
    ids = [encoder.bos, *encoder.ids(sample.context)]
    weights, answers = [0.0] + [TEXT_WEIGHT] * (len(ids) - 1), [False] * len(ids)
    for index, question in enumerate(rng.sample(sample.questions, len(sample.questions))):
        turn = tasks.encode_turn(encoder.tokenizer, question, encoder.eos, first=index == 0)
        ids += turn.question + turn.reply
        weights += [TEXT_WEIGHT] * len(turn.question)
        weights += [ANSWER_WEIGHT if found else REPLY_WEIGHT for found in turn.answers]
        answers += [False] * len(turn.question) + turn.answers
    return ids, weights, answers


def make_batch(encoder: batches.Encoder, shape: Shape, index: int) -> batches.Batch:
    """Batch number `index` of training: the same batch for the same arguments."""
    tokens = np.full((shape.batch, shape.length), encoder.eos, np.int32)
    weights = np.zeros((shape.batch, shape.length), np.float32)
    answers = np.zeros((shape.batch, shape.length), bool)
    for row in range(shape.batch):
        number = index * shape.batch + row
        values = sequence(encoder, shape, KINDS[number % len(KINDS)], number)
        for array, value in zip((tokens, weights, answers), values, strict=True):
            array[row, : min(len(value), shape.length)] = value[: shape.length]
    return batches.Batch(tokens, weights, answers)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of the training state; resumed if present")
    parser.add_argument("--start", type=Path, help="state of another run to begin from")
    parser.add_argument("--out", type=Path, help="directory for the finished Hugging Face checkpoint, evaluated after")
    parser.add_argument("--every", type=int, default=20, help="steps between reports and states")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    encoder = batches.Encoder(embedded.PATH)
    params = initial_weights(model_config(encoder.vocab_size, encoder.eos), jax.random.key(0))
    state = arguments.work / "state.npz"
    run = begin(state, arguments.start, params)
    report = functools.partial(print, flush=True)
    save = lambda run: run.save(state)
    run = train(run, encoder, PHASES, every=arguments.every, report=report, checkpoint=save, make_batch=make_batch)
    save(run)
    finish(run, encoder, arguments.out, report)


if __name__ == "__main__":
    main()
