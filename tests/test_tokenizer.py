"""Tokenizers read without transformers give what transformers gives; what is not plain is left to it."""

import json
import subprocess
import sys

import pytest
from chat_models import CHATML, CONTEXT, KINDS, TEMPLATES, make_tokenizer
from transformers import AutoTokenizer

from squeezejax.chat import prompts
from squeezejax.chat.prompts import assistant, user
from squeezejax.chat.tokenizer import PlainTokenizer, load_tokenizer
from squeezejax.models import embedded

TEXTS = (CONTEXT, "", "<bos>a<|im_end|> b", "何ですか 🙂 é", "  two  spaces\n\n\n", "x" * 50)
CONVERSATION = [user("Who? é"), assistant(" Anna.\n"), user("Why < 7 & so on?")]


def write(folder, kind="gpt2", template=CHATML, model="llama", add_bos=False, **changes):
    """A checkpoint directory without weights; `changes` of tokenizer_config.json."""
    make_tokenizer(kind, template, add_bos=add_bos).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model}))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def check_same(folder, plain):
    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(plain, PlainTokenizer)
    for text in TEXTS:
        ids = plain(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        assert prompts.encode(plain, text) == prompts.encode(theirs, text)
        assert prompts.decode(plain, ids) == prompts.decode(theirs, ids)
        assert plain.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert [*map(plain.convert_ids_to_tokens, ids)] == theirs.convert_ids_to_tokens(ids)
    for messages in (CONVERSATION[:1], CONVERSATION):
        assert prompts.render(plain, messages) == prompts.render(theirs, messages)
    for name in ("chat_template", "bos_token", "eos_token", "bos_token_id", "eos_token_id"):
        assert getattr(plain, name) == getattr(theirs, name)
    special = lambda tokenizer: {i: token.special for i, token in tokenizer.added_tokens_decoder.items()}
    assert special(plain) == special(theirs)
    assert len(plain) == len(theirs)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_directories_are_read_as_by_transformers(tmp_path, kind, template):
    folder = write(tmp_path, kind, TEMPLATES[template], add_bos=template == "plain")
    check_same(folder, load_tokenizer(folder))


def test_the_embedded_tokenizer():
    check_same(embedded.PATH, load_tokenizer(embedded.PATH))


@pytest.mark.parametrize("where", ["its settings", "a file", "both"])
def test_templates_are_found(tmp_path, where):
    """What is in chat_template.jinja goes before what tokenizer_config.json says."""
    folder = write(tmp_path, **({} if where == "a file" else {"chat_template": TEMPLATES["headers"]}))
    if where == "its settings":
        (folder / "chat_template.jinja").unlink()
    plain = load_tokenizer(folder)
    assert plain.chat_template == (TEMPLATES["headers"] if where == "its settings" else CHATML)
    check_same(folder, plain)


def test_templates_see_what_they_expect(tmp_path):
    template = (
        "{%- for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n    {{ m | tojson }}{% endfor %}\n"
        "{% if tools is none and not documents %}{{ strftime_now('%Y')[:2] }}{% endif %}{{ eos_token + unk_token }}"
    )
    folder = write(tmp_path, template=template, unk_token="<|eot|>")
    check_same(folder, load_tokenizer(folder))


NOT_PLAIN = {
    "a class with ideas of its own": {"tokenizer_class": "GPT2Tokenizer"},
    "an option": {"add_prefix_space": True},
    "a beginning of sequence": {"add_bos_token": True},
    "a token of its own": {"bos_token": "<new>"},
    "another flag of a token": {"added_tokens_decoder": {"0": {"content": "<bos>", "lstrip": True}}},
    "several templates": {"chat_template": [{"name": "default", "template": CHATML}]},
    "a tag of transformers'": {"chat_template": "{% generation %}{% endgeneration %}"},
}


@pytest.mark.parametrize("changes", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_is_left_to_transformers(tmp_path, changes):
    folder = write(tmp_path, **changes)
    if "chat_template" in changes:
        (folder / "chat_template.jinja").unlink()
    assert not isinstance(load_tokenizer(folder), PlainTokenizer)


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json", "a family", "no config.json"])
def test_files_that_only_transformers_understands(tmp_path, name):
    folder = write(tmp_path, model="mistral" if name == "a family" else "llama")
    if name.startswith("no "):
        (folder / "config.json").unlink()
    elif name.endswith(".json"):
        (folder / name).write_text("{}")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert "added_tokens_decoder" not in settings
    assert not isinstance(load_tokenizer(folder), PlainTokenizer)


def test_transformers_is_not_imported(tmp_path):
    write(tmp_path)
    look = f"import sys; from squeezejax.chat.prompts import load_tokenizer as load, split_prompt as cut; \
cut(load({str(tmp_path)!r}), {CONTEXT!r}); print({{'transformers', 'torch'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "set()\n", done.stderr
