"""Needles in real text, such that a model of 135M parameters finds them: RULER's multi-key task in its own words.

Several keys in one context, a question each; values are numbers or words. The question ends with the beginning of its
answer, as RULER's prompts do, and the value is then fed token by token (arXiv 2404.06654, niah_multikey).
"""

import dataclasses
import random
from collections.abc import Callable

HEAD = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n"
)
NEEDLE = " One of the special magic {kind} for {key} is: {value}."
QUESTION = "\nWhat is the special magic {one} for {key} mentioned in the provided text?"
ANSWER = " The special magic {one} for {key} mentioned in the provided text is"
KINDS = ("numbers", "words")
DIGITS = 7
_words = str.split
ADJECTIVES = _words(
    "amber ancient bitter brave bright broken calm clever clumsy cold crooked curious damp daring dusty eager elegant "
    "faded fancy feeble fierce gentle giddy golden grim hollow humble icy jolly keen lively lonely loud lucky mellow "
    "mighty misty modest narrow nervous noble odd pale patient plain proud quaint quiet rapid rough rustic salty "
    "scarce shallow sharp shy silent silver sleepy smooth solemn spare steady stern stormy strange subtle sunny swift "
    "tame tender thirsty tidy tough vague vivid warm weary wild windy wise witty young zealous"
)
NOUNS = _words(
    "anchor apron arrow badge banjo barrel basket beacon bell blanket bottle bridge bucket button cabin candle canoe "
    "canyon carpet castle cellar chimney clock cottage cradle curtain desert drawer engine fabric feather fiddle "
    "forest fountain garden glacier goblet hammer harbor helmet island jacket kettle kitchen ladder lantern ledger "
    "lemon locket magnet mantle marble meadow mirror monument mountain needle orchard oven paddle palace parcel pebble "
    "pencil pillow planet pocket puzzle quarry quilt rabbit ribbon river saddle shovel silo sparrow spoon statue "
    "stove temple thicket thimble ticket tractor trumpet tunnel valley velvet violin wagon walnut whistle window"
)


@dataclasses.dataclass(frozen=True)
class Haystack:
    """A context of exactly so many ids, and its questions."""

    ids: list[int]
    questions: list[list[int]]
    answers: list[list[int]]
    kind: str


def make(
    seed: int,
    length: int,
    stretch: list[int],
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    around: tuple[str, str],
    *,
    kind: str = "numbers",
    keys: int = 8,
) -> Haystack:
    """Hides `keys` needles in a stretch of a text's ids, each at the end of a sentence.

    around: what the model's chat template writes before and after a user's message. Raises ValueError for a stretch
    that is too short.
    """
    draw = random.Random(f"needles {seed} {kind}")
    word = lambda: f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
    names: list[str] = []
    while len(names) < keys:
        name = word()
        names += [] if name in names else [name]
    spare = [one for one in ADJECTIVES + NOUNS if not any(one in name.split("-") for name in names)]
    draw.shuffle(spare)
    number = lambda: str(draw.randint(10 ** (DIGITS - 1), 10**DIGITS - 1))
    # One word each: of two, this small a model mixes up those of different needles.
    values = [number() if kind == "numbers" else spare.pop() for _ in names]
    head = encode(around[0] + HEAD.format(kind=kind))
    needles = [encode(NEEDLE.format(kind=kind, key=key, value=value)) for key, value in zip(names, values, strict=True)]
    room = length - len(head) - sum(map(len, needles))
    if room < 1 or len(stretch) < room:
        raise ValueError(f"{len(stretch)} tokens of text do not fill a context of {length}")
    body = stretch[:room]
    ends = [i + 1 for i, token in enumerate(body) if decode([token]).strip() in (".", "?", "!")] or [*range(1, room)]
    places = sorted((draw.choice(ends), i) for i in range(keys))
    ids, done = list(head), 0
    for place, i in places:
        ids += body[done:place] + needles[i]
        done = place
    ids += body[done:]
    ask = lambda key: QUESTION.format(one=kind[:-1], key=key) + around[1] + ANSWER.format(one=kind[:-1], key=key)
    return Haystack(ids, [encode(ask(key)) for key in names], [encode(" " + value) for value in values], kind)
