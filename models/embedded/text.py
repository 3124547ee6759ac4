"""A seeded generator of readable English: the chronicle of a harbour town, with facts planted in it to ask about.

The grammar below is this project's own; no text comes from anywhere else. A fact is one sentence, "The passcode of
Amber Falcon is violet.", whose name (two words) occurs nowhere else in its document, while its single words may: only a
reader who matches the whole name finds the answer. Answers are one vocabulary item each.
"""

import dataclasses
import math
import random
import re


def _words(string: str) -> tuple[str, ...]:
    return tuple(string.split())


RELATIONS = ("passcode", "watchword", "signal")

FIRST_WORDS = _words(
    """Amber Ancient Arctic Ashen Autumn Azure Bitter Bold Brass Brave Bright Broken Bronze Calm Cedar Clever Cobalt
    Copper Coral Crimson Crystal Curious Daring Distant Dusty Early Ebony Eager Elder Emerald Empty Fading Fearless
    Fierce Flying Foggy Frozen Gentle Gilded Glass Golden Granite Hidden Hollow Humble Hungry Iron Ivory Jade Jolly
    Lonely Loyal Lucky Marble Mellow Merry Mighty Misty Modest Molten Mossy Narrow Noble Northern Opal Painted Patient
    Pearl Placid Polar Proud Quick Quiet Rapid Restless Rising Royal Ruby Rugged Rustic Sacred Sandy Scarlet Secret
    Silent Silver Sleepy Smoky Snowy Solemn Southern Steady Stormy Sunny Swift Tender Twilight Velvet Wandering Wild"""
)

SECOND_WORDS = _words(
    """Anchor Antler Archer Arrow Badger Banner Basin Beacon Bear Bell Bison Bridge Candle Canyon Castle Cavern Cloud
    Comet Compass Condor Crane Creek Crown Dagger Dolphin Dragon Drum Eagle Ember Falcon Fern Flute Forest Fountain
    Fox Galleon Garden Gate Geyser Glacier Goose Hammer Harp Hawk Hedge Heron Hunter Island Jaguar Kettle Lagoon
    Lantern Lark Leopard Lion Lynx Maple Marten Meadow Meteor Mirror Moose Mountain Oak Orchard Otter Owl Panther
    Pilgrim Pine Planet Pony Prairie Quill Rabbit Raven Reef River Sailor Salmon Shadow Shield Sparrow Spruce Stag
    Star Stone Swan Temple Tiger Tower Trumpet Valley Vessel Walrus Whale Willow Window Wolf Zephyr"""
)

ANSWERS = _words(
    """almond apricot bamboo basil birch blossom butter button cactus camel canvas caramel cello cherry cinnamon clover
    cocoa cotton cricket daisy denim diamond domino feather fiddle flamingo garlic garnet ginger hazel helmet honey
    indigo ivy jasmine jelly juniper kiwi koala lavender lemon lilac lime lotus magenta magnet mango maroon melon mint
    mosaic muffin mustard nectar nutmeg olive onyx orange orchid oyster papaya paprika parrot peach pebble penguin
    pepper piano pigeon plum pumpkin puzzle quartz radish raisin ribbon rocket rose saffron sapphire scarf sesame
    spider sugar teal thimble thunder topaz tulip turnip turtle umber vanilla violet violin walnut yellow zebra zinc"""
)

HEADINGS = (
    "Of Wind and Weather",
    "Of Ships and Crews",
    "Of Bread and Salt",
    "Of Roads and Bridges",
    "Of Long Winters",
    "Of Markets and Fairs",
    "Of Letters from the Coast",
    "Of Work in the Fields",
    "Of Old Stories",
    "Of Guests and Strangers",
)

# What may stand in a template's {slot}. A word has one form everywhere, so that the vocabulary stays small.
SLOTS = {
    "person": _words(
        """Anna Tobias Clara Edmund Greta Henry Ida Jonas Karl Lena Martin Nora Oskar Paula Robert Sofia Thomas Vera
        Walter Emma"""
    ),
    "role": _words(
        """miller baker carpenter teacher smith weaver doctor gardener sailor clerk shepherd captain cook tailor
        fisherman judge painter driver keeper mayor"""
    ),
    "place": _words(
        """mill harbor market school bakery church library tavern quay workshop stable lighthouse bridge square station
        garden orchard tower hall warehouse"""
    ),
    "goods": _words(
        """flour rope timber wool salt paper glass coal barley leather tea cloth oil wax cheese grain tar linen soap
        copper"""
    ),
    "quality": _words(
        """old narrow quiet broken heavy bright simple strange small fine long cold warm dry wet new large plain steep
        busy"""
    ),
    "animal": _words("horses sheep goats hens dogs cats geese oxen bees swallows"),
    "season": _words("spring summer autumn winter"),
    "number": _words("two three four five six seven eight nine ten twelve twenty thirty forty"),
    "order": _words("first second third fourth fifth sixth seventh eighth ninth tenth last next"),
    "weather": _words("rain snow fog wind frost hail sunshine thunderstorms drizzle mist"),
    "time": _words("morning noon evening midnight dawn dusk breakfast supper"),
    "thing": _words(
        """ladder barrel lamp cart boat table clock door roof fence wheel basket chair stove map book letter net saw
        drum"""
    ),
    "feeling": _words("pleased worried surprised tired hopeful grateful angry calm proud curious"),
    "manner": _words("slowly carefully quickly gladly quietly badly twice often together alone"),
}

# First sentences of paragraphs; they begin with few different words, which the tokenizer meets without a space before.
OPENERS = (
    "In the {order} week of {season} the {weather} came early to the {place}.",
    "In that {season} the {role} wrote only about {goods} and {weather}.",
    "On the {order} day after the fair, {person} walked to the {quality} {place}.",
    "On market day the {role} sold {number} sacks of {goods} near the {place}.",
    "At {time} the bells rang over the {quality} {place}.",
    "At the {place} nobody spoke of anything but {goods}.",
    "After the {weather} had passed, {person} opened the {place} again.",
    "After {time} the road to the {place} lay empty.",
    "Before {time} the {role} and {person} had loaded the {thing}.",
    "Before the {season} ended, {number} families moved closer to the {place}.",
    "During the {order} night of {weather} the {place} lost its {thing}.",
    "During supper {person} told the {role} about the {quality} {thing}.",
)

SENTENCES = (
    "The {role} carried {number} sacks of {goods} to the {place} before {time}.",
    "{person} mended the {quality} {thing} behind the {place}.",
    "Nobody in town had seen so much {weather} since the {order} {season}.",
    "{person} and {person} argued {manner} about the price of {goods}.",
    "A {quality} {thing} stood beside the {place} for {number} days.",
    "The {animal} slept near the {place} until {time}.",
    "Every {season} the {role} painted the {thing} of the {place}.",
    "It was said that the {role} kept {number} {animal} in the {place}.",
    "{person} was {feeling} when the {weather} stopped.",
    "The road from the {place} to the {place} was {quality} and {quality}.",
    "Children gathered at the {place} to watch the {animal}.",
    "The {role} asked {person} for a {quality} {thing}.",
    "There was enough {goods} for {number} weeks.",
    "By {time} the {weather} had reached the {place}.",
    "{person} wrote a letter about the {goods} and sent it to the {role}.",
    "The {place} closed early because of the {weather}.",
    "Some people blamed the {role}, while others blamed the {weather}.",
    "{person} bought {goods} and {goods} from the {role}.",
    "The {quality} {place} smelled of {goods} and {goods}.",
    "A ship with {goods} from the south waited in the harbor.",
    "The {role} counted the {animal} {manner} and found {number} missing.",
    "Under the {thing} lay a {quality} map of the {place}.",
    "{person} learned to repair a {thing} from the {role}.",
    "The council met in the {place} and talked until {time}.",
    "No one remembered who had built the {quality} {place}.",
    "They drank tea with the {role} and listened to the {weather}.",
    "The {thing} fell from the cart and rolled {manner} toward the {place}.",
    "{person} promised to return with {number} barrels of {goods}.",
    "The {order} visitor of the {season} was a {feeling} {role}.",
    "With the help of {person}, the {role} moved the {thing} into the {place}.",
    "The price of {goods} rose again in {season}.",
    "{person} slept badly and dreamed of {animal} and {weather}.",
    "A {feeling} {role} knocked at the door of the {place}.",
    "The {animal} broke the fence and ran {manner} across the fields.",
    "Two sisters of {person} worked in the {place} that {season}.",
    "The {role} had never seen a {thing} so {quality}.",
    "Behind the {place} grew {quality} trees and a few roses.",
    "{person} lit the lamp and read {manner} until {time}.",
    "The roof of the {place} needed {number} new boards.",
    "When the {weather} came, {person} hid the {goods} in the {place}.",
    "The {role} was {feeling}, but said nothing to {person}.",
    "Old stories tell of a {quality} {thing} under the {place}.",
    "{person} sang {manner} while the {role} cut the {goods}.",
    "The {order} cart of {goods} arrived at {time}.",
    "From the {place} one could see the {quality} hills and the sea.",
    "The {role} gave {person} {number} coins for the {thing}.",
    "Soon the {place} was full of {goods}, {goods} and {goods}.",
    "All through {season} the {animal} stayed inside the {place}.",
    "{person} forgot the {thing} at the {place} and went back alone.",
    "The {weather} lasted {number} days and spoiled the {goods}.",
    "Only {person} knew where the {role} kept the {thing}.",
    "The {role} from the {place} married in {season}.",
    "A stranger asked {person} the way to the {quality} {place}.",
    "The {thing} in the {place} had been {quality} for {number} years.",
    "{person} thanked the {role} and walked home through the {weather}.",
    "In the end the {goods} was shared among {number} houses.",
)

_SLOT = re.compile(r"\{(\w+)\}")
_PIECE = re.compile(r"\w+|[^\w\s]|\n")
FACT_TOKENS = 8  # The · relation · of · First · Second · is · answer · full stop


@dataclasses.dataclass(frozen=True)
class Fact:
    """One planted fact: `relation` of `name` is `answer`."""

    name: str
    relation: str
    answer: str

    @property
    def sentence(self) -> str:
        """How the document states it."""
        return f"The {self.relation} of {self.name} is {self.answer}."

    @property
    def question(self) -> str:
        """How a user asks for it."""
        return f"What is the {self.relation} of {self.name}?"

    @property
    def reply(self) -> str:
        """The exact reply: the fact's sentence, so that the name stands right before the answer, as in the text."""
        return self.sentence


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and the facts planted in it, in the order in which they occur."""

    text: str
    facts: tuple[Fact, ...]


def count_tokens(text: str) -> int:
    """Words, marks and line breaks of `text`: what the embedded tokenizer makes of generated text, one token each."""
    return len(_PIECE.findall(text))


def make_facts(rng: random.Random, num_facts: int, crowded: bool = False) -> tuple[Fact, ...]:
    """Facts with names that differ pairwise (single words of names, relations and answers recur).

    `crowded` names come from so few words that nearly every word belongs to several names.
    """
    firsts, seconds = FIRST_WORDS, SECOND_WORDS
    if crowded:
        few = math.isqrt(2 * num_facts - 1) + 1
        firsts, seconds = rng.sample(firsts, few), rng.sample(seconds, few)
    chosen = rng.sample(range(len(firsts) * len(seconds)), num_facts)
    pairs = [divmod(index, len(seconds)) for index in chosen]
    names = [f"{firsts[first]} {seconds[second]}" for first, second in pairs]
    return tuple(Fact(name, rng.choice(RELATIONS), rng.choice(ANSWERS)) for name in names)


def make_document(seed: int, num_tokens: int, num_facts: int, *, crowded: bool = False) -> Document:
    """The chronicle with this seed: at most `num_tokens` tokens, seldom 20 fewer, facts spread evenly at random.

    `crowded` makes the names hard to tell apart, see `make_facts`.
    Raises ValueError where the facts do not fit with a few sentences around them.
    """
    rng = random.Random(seed)
    room = num_tokens - num_facts * FACT_TOKENS
    if num_facts < 0 or room < 20:
        raise ValueError(f"{num_facts} facts do not fit in {num_tokens} tokens: allow {FACT_TOKENS} each and 20 more")
    facts = make_facts(rng, num_facts, crowded)
    paragraphs = make_paragraphs(rng, room)
    order = plant(rng, paragraphs, [fact.sentence for fact in facts])
    return Document(join(paragraphs), tuple(facts[number] for number in order))


def plant(rng: random.Random, paragraphs: list[list[str]], sentences: list[str]) -> list[int]:
    """Puts `sentences` into paragraphs, anywhere with equal chance; gives their indices as they then follow."""
    # A planted sentence follows another one; gaps are drawn evenly.
    ends = [(index, position) for index, known in enumerate(paragraphs) for position in range(len(known))]
    ends = [end for end in ends if not (len(paragraphs[end[0]]) == 1 and paragraphs[end[0]][0] in HEADINGS)]
    gaps = sorted((rng.choice(ends), number) for number in range(len(sentences)))
    for (index, position), number in reversed(gaps):
        paragraphs[index].insert(position + 1, sentences[number])
    return [number for _, number in gaps]


def join(paragraphs: list[list[str]]) -> str:
    """The text of paragraphs of sentences."""
    return "\n\n".join(" ".join(sentences) for sentences in paragraphs)


def make_paragraphs(rng: random.Random, room: int, count_tokens=count_tokens) -> list[list[str]]:
    """Paragraphs of sentences, with a heading now and then, of at most `room` tokens together as counted."""
    paragraphs: list[list[str]] = []
    until_heading = rng.randint(0, 6)
    while True:
        until_heading -= 1
        if until_heading < 0 and room > 60:
            heading, until_heading = rng.choice(HEADINGS), rng.randint(5, 9)
            paragraphs.append([heading])
            room -= count_tokens(heading) + 2
        opener = _expand(rng, OPENERS)
        if count_tokens(opener) > room:
            if paragraphs and paragraphs[-1][0] in HEADINGS:
                paragraphs.pop()
            return paragraphs
        sentences = [opener]
        room -= count_tokens(opener) + 2  # the empty line after the paragraph
        paragraphs.append(sentences)
        for _ in range(rng.randint(3, 7)):
            sentence = _expand(rng, SENTENCES)
            if count_tokens(sentence) > room + 2:
                return paragraphs
            sentences.append(sentence)
            room -= count_tokens(sentence)


def _expand(rng: random.Random, templates: tuple[str, ...]) -> str:
    sentence = _SLOT.sub(lambda slot: rng.choice(SLOTS[slot[1]]), rng.choice(templates))
    return sentence[0].upper() + sentence[1:]
