"""The suite of tasks: what a question asks for is in its context, just as often as it should be."""

import collections
import random
import re

import pytest

from benchmarks.embedded import batches
from benchmarks.quality import tasks, train
from squeezejax.models import embedded
from squeezejax.models.embedded import text


@pytest.fixture(scope="module")
def encoder():
    return batches.Encoder(embedded.PATH)


def parts(question):
    """What a question's reply has to find."""
    return [question.reply[start:end] for start, end in question.answers]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_samples_repeat_by_seed_and_keep_to_their_length(encoder, task):
    sample = tasks.make_sample(task, 3, 700)
    assert sample == tasks.make_sample(task, 3, 700)
    assert sample.context != tasks.make_sample(task, 4, 700).context
    assert sample.context != tasks.make_sample(task, 3, 700, split="train").context
    assert len(sample.questions) == 8
    assert 540 < len(encoder.ids(sample.context)) <= 701  # the first word has no space before it: maybe two tokens
    assert len({question.text for question in sample.questions}) == 8
    # Another tokenizer, another length of text: the same number of its tokens.
    by_letters = tasks.make_sample(task, 3, 2400, count_tokens=len)
    assert 1400 < len(by_letters.context) <= 2400


@pytest.mark.parametrize("task", ["single", "multi_key", "facts"])
def test_one_needle_holds_the_answer(task):
    sample = tasks.make_sample(task, 0, 900)
    for question in sample.questions:
        name = re.fullmatch(r"What is the \w+ of (\w+ \w+)\?", question.text)[1]
        assert sample.context.count(name) == 1
        assert question.reply in sample.context
        assert question.reply.endswith(f" is {parts(question)[0]}.")


def test_multi_key_has_names_that_share_their_words():
    context = tasks.make_sample("multi_key", 0, 900).context
    names = re.findall(r"The \w+ of (\w+) (\w+) is", context)
    assert len(names) == 18
    assert all(len(set(words)) <= 10 for words in zip(*names, strict=True))


def test_multi_value_lists_every_value_in_the_order_of_the_text():
    sample = tasks.make_sample("multi_value", 1, 900)
    for question in sample.questions:
        relation, name = re.fullmatch(r"What are the 3 (\w+)s of (\w+ \w+)\?", question.text).groups()
        assert parts(question) == re.findall(rf"The {relation} of {name} is (\w+)\.", sample.context)
        assert len(set(parts(question))) == 3


def test_multi_query_asks_for_two_needles():
    sample = tasks.make_sample("multi_query", 1, 900)
    for question in sample.questions:
        one, other = question.reply.split(". ")
        assert one + "." in sample.context
        assert other in sample.context
        assert len(parts(question)) == 2


def test_variables_follow_a_chain_to_its_value():
    sample = tasks.make_sample("variables", 1, 900)
    stated = dict(re.findall(r"The (\w+ of \w+ \w+) is (\w+ \w+'s|\w+)\.", sample.context))
    for question in sample.questions:
        relation, name = question.text.removeprefix("What is the ").removesuffix("?").split(" of ")
        found = []
        for _ in range(tasks.HOPS):
            name = stated[f"{relation} of {name}"].removesuffix("'s")
            found.append(name)
        value = stated[f"{relation} of {name}"]
        assert parts(question) == [*found, value]
        assert value in text.ANSWERS


def test_common_words_are_ten_times_as_common():
    sample = tasks.make_sample("common_words", 1, 900)
    words = sample.context.split()
    for question in sample.questions:
        of_class = tasks.CLASSES[question.text.split()[1]]
        (word, most), (_, next_most) = collections.Counter(w for w in words if w in of_class).most_common(2)
        assert parts(question) == [word]
        assert most == 10 * next_most


def test_frequent_words_are_what_a_person_wrote_most():
    sample = tasks.make_sample("frequent_words", 1, 900)
    for question in sample.questions:
        person = question.text.split()[2]
        counts = collections.Counter(re.findall(rf"{person} wrote (\w+)\.", sample.context)).most_common(2)
        assert parts(question) == [counts[0][0]]
        assert counts[0][1] > 3 * counts[1][1]  # 1 to 1/4, and what rounding leaves over goes to the first


def test_no_name_is_in_both_splits():
    found = {}
    for split in tasks.SPLITS:
        contexts = [tasks.make_sample("multi_key", seed, 2000, split=split).context for seed in range(30)]
        found[split] = {name for context in contexts for name in re.findall(r"of ([A-Z]\w+ [A-Z]\w+) is", context)}
    assert all(len(names) > 500 for names in found.values())
    assert not found["train"] & found["test"]


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="task must be one of"):
        tasks.make_sample("chess", 0, 900)
    with pytest.raises(ValueError, match="do not fit"):
        tasks.make_sample("single", 0, 60)
    with pytest.raises(ValueError, match="need a context"):
        tasks.make_sample("common_words", 0, 60)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_turns_are_the_format_of_the_embedded_model(encoder, task):
    question = tasks.make_sample(task, 5, 900).questions[2]
    turn = tasks.encode_turn(encoder.tokenizer, question, encoder.eos)
    assert encoder.tokenizer.decode(turn.question) == f"\n\n{question.text}\nAnswer:"
    assert encoder.tokenizer.decode(turn.reply[:-1]) == f" {question.reply}"
    assert turn.reply[-1] == encoder.eos
    flagged = [token for token, found in zip(turn.reply, turn.answers, strict=True) if found]
    assert encoder.tokenizer.decode(flagged).split() == " ".join(parts(question)).split()


def test_several_values_of_a_name_are_right_in_any_order(encoder):
    question = tasks.make_sample("multi_value", 5, 900).questions[2]
    turn = tasks.encode_turn(encoder.tokenizer, question, encoder.eos)
    places = [i for i in range(len(turn.reply)) if turn.answers[i]]
    values = [turn.reply[i] for i in places]
    assert len(values) == tasks.VALUES  # a token each
    assert [turn.accepted[i] for i in places] == [values[number:] for number in range(tasks.VALUES)]
    others = [i for i in range(len(turn.reply)) if i not in places]
    assert all(turn.accepted[i] == [turn.reply[i]] for i in others)


def test_training_batches_hold_every_kind_and_fit(encoder):
    shape = train.Shape(500, 9, 3)
    batch = train.make_batch(encoder, shape, 7)
    again = train.make_batch(encoder, shape, 7)
    assert (batch.tokens == again.tokens).all()
    assert (batch.tokens != train.make_batch(encoder, shape, 8).tokens).any()
    assert batch.answers.any(axis=1).all()
    assert (batch.weights[batch.answers] == train.ANSWER_WEIGHT).all()
    for phase in train.PHASES:
        kind = random.Random(0).choice(train.KINDS)
        assert len(train.sequence(encoder, phase.shape, kind, 11)[0]) <= phase.shape.length
