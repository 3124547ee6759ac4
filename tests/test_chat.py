"""Prompts cut in two: both halves' ids are the whole prompt's, for every make of tokenizer and template."""

import pytest
from chat_models import CHATML, CONTEXT, KINDS, TEMPLATES, make_tokenizer

from squeezejax.chat import prompts as chat
from squeezejax.chat.prompts import assistant, user
from squeezejax.models import embedded

QUESTIONS = ("What is the passcode of Amber Falcon?", "7 sacks?", "“Quoted”…", "何ですか 🙂", "'s", "a\n\nb", "(why)")
CONTEXTS = {
    "sentence": CONTEXT,
    "no full stop": CONTEXT[:-1],
    "line break": CONTEXT + "\n",
    "spaces": "  " + CONTEXT + "  ",
    "number": CONTEXT + " 12",
    "not English": CONTEXT + " 港は静かだった🙂",
    "short": "Hi.",
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=TEMPLATES)
def tokenizer(request, kind):
    return make_tokenizer(kind, TEMPLATES[request.param], add_bos=request.param == "plain")


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_both_parts_are_the_whole_prompt(tokenizer, context):
    head, prompt = chat.split_prompt(tokenizer, context)
    for question in QUESTIONS:
        whole = chat.whole_prompt_ids(tokenizer, [user(context + "\n\n" + question)])
        assert head + chat.question_ids(tokenizer, prompt, question) == whole
    assert len(chat.question_ids(tokenizer, prompt, "Why?")) < 80  # the context is in the head


@pytest.mark.parametrize("more", CONTEXTS.values(), ids=CONTEXTS)
def test_an_extended_context_is_the_whole_prompt(tokenizer, more):
    """Twice appended to, as if all three texts had been one."""
    head, prompt = chat.split_prompt(tokenizer, CONTEXT)
    for _ in range(2):
        added, prompt = chat.extend_prompt(tokenizer, prompt, more)
        assert added
        head = head + added
    for question in QUESTIONS:
        whole = chat.whole_prompt_ids(tokenizer, [user("\n\n".join([CONTEXT, more, more, question]))])
        assert head + chat.question_ids(tokenizer, prompt, question) == whole


def test_later_turns_are_the_whole_conversation(tokenizer):
    head, prompt = chat.split_prompt(tokenizer, CONTEXT)
    turns = [("Who?", " Anna."), ("What is the passcode?", "It is violet.\n"), ("Why 7?", "<think>Hm</think>No.")]
    messages = [user(f"{CONTEXT}\n\nWho?"), assistant("Anna.")]
    for number, (_, reply) in enumerate(turns[1:], 1):
        question = turns[number][0]
        whole = chat.whole_prompt_ids(tokenizer, [*messages, user(question)])
        assert head + chat.conversation_ids(tokenizer, prompt, turns[:number], question) == whole
        messages += [user(question), assistant(reply.strip())]


def test_notes_bring_the_prompt_back(tokenizer):
    _, prompt = chat.split_prompt(tokenizer, CONTEXT)
    assert chat.Prompt.from_notes({"model": "m", **prompt.to_notes()}) == prompt


def test_embedded_tokenizer():
    tokenizer = chat.load_tokenizer(embedded.__path__[0])
    head, prompt = chat.split_prompt(tokenizer, CONTEXT)
    assert chat.decode(tokenizer, head).endswith("in spring.")
    assert (prompt.rest, prompt.suffix) == ("", "\nAnswer:")
    whole = f"<bos>{CONTEXT}\n\nWhy?\nAnswer: So.<eos>\nHow?\nAnswer:"
    ids = chat.conversation_ids(tokenizer, prompt, [("Why?", " So.")], "How?")
    assert head + ids == chat.encode(tokenizer, whole)


def test_full_stop_that_joins_line_breaks_stays_with_the_question():
    _, prompt = chat.split_prompt(make_tokenizer("llama3", CHATML), CONTEXT)
    assert prompt.rest == "."


def test_plain_prompt():
    tokenizer = make_tokenizer("gpt2", None, add_bos=True)
    head, prompt = chat.split_prompt(tokenizer, CONTEXT)
    assert tokenizer.decode(head + chat.question_ids(tokenizer, prompt, " Why? ")) == f"<bos>{CONTEXT}\n\nWhy?\n"
    assert make_tokenizer("gpt2", None)("x")["input_ids"][0] != tokenizer.bos_token_id
    assert chat.split_prompt(make_tokenizer("gpt2", None), CONTEXT)[0] == head[1:]


REFUSED = {
    "upper case": ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "as it is, exactly once"),
    "twice": ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "as it is, exactly once"),
    "raises": ("{{ raise_exception('only with a system prompt') }}", "only with a system prompt"),
    "broken": ("{% for %}", "cannot render"),
}


@pytest.mark.parametrize(("template", "sentence"), REFUSED.values(), ids=REFUSED)
def test_templates_that_cannot_be_cut(template, sentence):
    with pytest.raises(ValueError, match=sentence):
        chat.split_prompt(make_tokenizer("gpt2", template), CONTEXT)


CANNOT_GO_ON = {
    "only the latest message": ("{{ messages[-1]['content'] + '<eos>' }}", "rewrites the beginning"),
    "counts": ("{{ messages | length }}{{ ': ' + messages[0]['content'] }}", "rewrites the beginning"),
    "one turn only": (
        "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}"
        "{{ messages[0]['content'] + '<eos>' }}",
        "one message only",
    ),
}


@pytest.mark.parametrize(("template", "sentence"), CANNOT_GO_ON.values(), ids=CANNOT_GO_ON)
def test_templates_that_cannot_go_on(template, sentence):
    tokenizer = make_tokenizer("gpt2", template)
    _, prompt = chat.split_prompt(tokenizer, CONTEXT)
    assert chat.conversation_ids(tokenizer, prompt, [], "Why?")
    with pytest.raises(ValueError, match=sentence):
        chat.conversation_ids(tokenizer, prompt, [("Why?", "So.")], "How?")


def test_another_template_than_the_one_that_built():
    tokenizer = make_tokenizer("gpt2", CHATML)
    _, prompt = chat.split_prompt(tokenizer, CONTEXT)
    tokenizer.chat_template = TEMPLATES["headers"]
    with pytest.raises(ValueError, match="not the one with which"):
        chat.conversation_ids(tokenizer, prompt, [("Why?", "So.")], "How?")


@pytest.mark.parametrize(
    ("question", "sentence"), [("", "is empty"), (" \n", "is empty"), ("what\udcff", "is not UTF-8 text")]
)
def test_questions_without_text(question, sentence):
    tokenizer = make_tokenizer("gpt2", CHATML)
    _, prompt = chat.split_prompt(tokenizer, CONTEXT)
    for turns in ([], [("Why?", "So.")]):
        with pytest.raises(ValueError, match=f"the question {sentence}"):
            chat.conversation_ids(tokenizer, prompt, turns, question)


def test_context_without_a_place_to_cut():
    with pytest.raises(ValueError, match="cannot be cut"):
        chat.split_prompt(_OneToken(), "x" * 50)


class _OneToken:
    """A tokenizer that makes one token of everything."""

    chat_template, bos_token_id = None, None

    def __call__(self, text, **_):
        return {"input_ids": [hash(text)] if text else []}


@pytest.mark.parametrize("text", ["The miller's dog, in “long” frost: 港は静か🙂 and on.", "🙂🙂", "plain words"])
def test_streamed_text_is_the_whole_text(kind, text):
    tokenizer = make_tokenizer(kind, None)
    ids = chat.encode(tokenizer, text)
    if kind == "metaspace" and tokenizer.decode(ids) != text:
        pytest.skip("this tokenizer has no bytes to fall back to")
    stream = chat.Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == chat.decode(tokenizer, ids) == text


def test_streamed_text_with_special_and_broken_tokens():
    tokenizer = make_tokenizer("gpt2", CHATML)
    smile = chat.encode(tokenizer, "🙂")
    stream = chat.Detokenizer(tokenizer)
    ids = [*chat.encode(tokenizer, "so"), *smile[:2], *chat.encode(tokenizer, " on"), *smile[:1]]
    assert "".join(stream.push(token) for token in ids) == "so� on"
    assert stream.push(tokenizer.eos_token_id) == ""
    assert stream.flush() == "�"


def test_directories_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model directory"):
        chat.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        chat.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="its tokenizer cannot be read"):
        chat.load_tokenizer(tmp_path)
