"""Token sequences to train and evaluate on: a document, then questions about it as the turns of one conversation."""

import dataclasses
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from squeezejax.models.embedded import text

# Seeds below belong to evaluation, tests and the demo; training draws only from here on.
FIRST_TRAINING_SEED = 1_000_000
TURN_TOKENS = 21  # question 8, line break, Answer, :, reply 8, <eos>, line break
TEXT_WEIGHT, REPLY_WEIGHT, ANSWER_WEIGHT = 0.3, 1.0, 10.0
# A question's second name word follows from the document as soon as the first is matched: the simplest lookup there is,
# and the one from which the answer's grows.
NAME_WEIGHT = 5.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one batch looks like."""

    length: int  # tokens of a sequence, document and turns together
    batch: int
    turns: int  # questions of a sequence, at most
    facts: tuple[int, int]  # fewest and most facts of a document
    recitals: float = 0.0  # share of sequences that are no documents but drills, see `recital`
    crowded: float = 0.0  # share of sequences whose names share words, so that one word of a name does not do

    def __post_init__(self):
        """Raises ValueError where a sequence could come out longer than `length`."""
        if self.length < 1 + 2 + TURN_TOKENS * self.turns + text.FACT_TOKENS * self.facts[1] + 20:
            raise ValueError(f"{self.facts[1]} facts and {self.turns} turns do not fit in {self.length} tokens")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences, padded at their end; `weights` say how much predicting each token counts."""

    tokens: np.ndarray  # i32[B T]
    weights: np.ndarray  # f32[B T]; 0 for padding and for the first token
    answers: np.ndarray  # bool[B T]: the one token of each reply that has to be looked up in the document


class Encoder:
    """Text to ids, with the pieces that every conversation repeats encoded once."""

    def __init__(self, directory: Path):
        """Reads `directory`/tokenizer.json."""
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.bos, self.eos = (self.tokenizer.token_to_id(token) for token in ("<bos>", "<eos>"))
        self.vocab_size = self.tokenizer.get_vocab_size()
        words = (*text.FIRST_WORDS, *text.SECOND_WORDS, *text.ANSWERS)
        self.words = [self.ids(" " + word)[0] for word in words]

    def ids(self, string: str) -> list[int]:
        """Token ids of `string` by itself."""
        return self.tokenizer.encode(string).ids

    def turn(self, fact: text.Fact, first: bool) -> tuple[list[int], list[int]]:
        """Ids of a user's turn up to `Answer:`, and of the reply with its <eos>."""
        question = ("\n\n" if first else "\n") + fact.question + "\nAnswer:"
        return self.ids(question), [*self.ids(" " + fact.reply), self.eos]


def conversation(encoder: Encoder, rng: random.Random, shape: Shape, seed: int):
    """One sequence: ids, weights and answer flags, each a list of at most `shape.length`."""
    num_facts = rng.randint(*shape.facts)
    turns = rng.randint((shape.turns + 1) // 2, shape.turns)
    room = shape.length - 1 - 2 - TURN_TOKENS * turns
    fewest = text.FACT_TOKENS * num_facts + 20
    # Every third document is shorter, so that no distance and no document length is special.
    size = rng.randint(fewest, room) if rng.random() < 1 / 3 else room
    document = text.make_document(seed, size, num_facts, crowded=rng.random() < shape.crowded)
    ids = [encoder.bos, *encoder.ids(document.text)]
    weights = [0.0] + [TEXT_WEIGHT] * (len(ids) - 1)
    answers = [False] * len(ids)
    # With fewer facts than turns, questions come again: the earlier reply helps, and looking up is learnt sooner.
    asked = rng.sample(document.facts, turns) if turns <= num_facts else rng.choices(document.facts, k=turns)
    for index, fact in enumerate(asked):
        question, reply = encoder.turn(fact, index == 0)
        looked_up = len(reply) - 3  # before the full stop and <eos>
        ids += question + reply
        weights += [TEXT_WEIGHT] * len(question) + [REPLY_WEIGHT] * len(reply)
        weights[looked_up - len(reply)] = ANSWER_WEIGHT
        weights[-len(reply) - 5] = NAME_WEIGHT  # before the question mark, line break, Answer and colon
        answers += [False] * (len(question) + len(reply))
        answers[looked_up - len(reply)] = True
    return ids, weights, answers


def recital(encoder: Encoder, rng: random.Random, shape: Shape):
    """A drill in place of a document: words without sense, or facts without a story, said again and again.

    Nearly every token after the first round has to be looked up, where a conversation has two such tokens a turn:
    looking up is learnt several times sooner. Same values as `conversation`; what has to be looked up is flagged.
    """
    if rng.random() < 0.5:
        words = rng.choices(encoder.words, k=rng.randint(8, shape.length // 3))
        ids = words * (shape.length // len(words) + 1)
        weights = [0.1] * len(words) + [2.0] * (len(ids) - len(words))
        flags = [False] * (len(words) + 1) + [True] * (len(ids) - len(words) - 1)
    else:
        facts = text.make_facts(rng, rng.randint(2, 6), crowded=rng.random() < shape.crowded)
        ids, weights, flags, said = [], [], [], set()
        for fact in rng.choices(facts, k=shape.length // text.FACT_TOKENS):
            ids += encoder.ids(" " + fact.sentence)
            flags += [False] * 6 + [fact in said, False]
            said.add(fact)
            weights += [TEXT_WEIGHT] * 4 + [NAME_WEIGHT, TEXT_WEIGHT, ANSWER_WEIGHT, TEXT_WEIGHT]
    return ids, weights, flags


def make_batch(encoder: Encoder, shape: Shape, index: int) -> Batch:
    """Batch number `index` of training: the same batch for the same arguments, never a held-out seed."""
    tokens = np.full((shape.batch, shape.length), encoder.eos, np.int32)
    weights = np.zeros((shape.batch, shape.length), np.float32)
    answers = np.zeros((shape.batch, shape.length), bool)
    for row in range(shape.batch):
        seed = FIRST_TRAINING_SEED + index * 1000 + row
        rng = random.Random(-seed)
        if rng.random() < shape.recitals:
            values = recital(encoder, rng, shape)
        else:
            values = conversation(encoder, rng, shape, seed)
        for array, value in zip((tokens, weights, answers), values, strict=True):
            array[row, : min(len(value), shape.length)] = value[: shape.length]
    return Batch(tokens, weights, answers)
