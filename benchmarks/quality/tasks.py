"""A suite in the manner of RULER (Hsieh et al., arXiv 2404.06654), made of this project's own text for any tokenizer.

| task             | the context                                   | a question asks for                | RULER   |
| ---------------- | --------------------------------------------- | ---------------------------------- | ------- |
| `single`         | running text, a needle a question             | one needle's value                 | niah_s  |
| `multi_key`      | running text, needles whose names share words | one needle's value                 | niah_mk |
| `multi_value`    | running text, names with several values       | every value of a name              | niah_mv |
| `multi_query`    | running text, many needles                    | two needles' values                | niah_mq |
| `variables`      | running text, chains of names                 | the names of a chain and its value | vt      |
| `common_words`   | a list of words of several classes            | the most common word of a class    | cwe     |
| `frequent_words` | who wrote which word, frequencies after Zipf  | what one person wrote most often   | fwe     |
| `facts`          | running text with many facts                  | one fact                           | qa      |

Unlike RULER's, a context is asked many questions, which is what squeezing a context is for; and what changes between
methods is only how they choose keys, so every method is asked the same questions of the same contexts. `split` keeps
training and testing apart: other seeds, and names that never occur in the other split. A reply repeats the question's
words before it gives a value, as the text itself does.
"""

import dataclasses
import math
import random
import re
from collections.abc import Callable

from tokenizers import Tokenizer

from squeezejax.models.embedded import text

SPLITS = ("train", "test")
VALUES = 3  # of a name in multi_value
HOPS = 2  # from the first name of a chain to the last, in variables
CLASSES = {  # of common_words: how a question calls them, and their words
    "name": text.SLOTS["person"],
    "trade": text.SLOTS["role"],
    "place": text.SLOTS["place"],
    "good": text.SLOTS["goods"],
    "animal": text.SLOTS["animal"],
    "weather": text.SLOTS["weather"],
    "thing": text.SLOTS["thing"],
    "number": text.SLOTS["number"],
}
WORDS_OF_A_CLASS = 8
COMMON = 10  # how many times as often as the other words of its class the common one occurs (RULER: 30 and 3)
WORDS_OF_A_PERSON = 6
ZIPF = 2.0  # the word of rank r occurs in proportion to r^−ZIPF (RULER's default)

_NAME_WORDS = (text.FIRST_WORDS, text.SECOND_WORDS)
_SPAN = re.compile(r"\[(.*?)\]")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its one right reply, and which parts of that have to be found in the context."""

    text: str
    reply: str
    answers: tuple[tuple[int, int], ...]  # spans of characters of the reply
    any_order: bool = False  # whether the answers count in any order, as RULER counts several values of a name


@dataclasses.dataclass(frozen=True)
class Sample:
    """A context and what is asked of it; each question by itself, right after the context."""

    task: str
    context: str
    questions: tuple[Question, ...]


def make_sample(
    task: str,
    seed: int,
    num_tokens: int,
    *,
    questions: int = 8,
    split: str = "test",
    count_tokens: Callable[[str], int] = text.count_tokens,
) -> Sample:
    """The sample with this seed: at most `num_tokens` tokens of context, as `count_tokens` counts a text's.

    Raises ValueError for an unknown task or split, and where that many questions' answers do not fit.
    """
    if task not in TASKS or split not in SPLITS:
        raise ValueError(f"task must be one of {', '.join(TASKS)} and split one of {SPLITS}, got {task!r}, {split!r}")
    rng = random.Random(f"{task}/{split}/{seed}")  # seeded by text: splits and tasks share no stream of numbers
    context, asked = TASKS[task](_Maker(rng, num_tokens, questions, SPLITS.index(split), count_tokens))
    return Sample(task, context, tuple(_question(*one) for one in asked))


@dataclasses.dataclass(frozen=True)
class _Maker:
    """What making a context needs to know."""

    rng: random.Random
    num_tokens: int
    questions: int
    parity: int  # of the names of this split
    count: Callable[[str], int]

    def names(self, number: int, *, crowded: bool = False) -> list[str]:
        """Names of this split, each once; `crowded` names come from so few words that most words are shared."""
        firsts, seconds = (range(len(words)) for words in _NAME_WORDS)
        pairs, few = [], math.isqrt(4 * number)
        while len(pairs) < number:
            if crowded:
                few += 1
                firsts, seconds = (self.rng.sample(range(len(words)), min(few, len(words))) for words in _NAME_WORDS)
            # Every word is in names of both splits, no name is: the sum of its words' numbers decides.
            pairs = [(first, second) for first in firsts for second in seconds if (first + second) % 2 == self.parity]
        chosen = self.rng.sample(pairs, number)
        return [f"{text.FIRST_WORDS[first]} {text.SECOND_WORDS[second]}" for first, second in chosen]

    def facts(self, number: int, *, crowded: bool = False) -> list[text.Fact]:
        """Facts with names of this split."""
        relation, answer = (lambda: self.rng.choice(text.RELATIONS)), (lambda: self.rng.choice(text.ANSWERS))
        return [text.Fact(name, relation(), answer()) for name in self.names(number, crowded=crowded)]

    def chronicle(self, sentences: list[str]) -> tuple[str, list[int]]:
        """Running text with `sentences` anywhere in it: the context, and their indices in the order they come."""
        room = self.num_tokens - sum(self.count(" " + sentence) for sentence in sentences)
        while room >= 20:
            paragraphs = text.make_paragraphs(self.rng, room, self.count)
            if paragraphs:
                order = text.plant(self.rng, paragraphs, sentences)
                excess = self.count(text.join(paragraphs)) - self.num_tokens
                if excess <= 0:
                    return text.join(paragraphs), order
            room -= max(excess, 1) if paragraphs else room  # sentences joined may count more than one by one
        raise ValueError(f"{len(sentences)} planted sentences do not fit in {self.num_tokens} tokens; ask for fewer")

    def fill(self, words: Callable[[int], list[str]], smallest: int) -> str:
        """The longest text of `words(size)` that fits, found by halving; `smallest` is the least size that will do."""
        low, high = smallest, max(smallest, self.num_tokens)
        fits = lambda size: self.count(" ".join(words(size))) <= self.num_tokens
        if not fits(low):
            raise ValueError(f"{self.questions} questions need a context of more than {self.num_tokens} tokens")
        while low < high:
            size = (low + high + 1) // 2
            low, high = (size, high) if fits(size) else (low, size - 1)
        return " ".join(words(low))


def _ask(fact: text.Fact) -> tuple[str, str]:
    return fact.question, f"The {fact.relation} of {fact.name} is [{fact.answer}]."


def _single(maker: _Maker):
    facts = maker.facts(maker.questions)
    context, _ = maker.chronicle([fact.sentence for fact in facts])
    return context, [_ask(fact) for fact in facts]


def _multi_key(maker: _Maker):
    facts = maker.facts(max(2 * maker.questions, maker.num_tokens // 48), crowded=True)
    context, _ = maker.chronicle([fact.sentence for fact in facts])
    return context, [_ask(fact) for fact in facts[: maker.questions]]


def _facts(maker: _Maker):
    facts = maker.facts(max(maker.questions, maker.num_tokens // 64))
    context, _ = maker.chronicle([fact.sentence for fact in facts])
    return context, [_ask(fact) for fact in facts[: maker.questions]]


def _multi_value(maker: _Maker):
    facts = maker.facts(maker.questions)
    values = [maker.rng.sample(text.ANSWERS, VALUES) for _ in facts]
    stated = [
        (number, value, dataclasses.replace(fact, answer=value).sentence)
        for number, fact in enumerate(facts)
        for value in values[number]
    ]
    context, order = maker.chronicle([sentence for _, _, sentence in stated])
    asked = []
    for number, fact in enumerate(facts):
        found = [stated[i][1] for i in order if stated[i][0] == number]  # as the text has them
        listed = " and ".join(f"[{value}]" for value in found)
        question = f"What are the {VALUES} {fact.relation}s of {fact.name}?"
        asked.append((question, f"The {fact.relation} of {fact.name} is {listed}.", True))
    return context, asked


def _multi_query(maker: _Maker):
    facts = maker.facts(max(2 * maker.questions, maker.num_tokens // 96))
    context, _ = maker.chronicle([fact.sentence for fact in facts])
    asked = []
    for one, other in zip(facts[: maker.questions], facts[maker.questions :], strict=False):
        question = f"What is the {one.relation} of {one.name} and the {other.relation} of {other.name}?"
        asked.append((question, f"{_ask(one)[1]} {_ask(other)[1]}"))
    return context, asked


def _variables(maker: _Maker):
    names = iter(maker.names(maker.questions * (HOPS + 1)))
    sentences, asked = [], []
    for _ in range(maker.questions):
        relation, chain = maker.rng.choice(text.RELATIONS), [next(names) for _ in range(HOPS + 1)]
        targets = [f"{name}'s" for name in chain[1:]] + [maker.rng.choice(text.ANSWERS)]
        sentences += [f"The {relation} of {name} is {target}." for name, target in zip(chain, targets, strict=True)]
        found = [f"[{name}]'s" for name in chain[1:]] + [f"[{targets[-1]}]"]
        reply = " ".join(f"The {relation} of {name} is {target}." for name, target in zip(chain, found, strict=True))
        asked.append((f"What is the {relation} of {chain[0]}?", reply))
    return maker.chronicle(sentences)[0], asked


def _common_words(maker: _Maker):
    number = min(maker.questions, len(CLASSES))
    chosen = {name: maker.rng.sample(CLASSES[name], WORDS_OF_A_CLASS) for name in maker.rng.sample([*CLASSES], number)}
    shuffle = maker.rng.getrandbits(64)

    def listed(rounds: int) -> list[str]:
        # In a round every word comes once, and the first of its class COMMON times.
        words = [word for members in chosen.values() for word in members + members[:1] * (COMMON - 1)] * rounds
        random.Random(shuffle).shuffle(words)
        return words

    context = maker.fill(listed, 1)
    return context, [
        (f"Which {name} comes most often?", f"The {name} that comes most often is [{words[0]}].")
        for name, words in chosen.items()
    ]


def _frequent_words(maker: _Maker):
    people = maker.rng.sample(text.SLOTS["person"], min(maker.questions, len(text.SLOTS["person"])))
    words = {person: maker.rng.sample(text.ANSWERS, WORDS_OF_A_PERSON) for person in people}
    shares = [rank**-ZIPF for rank in range(1, WORDS_OF_A_PERSON + 1)]
    shuffle = maker.rng.getrandbits(64)

    def entries(size: int) -> list[str]:
        # `size` entries a person, each rank its share of them and the first what is left over: it stays the first.
        counts = [int(size * share / sum(shares)) for share in shares]
        counts[0] += size - sum(counts)
        found = [
            f"{person} wrote {word}."
            for person in people
            for word, count in zip(words[person], counts, strict=True)
            for _ in range(count)
        ]
        random.Random(shuffle).shuffle(found)
        return found

    context = maker.fill(entries, 2)
    return context, [
        (f"What did {person} write most often?", f"{person} wrote [{words[person][0]}] most often.")
        for person in people
    ]


def _question(question: str, marked: str, any_order: bool = False) -> Question:
    """From a reply in which what has to be found stands in brackets."""
    reply, answers, end = "", [], 0
    for span in _SPAN.finditer(marked):
        reply += marked[end : span.start()]
        answers.append((len(reply), len(reply) + len(span[1])))
        reply, end = reply + span[1], span.end()
    return Question(question, reply + marked[end:], tuple(answers), any_order)


TASKS = {
    "single": _single,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "variables": _variables,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
    "facts": _facts,
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its reply as ids; `answers` flags the reply's tokens that have to be found in the context.

    `accepted` has for every token of the reply those that are right there, itself first: where answers may come in any
    order, a first token of one that has not been given yet is.
    """

    question: list[int]
    reply: list[int]
    answers: list[bool]
    accepted: list[list[int]]


def encode_turn(tokenizer: Tokenizer, question: Question, end: int, *, first: bool = True) -> Turn:
    """In the embedded model's format (benchmarks/embedded/tokenizer.py); `end` is the id that ends a reply."""
    asked = tokenizer.encode(("\n\n" if first else "\n") + question.text + "\nAnswer:", add_special_tokens=False).ids
    reply = tokenizer.encode(" " + question.reply, add_special_tokens=False)
    spans = [(start + 1, stop + 1) for start, stop in question.answers]  # the reply follows a space
    found = [any(start < b and a < stop for start, stop in spans) for a, b in reply.offsets]
    ids = [*reply.ids, end]
    accepted = [[token] for token in ids]
    if question.any_order:
        firsts = [next(i for i, (_, b) in enumerate(reply.offsets) if start < b) for start, _ in spans]
        for number, first in enumerate(firsts):
            accepted[first] = [ids[i] for i in firsts[number:]]
    return Turn(asked, ids, [*found, False], accepted)
