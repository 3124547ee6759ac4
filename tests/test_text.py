"""Text in, text out: documents, replies in pieces, conversations, stop strings; the command line does the same."""

import dataclasses
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from chat_models import CHATML, CONTEXT, TEMPLATES, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch_models import make_model

import squeezejax
from squeezejax import SqueezeConfig, models, text
from squeezejax.chat import prompts
from squeezejax.chat.prompts import assistant, user
from squeezejax.chat.stops import StopStrings
from squeezejax.command_line import cli
from squeezejax.storage import files as storage

QUESTION = "What is the passcode of Amber Falcon?"
CONFIG = SqueezeConfig.paper(observation_window=8, cluster_fractions=(0.05, 0.2))
EVERY_KEY = text.Options(max_new_tokens=10, sparsity=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a ChatML tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = make_tokenizer("llama3", CHATML)
    tokenizer.save_pretrained(folder / "model")
    _model(len(tokenizer)).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(CONTEXT + "\n", encoding="utf-8")
    return folder


def _model(vocab_size):
    return make_model("llama", vocab_size=vocab_size, max_position_embeddings=2048, eos_token_id=1)


@pytest.fixture(scope="module")
def params(folder):
    return models.load(folder / "model")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return text.load_tokenizer(folder / "model")


@pytest.fixture(scope="module")
def document(params, tokenizer):
    return text.build(params, tokenizer, f"  {CONTEXT}\n", CONFIG)


def _reference(tokenizer, messages, count):
    """The ids of transformers' own model's reply, given the whole conversation."""
    ids = prompts.whole_prompt_ids(tokenizer, messages)
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 1}
    made = _model(len(tokenizer)).generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
    return made[0, len(ids) :].tolist()


# ---- Asking


def test_a_reply_comes_in_pieces_and_ends_with_a_record(params, tokenizer, document):
    """At sparsity 0 it is the reply of transformers' model to the whole prompt."""
    reply = text.ask(params, tokenizer, document, f" {QUESTION} ", EVERY_KEY)
    first = next(reply)
    assert reply.said() == first
    pieces = [first, *reply]
    assert len(pieces) > 3
    expected = _reference(tokenizer, [user(f"{CONTEXT}\n\n{QUESTION}")], 10)
    record = reply.record
    assert list(record.tokens) == expected
    assert "".join(pieces) == record.text == reply.text == prompts.decode(tokenizer, expected).lstrip()
    assert list(record.question) == prompts.question_ids(tokenizer, document.prompt, QUESTION)
    assert (record.ended_by, record.kept_fraction, record.prefill_kept_fraction) == ("length", 1.0, 1.0)
    assert record.seconds > 0
    assert "10 tokens in" in str(record)


def test_dense_is_sparsity_0(params, tokenizer, document):
    dense = dataclasses.replace(EVERY_KEY, sparsity=None, dense=True)
    records = [text.ask(params, tokenizer, document, QUESTION, options).record for options in (EVERY_KEY, dense)]
    assert records[0].tokens == records[1].tokens
    assert [record.dense_because for record in records] == ["sparsity 0 was asked for", "dense attention was asked for"]
    squeezed = text.ask(params, tokenizer, document, QUESTION, text.Options(max_new_tokens=4)).record
    assert squeezed.dense_because is None
    assert 0 < squeezed.kept_fraction < 1
    generated = squeezejax.generate(params, document.tree, squeezed.question, max_new_tokens=4)
    assert list(squeezed.tokens) == np.asarray(generated.tokens[0]).tolist()
    np.testing.assert_allclose(squeezed.kept_fraction, generated.kept_fraction[0], rtol=1e-5)


def test_the_models_stop_tokens_end_a_reply(params, tokenizer, document):
    free = text.ask(params, tokenizer, document, QUESTION, EVERY_KEY).record.tokens
    options = dataclasses.replace(EVERY_KEY, stop_tokens=(free[2],))
    record = text.ask(params, tokenizer, document, QUESTION, options).record
    assert record.tokens == free[: free.index(free[2]) + 1]
    assert record.ended_by == "stop token"
    ending = dataclasses.replace(params.config, stop_tokens=(free[2],))
    assert free[2] in prompts.stop_tokens(tokenizer, ending)
    assert prompts.stop_tokens(tokenizer, object()) == (tokenizer.eos_token_id,)  # a model that knows none


def test_seeds_repeat(params, tokenizer, document):
    ask = lambda seed: (
        text.ask(
            params, tokenizer, document, QUESTION, text.Options(max_new_tokens=8, temperature=2.0, top_k=50, seed=seed)
        ).record.tokens
    )
    assert ask(0) == ask(0) != ask(1)


def test_repetition_is_penalised_as_by_generate(params, tokenizer, document, folder, capsys):
    options = dataclasses.replace(EVERY_KEY, repetition_penalty=3.0)
    record = text.ask(params, tokenizer, document, QUESTION, options).record
    assert record.tokens != text.ask(params, tokenizer, document, QUESTION, EVERY_KEY).record.tokens
    same = {"max_new_tokens": 10, "sparsity": 0.0, "repetition_penalty": 3.0}
    generated = squeezejax.generate(params, document.tree, record.question, **same)
    assert list(record.tokens) == np.asarray(generated.tokens[0]).tolist()
    text.save(folder / "penalty.tree", document)
    ask = f"ask --tree {folder}/penalty.tree --model {folder}/model --max-new-tokens 10 --sparsity 0"
    assert cli.main([*ask.split(), "--repetition-penalty", "3", QUESTION]) == 0
    assert capsys.readouterr().out == record.text + "\n"


def test_a_chat_sees_earlier_turns(params, tokenizer, document):
    chat = text.Chat(params, tokenizer, document, EVERY_KEY)
    messages = [user(f"{CONTEXT}\n\n{QUESTION}")]
    for question in (QUESTION, "Why 7?", "How many?"):
        if question != QUESTION:
            messages.append(user(question))
        reply = chat.ask(question)
        reply.rehearse()
        assert list(reply.record.tokens) == _reference(tokenizer, messages, 10)
        messages.append(assistant(reply.text.strip()))
    assert [question for question, _ in chat.turns] == [QUESTION, "Why 7?", "How many?"]
    assert chat.turns[-1][1] == reply.text


def test_a_turn_that_was_broken_off_counts_as_far_as_it_came(params, tokenizer, document):
    chat = text.Chat(params, tokenizer, document, EVERY_KEY)
    first = chat.ask(QUESTION)
    said = next(first) + next(first)
    second = chat.ask("Why 7?")
    messages = [user(f"{CONTEXT}\n\n{QUESTION}"), assistant(said.strip()), user("Why 7?")]
    assert list(second.record.tokens) == _reference(tokenizer, messages, 10)
    assert list(first) == []
    with pytest.raises(RuntimeError, match="broken off"):
        _ = first.record


# ---- Files: the command line's and ours are the same


def test_files_are_those_of_the_command_line(folder, params, tokenizer, document, capsys):
    files = f"--model {folder}/model --context {folder}/text.txt --out {folder}/theirs.tree --quiet"
    assert cli.main(["build", *files.split(), "--paper", "--window", "8", "--cluster-fractions", "0.05,0.2"]) == 0
    text.save(folder / "ours.tree", document, {"context": f"{folder}/text.txt"})
    theirs, ours = (text.load(folder / name, params) for name in ("theirs.tree", "ours.tree"))
    assert theirs.prompt == ours.prompt == document.prompt
    assert ours.notes == {"context": f"{folder}/text.txt"}
    assert theirs.notes["model"] == f"{folder}/model"
    headers = [storage.read_header(folder / name) for name in ("theirs.tree", "ours.tree")]
    assert headers[0].context_hash == headers[1].context_hash
    assert headers[0].tensors == headers[1].tensors  # checksums, too
    capsys.readouterr()
    for name in ("theirs.tree", "ours.tree"):
        ask = f"ask --tree {folder}/{name} --model {folder}/model --max-new-tokens 10 --sparsity 0"
        assert cli.main([*ask.split(), QUESTION]) == 0
        assert capsys.readouterr().out == text.ask(params, tokenizer, theirs, QUESTION, EVERY_KEY).text + "\n"
    text.save(folder / "again.tree", theirs)
    assert (folder / "again.tree").read_bytes() == (folder / "theirs.tree").read_bytes()


def test_append_is_the_command_lines(folder, params, tokenizer, document, capsys):
    more = "In summer the miller's dog slept under the cart. The passcode of Silver Heron is indigo."
    (folder / "more.txt").write_text(more + "\n")
    text.save(folder / "short.tree", document, {"context": "a.txt"})
    files = f"--model {folder}/model --context {folder}/more.txt --out {folder}/longer.tree"
    assert cli.main(["append", "--tree", f"{folder}/short.tree", *files.split(), "--quiet"]) == 0
    theirs, ours = text.load(folder / "longer.tree", params), text.append(params, tokenizer, document, more)
    assert theirs.prompt == ours.prompt
    np.testing.assert_array_equal(theirs.tree.context_hash, ours.tree.context_hash)
    np.testing.assert_array_equal(theirs.tree.keys, ours.tree.keys)
    record = text.ask(params, tokenizer, ours, QUESTION, EVERY_KEY).record
    assert list(record.tokens) == _reference(tokenizer, [user(f"{CONTEXT}\n\n{more}\n\n{QUESTION}")], 10)
    tokens = text.prepare(tokenizer, more, after=document).tokens
    assert tokens == text.prepare(tokenizer, more, after=document.prompt).tokens
    assert text.append(params, tokenizer, document, text.prepare(tokenizer, more, after=document)).prompt == ours.prompt


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_squeezes_the_whole_prompts_beginning(template):
    tokenizer = make_tokenizer("gpt2", TEMPLATES[template], add_bos=template == "plain")
    prepared = text.prepare(tokenizer, f"\n{CONTEXT} ")
    whole = prompts.whole_prompt_ids(tokenizer, [user(f"{CONTEXT}\n\n{QUESTION}")])
    assert prepared.tokens + prompts.question_ids(tokenizer, prepared.prompt, QUESTION) == whole


def test_finished_documents_can_be_saved_before_the_checkpoint_goes(params, tokenizer, tmp_path):
    found = []

    def finished(document):
        assert (tmp_path / "unfinished").is_dir()
        found.append(document)

    made = text.build(params, tokenizer, CONTEXT, CONFIG, checkpoint=tmp_path / "unfinished", finished=finished)
    assert found[0].prompt == made.prompt
    assert not (tmp_path / "unfinished").exists()


def test_wrong_arguments(params, tokenizer, document, tmp_path):
    with pytest.raises(ValueError, match="the text is empty"):
        text.build(params, tokenizer, " \n")
    with pytest.raises(ValueError, match="the question is empty"):
        text.ask(params, tokenizer, document, " ")
    with pytest.raises(ValueError, match="stop must be strings that are not empty"):
        text.Options(stop=("a", ""))
    with pytest.raises(ValueError, match="dense=True reads every key"):
        text.Options(dense=True, sparsity=0.5)
    assert text.Options(stop="end").stop == ("end",)
    squeezejax.save(tmp_path / "bare.tree", document.tree)
    with pytest.raises(ValueError, match="no notes on its prompt"):
        text.load(tmp_path / "bare.tree", params)


def test_the_example_in_the_readme(folder, params, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    example = readme.split("<!-- tests/test_text.py runs this -->")[1].split("```python")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Path("essay.txt").write_text(CONTEXT * 3, encoding="utf-8")
    exec(example.replace("64", "6"), {"path": folder / "model", "params": params})
    assert "6 tokens in" in capsys.readouterr().out
    assert text.load("essay.tree", params).prompt.template == "chat"


def test_the_first_lines_in_the_readme_compile_once(folder, tmp_path, monkeypatch, capsys):
    """Another document and other questions and lengths of answers: what is large is compiled for the first alone."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    example = readme.split("## In your code")[1].split("```python")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    document = CONTEXT * 3
    run = lambda code: exec(code, {"path": folder / "model", "document": document})
    run(example)
    document = document[:-20]
    with oracle.count_compilations() as compiled:
        run(example)
        run(example.replace("Who signed it?", "Who signed it, and when was that?").replace("64", "48"))
    assert capsys.readouterr().out.count("of the keys read") == 3
    large = {"_prefill_chunk", "build_layer", "_count_layer", "_prefill_and_decode", "_prefill", "_decode"}
    assert not large & {name.removeprefix("jit(").removesuffix(")") for name in compiled}


# ---- Stop strings


@pytest.mark.parametrize(
    ("strings", "pieces", "shown", "found"),
    [
        (("END",), ["a E", "N", "D b"], ["a ", "", ""], "END"),
        (("END",), ["a E", "NE", "ND", "x"], ["a ", "EN", "", ""], "END"),  # a false start
        (("END",), ["a EN"], ["a "], None),
        (("\n\n", "Q:"), ["x\n", "Q", ":"], ["x", "\n", ""], "Q:"),
        (("abc", "b"), ["abc"], ["a"], "b"),  # complete first
        (("b", "ab"), ["xab"], ["x"], "ab"),  # both at once: the longest
        (("🙂é",), ["so 🙂", "è 🙂", "é!"], ["so ", "🙂è ", ""], "🙂é"),
        (("aab",), ["aaa", "b"], ["a", ""], "aab"),
        ((), ["all", " of it"], ["all", " of it"], None),
    ],
)
def test_stop_strings_by_hand(strings, pieces, shown, found):
    stops = StopStrings(strings)
    assert [stops.push(piece) for piece in pieces] == shown
    assert stops.found == found
    whole = "".join(pieces)
    assert "".join(shown) + stops.flush() == (whole if found is None else whole[: whole.index(found)])


@given(st.text("ab🙂", max_size=30), st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_do_not_depend_on_the_pieces(whole, strings, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    # One character at a time: the text ends where one of the strings is complete for the first time.
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(string) for string in strings)]
    expected = whole
    if ends:
        expected = min((whole[: ends[0]].removesuffix(string) for string in strings), key=len)
    stops, said = StopStrings(strings), ""
    for piece in pieces:
        said += stops.push(piece)
        assert expected.startswith(said)
    assert said + stops.flush() == expected
    assert (stops.found is not None) == bool(ends)


def test_a_reply_ends_before_a_stop_string(params, tokenizer, document, folder, capsys):
    """Wherever the string lies between tokens; its tokens are in the record, its text never came."""
    free = text.ask(params, tokenizer, document, QUESTION, EVERY_KEY)
    whole = free.text
    text.save(folder / "stop.tree", document)
    for start in range(1, len(whole) - 3):
        stop = whole[start : start + 3]
        expected = whole[: whole.index(stop)]
        options = dataclasses.replace(EVERY_KEY, stop=("never said", stop))
        reply = text.ask(params, tokenizer, document, QUESTION, options)
        said = ""
        for piece in reply:
            said += piece
            assert expected.startswith(said)
        record = reply.record
        assert said == record.text == expected
        assert record.ended_by == stop
        assert record.tokens == free.record.tokens[: len(record.tokens)]
    ask = f"ask --tree {folder}/stop.tree --model {folder}/model --max-new-tokens 10 --sparsity 0"
    assert cli.main([*ask.split(), "--stop", "never said", "--stop", stop, QUESTION]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert cli.main([*ask.split(), "--stop", "", QUESTION]) == cli.BAD_INPUT
    assert "stop must be strings that are not empty" in capsys.readouterr().err


def test_a_chat_goes_on_after_a_stop_string(params, tokenizer, document):
    whole = text.ask(params, tokenizer, document, QUESTION, EVERY_KEY).text
    stop = whole[4:7]
    chat = text.Chat(params, tokenizer, document, dataclasses.replace(EVERY_KEY, stop=stop))
    first = chat.ask(QUESTION).text
    assert first == whole[: whole.index(stop)]
    messages = [user(f"{CONTEXT}\n\n{QUESTION}"), assistant(first.strip()), user("Why 7?")]
    expected = prompts.decode(tokenizer, _reference(tokenizer, messages, 10)).lstrip()
    assert chat.ask("Why 7?").text == expected.split(stop)[0]
