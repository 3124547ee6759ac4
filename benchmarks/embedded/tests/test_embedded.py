"""The embedded model: its text, its tokenizer, its training, and what the committed weights can do."""

import dataclasses
import random

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.embedded import batches, evaluate, export, tokenizer, train
from squeezejax import models
from squeezejax.models import embedded
from squeezejax.models.embedded import text


@pytest.fixture(scope="module")
def encoder():
    return batches.Encoder(embedded.PATH)


@pytest.fixture(scope="module")
def hf_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(embedded.PATH)


@pytest.fixture(scope="module")
def params():
    return models.load(embedded.PATH)


@pytest.mark.parametrize("crowded", [False, True])
def test_documents_are_deterministic_and_state_their_facts(crowded):
    document = text.make_document(7, 900, 20, crowded=crowded)
    assert document == text.make_document(7, 900, 20, crowded=crowded)
    assert document != text.make_document(8, 900, 20, crowded=crowded)
    assert len({fact.name for fact in document.facts}) == 20
    places = [document.text.index(fact.sentence) for fact in document.facts]
    assert places == sorted(places)
    assert all(document.text.count(fact.name) == 1 for fact in document.facts)
    assert places[0] < len(document.text) / 4
    assert places[-1] > len(document.text) * 3 / 4


@pytest.mark.parametrize(("num_tokens", "num_facts"), [(60, 1), (256, 10), (1024, 24), (4096, 64)])
def test_documents_keep_to_their_length_in_tokens(encoder, num_tokens, num_facts):
    for seed in range(20):
        document = text.make_document(seed, num_tokens, num_facts)
        count = len(encoder.ids(document.text))
        assert count == text.count_tokens(document.text)
        assert num_tokens - 32 < count <= num_tokens


def test_crowded_names_share_their_words():
    facts = text.make_document(1, 900, 18, crowded=True).facts
    firsts, seconds = zip(*(fact.name.split() for fact in facts), strict=True)
    assert len(set(firsts)) <= 6
    assert len(set(seconds)) <= 6


def test_a_document_too_small_for_its_facts_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        text.make_document(0, 100, 12)


def test_words_of_facts_are_single_tokens(encoder):
    assert all(len(encoder.ids(f" {word}")) == 1 for word in tokenizer.words())
    assert not set(text.FIRST_WORDS) & set(text.SECOND_WORDS)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_from_its_tokens(hf_tokenizer, string):
    string = string.replace("<bos>", "").replace("<eos>", "")
    assert hf_tokenizer.decode(hf_tokenizer(string)["input_ids"]) == string


def test_the_committed_tokenizer_is_what_its_script_writes(tmp_path):
    tokenizer.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (embedded.PATH / name).read_bytes()


@pytest.mark.parametrize(
    "body", [None, "no full stop", "ends in a space ", "ends in a line\n", "x\n\n", "ends in two  \n "]
)
def test_prefix_and_question_ids_are_the_ids_of_the_whole_prompt(hf_tokenizer, body):
    document = text.make_document(3, 200, 4)
    body = document.text if body is None else body
    rest = "\n\n" + document.facts[0].question
    chat = [{"role": "user", "content": body + rest}]
    prompt = hf_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == f"<bos>{body}{rest}\nAnswer:"
    ids = hf_tokenizer(prompt)["input_ids"]
    cut = len("<bos>" + body)
    assert hf_tokenizer(prompt[:cut])["input_ids"] + hf_tokenizer(prompt[cut:])["input_ids"] == ids
    assert hf_tokenizer(prompt[: cut + 2])["input_ids"] + hf_tokenizer(prompt[cut + 2 :])["input_ids"] == ids


def test_training_sequences_are_rendered_chats(encoder, hf_tokenizer):
    shape = batches.Shape(256, 1, 4, (5, 5))
    ids, weights, answers = batches.conversation(encoder, random.Random(0), shape, 12)
    assert len(ids) == len(weights) == len(answers) <= 256
    whole = hf_tokenizer.decode(ids)
    first, *turns = whole.removeprefix("<bos>").split("<eos>\n")
    chat = []
    for turn in [first, *turns]:
        user, reply = turn.removesuffix("<eos>").split("\nAnswer: ")
        chat += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    rendered = hf_tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == whole + "\n"
    flagged = {hf_tokenizer.decode([token]).strip() for token, flag in zip(ids, answers, strict=True) if flag}
    assert flagged
    assert flagged <= set(text.ANSWERS)


def test_shapes_that_cannot_hold_their_turns_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        batches.Shape(128, 1, 6, (6, 6))


def test_weights_are_small_and_transformers_agrees(params):
    assert sum(weight.size for weight in jax.tree.leaves(params)) <= 4_000_000
    model, problems = transformers.AutoModelForCausalLM.from_pretrained(
        embedded.PATH, dtype=torch.float32, output_loading_info=True
    )
    assert not any(problems.values())
    stored = transformers.AutoConfig.from_pretrained(embedded.PATH)
    assert stored.dtype == torch.bfloat16
    tokens = np.random.default_rng(0).integers(params.config.vocab_size, size=(2, 50)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(np.asarray(models.logits(params, tokens)), expected, atol=1e-4)


def test_the_demo_document_is_answered(params, encoder):
    document = embedded.demo_document()
    right = evaluate.exact_matches(params, encoder, document, embedded.DEMO_TOKENS)
    assert right.mean() >= 0.95


def test_the_judged_replies_are_those_of_plain_logits(params, encoder):
    document = text.make_document(5, 200, 6)
    right = evaluate.exact_matches(params, encoder, document, 220)
    prompt = [encoder.bos, *encoder.ids(document.text)]
    expected = []
    for fact in document.facts:
        question, reply = encoder.turn(fact, first=True)
        tokens = np.array([prompt + question + reply], np.int32)
        predicted = np.argmax(np.asarray(models.logits(params, tokens))[0], axis=-1)
        expected.append(predicted[-len(reply) - 1 : -1].tolist() == reply)
    assert right.tolist() == expected


@pytest.fixture
def optax_promotion():
    """Optax's Adam raises a float to its integer step count, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("optax_promotion")
def test_training_goes_on_from_its_state_and_lowers_the_loss(encoder, tmp_path):
    config = dataclasses.replace(
        train.model_config(encoder.vocab_size, encoder.eos), model_dim=16, mlp_dim=16, num_layers=1, head_dim=8
    )
    first = train.initial_weights(config, jax.random.key(0))
    fresh = lambda: jax.tree.map(lambda weight: weight + 0, first)
    shape = batches.Shape(160, 2, 2, (2, 4), recitals=0.5)
    phases = (train.Phase(shape, 2, 1e-2, 1e-2), train.Phase(dataclasses.replace(shape, crowded=1.0), 1, 1e-2, 1e-2))
    lines = []
    whole = train.train(train.Run(fresh(), train.OPTIMIZER.init(first)), encoder, phases, every=1, report=lines.append)
    assert len(lines) == 3
    half = train.train(train.Run(fresh(), train.OPTIMIZER.init(first)), encoder, phases[:1], report=lines.append)
    half.save(tmp_path / "state.npz")
    resumed = train.train(train.Run.load(tmp_path / "state.npz", first), encoder, phases, report=lines.append)
    assert resumed.total == whole.total == 3
    for one, other in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    batch = batches.make_batch(encoder, shape, 0)
    before, after = (float(train.loss(p, batch.tokens, batch.weights, batch.answers)[0]) for p in (first, whole.params))
    assert after < before


def test_attention_for_training_is_causal_attention():
    from squeezejax.pallas_kernels.xla.dense import causal_attention

    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 37, 4, 8))
    k, v = (jax.random.normal(key, (2, 37, 2, 8)) for key in keys[1:])
    for block in (8, 64):
        out = train.attention(q, k, v, block=block)
        np.testing.assert_allclose(np.asarray(out), np.asarray(causal_attention(q, k, v)), atol=1e-5)


def test_export_writes_what_load_reads(encoder, tmp_path):
    config = dataclasses.replace(
        train.model_config(encoder.vocab_size, encoder.eos), model_dim=16, mlp_dim=24, num_layers=2, head_dim=6
    )
    made = export.round_weights(models.Llama(config, key=jax.random.key(1)))
    export.save(tmp_path, made, encoder.bos, encoder.eos)
    read = models.load(tmp_path)
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(made), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_phases_from_the_command_line():
    phase = train.parse_phase("4096:2:10:1e-3:1e-4:0.9")
    assert (phase.shape.length, phase.shape.batch, phase.steps, phase.enough) == (4096, 2, 10, 0.9)
    assert phase.rate_at(0) == 1e-3
    assert phase.rate_at(9) < 2e-4
