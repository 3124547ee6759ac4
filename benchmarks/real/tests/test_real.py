"""benchmarks.real: what its passes compute, what counts as bytes, needles, and tables, on tiny models and texts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from benchmarks.quality import methods as quality
from benchmarks.real import __main__ as real
from benchmarks.real import entries, index, kvzip, measure, needles, passes, summary, texts
from squeezejax import SqueezeConfig, attend, build_tree, log_thresholds, models, select
from squeezejax.chat import prompts as chat
from squeezejax.models import embedded

CONFIG = SqueezeConfig.paper(cluster_fractions=(0.1, 0.3), observation_window=8, sparsity=0.6)
DEFAULT = SqueezeConfig(cluster_fractions=(0.1, 0.3), observation_window=8, sparsity=0.6)
LENGTH, FED = 60, 20


@pytest.fixture(scope="module")
def material():
    """A tiny random model, and a text of 81 tokens of which 60 are squeezed."""
    params = oracle.make_model(seed=3)
    ids = np.random.default_rng(0).integers(0, params.config.vocab_size, LENGTH + FED + 1).tolist()
    return measure.continuation(params, ids, LENGTH, None, None), ids


def small(entry):
    """An entry with a window that leaves something to choose."""
    return dataclasses.replace(entry, config=dataclasses.replace(entry.config, observation_window=8))


def told(material, entry, setting):
    fixed = material.fixed(entry.config, entry.sinks)
    index = entry.build(fixed, material)
    knob = entry.knob(fixed, index, setting)
    return passes.tell(material.params, fixed.cache, index, knob, material.asked, choose=entry.choose)


def dense_log_probabilities(params, ids):
    return jax.nn.log_softmax(models.logits(params, jnp.array([ids[:-1]]))[0, LENGTH:])


def test_dense_passes_are_the_models(material):
    material, ids = material
    fixed = material.fixed(CONFIG, 4)
    found = passes.tell(
        material.params, fixed.cache, fixed.cache.keys[..., 0], None, material.asked, choose=passes.everything
    )
    expected = dense_log_probabilities(material.params, ids)
    np.testing.assert_allclose(found.log_probabilities, expected, atol=2e-5)
    np.testing.assert_allclose(found.lost.kept, 1)
    np.testing.assert_allclose(found.lost.missed, 0, atol=1e-6)
    np.testing.assert_allclose(found.lost.error, 0, atol=1e-5)


# What keeps every key, by the kind of setting.
ALL = {"keys": 1.0, "sparsity": 0.0, "score": -1e30, "mass": 1.0}
SOME = ["exact", "library", "snapkv", "squeezed_mass_tail"]


def entry_of(name):
    if name in ("library", "default"):
        return entries.library(name, DEFAULT if name == "default" else CONFIG)
    known = entries.entries()[name]
    return (
        known
        if name.startswith("exact")
        else small(entries.from_quality(dataclasses.replace(quality.METHODS[name], config=CONFIG), known.sinks))
    )


@pytest.mark.parametrize("name", [*SOME, "default"])
def test_keeping_every_key_is_dense(material, name):
    material, ids = material
    entry = small(entry_of(name))
    found = told(material, entry, ALL[entry.kind])
    np.testing.assert_allclose(found.lost.kept, 1)
    expected = dense_log_probabilities(material.params, ids)
    np.testing.assert_allclose(found.log_probabilities, expected, atol=3e-5)


IN_8_BITS = dataclasses.replace(DEFAULT, cache_bits=8)


@pytest.mark.parametrize("config", [CONFIG, DEFAULT, IN_8_BITS], ids=["paper", "default", "8 bits"])
def test_the_librarys_choice_is_what_its_own_attention_attends_to(material, config):
    material, _ = material
    entry = entries.library("library", config)
    fixed = material.fixed(config, entry.sinks)
    tree = entry.build(fixed, material)
    log_T = log_thresholds(tree, 0.6)
    params, K = material.params, material.params.config.num_kv_heads
    q = jax.random.normal(jax.random.key(1), (3, params.config.num_heads, params.config.head_dim))
    k, v = jax.random.normal(jax.random.key(2), (2, 3, 1, K, params.config.head_dim))
    out, _ = attend(tree, q[:, None], k, v, layer=1, log_thresholds=log_T)
    chosen = entry.choose(tree, log_T, 1, q)
    assert 0.05 < float(chosen.mask.mean()) < 0.95
    cache = jax.tree.map(lambda x: x[1], fixed.cache)
    valid = jnp.ones((3, 1), bool)
    found, lost = passes._attend(cache, chosen, q[:, None], k, v, valid)
    np.testing.assert_allclose(found, out[:, 0], atol=1e-5)
    np.testing.assert_allclose(lost.kept, chosen.mask.mean(axis=2).T, rtol=1e-6)
    assert np.all((lost.missed >= 0) & (lost.missed < 1))
    assert np.all((lost.estimated >= 0) & (lost.estimated < 1))
    assert np.any(lost.estimated > 0)


def test_exact_keys_are_chosen_by_their_mean_share(material):
    material, _ = material
    fixed = material.fixed(CONFIG, 4)
    q = jax.random.normal(jax.random.key(4), (2, material.params.config.num_heads, material.params.config.head_dim))
    entry = small(entries.EXACT)
    chosen = entry.choose(entry.build(fixed, material), jnp.float32(np.log(0.02)), 0, q)
    keys, first = (np.asarray(x[0], np.float64) for x in (fixed.cache.keys, fixed.cache.window_keys[:, :, :4]))
    K, G = len(keys), q.shape[1] // len(keys)
    for head in range(K):
        rows = np.asarray(q, np.float64)[:, head * G : (head + 1) * G] / np.sqrt(q.shape[2])
        weights, others = np.exp(rows @ keys[head].T), np.exp(rows @ first[head].T)
        shares = (weights / (weights.sum(2) + others.sum(2))[..., None]).mean(axis=1)
        assert 0 < (shares > 0.02).mean() < 1
        np.testing.assert_array_equal(chosen.mask[head], shares > 0.02)


def test_bytes_of_an_index_by_hand():
    """4 coarse clusters of 3 fine ones; the first coarse one alone points where the query does."""
    directions = np.eye(4, 8, dtype=np.float32)
    keys = np.concatenate([np.repeat(4 * directions, 6, axis=0), np.zeros((2, 8), np.float32)])[None, None]
    fine = np.repeat(np.arange(12), 2)[None, None]
    parents = np.repeat(np.arange(4), 3)[None, None]
    config = SqueezeConfig.paper(cluster_fractions=(0.1, 0.5), observation_window=2)
    tree = build_tree(keys, keys, config, labels=(parents, fine))
    q = jnp.asarray(10 * directions[:1])
    mask, looked, _ = index.look(tree, q[None], 0, jnp.array([-5.0, -5.0]))
    assert np.flatnonzero(mask[0, 0]).tolist() == list(range(6))
    assert (int(looked.clusters[0, 0]), int(looked.codes[0, 0])) == (4 + 3, 0)
    _, everything, _ = index.look(tree, q[None], 0, jnp.array([-jnp.inf, -5.0]))
    assert int(everything.clusters[0, 0]) == 4 + 12
    assert float(index.index_bytes(tree, looked)[0, 0]) == 7 * (32 * 8 / 8 + 4)
    chosen = select(tree, q[None], layer=0, log_thresholds=jnp.array([-5.0, -5.0])).key_mask(tree)
    np.testing.assert_array_equal(mask[0], chosen)


def test_keys_in_8_bits_are_counted_with_their_scales(material):
    """Half the bytes, and two for a scale: at every key kept, what is read besides the index."""
    material, _ = material
    found = [told(material, entries.library("library", config), 0.0) for config in (DEFAULT, IN_8_BITS)]
    H = material.params.config.head_dim
    np.testing.assert_allclose(found[0].lost.read - found[1].lost.read, 1 - (H + 2) / (2 * H), atol=1e-6)
    assert 0 < np.abs(found[0].log_probabilities - found[1].log_probabilities).mean() < 0.05


def test_bytes_of_the_default_index_by_hand(material):
    """Every coarse centroid, the fine ones below those kept, and the codes of all keys of the fine ones kept."""
    material, _ = material
    entry = entries.library("library", DEFAULT)
    tree = entry.build(material.fixed(DEFAULT, 4), material)
    config = material.params.config
    q = jax.random.normal(jax.random.key(1), (config.num_heads, config.head_dim))
    log_T = log_thresholds(tree, 0.5)
    mask, looked, _ = index.look(tree, q[None], 1, log_T)
    mask, looked = mask[0], jax.tree.map(lambda x: x[0], looked)
    chosen = select(tree, q[None], layer=1, log_thresholds=log_T).key_mask(tree)
    np.testing.assert_array_equal(mask, chosen)
    coarse, fine = (np.asarray(level.counts[1]) for level in tree.levels)
    live = (coarse > 0).sum(axis=1), (fine > 0).sum(axis=1)
    assert np.all((np.asarray(looked.clusters) >= live[0]) & (np.asarray(looked.clusters) <= live[0] + live[1]))
    assert np.all(np.asarray(looked.codes) >= np.asarray(mask).sum(axis=1))
    H = config.head_dim
    eighths = -(-H // 8)  # rows are filled up to whole bytes of every bit
    of_cluster, of_code = 4 * eighths + 2 + 2 + 4, 2 * eighths + 2
    expected = np.asarray(looked.clusters) * of_cluster + np.asarray(looked.codes) * of_code
    np.testing.assert_allclose(index.index_bytes(tree, looked), expected)
    _, everything, _ = index.look(tree, q[None], 1, jnp.full(3, -jnp.inf))
    np.testing.assert_array_equal(everything.clusters[0], live[0] + live[1])
    np.testing.assert_array_equal(everything.codes[0], tree.num_keys)


@pytest.mark.parametrize(("name", "match"), [("exact", "keys"), ("library", "bytes"), ("snapkv", "bytes")])
def test_settings_meet_budgets(material, name, match):
    material, _ = material
    entry = small(entry_of(name))
    fixed = material.fixed(entry.config, entry.sinks)
    built = entry.build(fixed, material)
    setting = measure.find_setting(entry, fixed, built, material.dense.queries, match, 0.9)
    knob = entry.knob(fixed, built, setting)
    kept, read = passes.spend(built, knob, material.dense.queries, choose=entry.choose)
    assert 0.5 < float(read if match == "bytes" else kept) <= 0.93  # units of clusters are coarse in so few keys
    if name == "library":  # the index alone takes more
        assert measure.find_setting(entry, fixed, built, material.dense.queries, "bytes", 0.01) is None


def test_kvzip_scores_what_a_repetition_attends_to(material):
    material, ids = material
    params = material.params
    found = kvzip.scores(params, lambda text: [5, 7], lambda ids: "", material.context, ids[:LENGTH])
    # The same in one piece: context, prompt and context again, dense; attention over chunk and repetition.
    again = [*ids[:LENGTH], 5, 7, *ids[:LENGTH]]
    context = passes.read(params, again, len(again))
    config = params.config
    K, G, n = config.num_kv_heads, config.num_heads // config.num_kv_heads, LENGTH
    assert found.shape == (config.num_layers, K, n)
    for layer, head in np.ndindex(config.num_layers, K):
        q = np.asarray(context.queries[layer, head * G : (head + 1) * G, n:], np.float64)
        keys = np.asarray(context.keys[layer, head], np.float64)
        dots = np.exp(q @ keys.T / np.sqrt(config.head_dim))
        seen = np.tril(np.ones((n + 2, n + 2)))
        total = dots[:, :, :n].sum(2) + dots[:, :, :4].sum(2) + (dots[:, :, n:] * seen).sum(2)
        np.testing.assert_allclose(
            found[layer, head], np.log((dots[:, :, :n] / total[..., None]).max((0, 1))), atol=1e-3
        )


# ---- Texts and needles


def words(text):
    """A tokenizer of characters, good enough to count."""
    return [ord(letter) for letter in text]


def letters(ids):
    return "".join(map(chr, ids))


def test_stretches_of_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.md").write_text("a longer text\n")
    (tmp_path / "c.bin").write_text("not a text")
    made = texts.read([tmp_path], words)
    assert letters(made.stretch(0, 15)) == "a longer text\n\n"
    assert letters(made.stretch(1, 7)) == " text\n\n"[:0] + letters(words("a longer text\n\none two\n\n")[7:14])
    assert [letters(ids) for ids in made.stretches(10)] == ["a longer t", "ext\n\none t"]
    with pytest.raises(ValueError, match="fewer than 40 tokens"):
        made.stretch(1, 20)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \*\.txt"):
        texts.read([tmp_path / "empty"], words)
    assert len(texts.language_reference(words).stretch(2, 5000)) == 5000


@pytest.mark.parametrize("kind", needles.KINDS)
def test_needles_lie_at_ends_of_sentences(kind):
    text = "It was so. And then it was not? Yes! " * 100
    made = needles.make(1, 3000, words(text), words, letters, ("<user>", "<model>"), kind=kind)
    whole = letters(made.ids)
    assert len(made.ids) == 3000
    assert whole.startswith(f"<user>Some special magic {kind} are hidden")
    assert len(made.questions) == len(made.answers) == 8
    for question, answer in zip(map(letters, made.questions), map(letters, made.answers), strict=True):
        key = question.split(" for ")[1].split(" mentioned")[0]
        assert whole.count(f" One of the special magic {kind} for {key} is:{answer}.") == 1
        before = whole.split(f" One of the special magic {kind} for {key}")[0]
        assert before[-1] in ".?!"
        assert question.endswith(f"<model> The special magic {kind[:-1]} for {key} mentioned in the provided text is")
        assert len(answer) == 8 or kind == "words"
    assert made == needles.make(1, 3000, words(text), words, letters, ("<user>", "<model>"), kind=kind)
    with pytest.raises(ValueError, match="do not fill"):
        needles.make(1, 3000, words(text)[:100], words, letters, ("", ""))


def test_answers_are_counted_without_blanks():
    haystack = needles.Haystack(
        words("context"), [words("Who?"), words("What is it?")], [words(" Al"), words(" x")], ""
    )
    made = measure.questions(None, haystack, words, letters)
    rows = [letters(row[valid]) for row, valid in zip(*map(np.asarray, made.asked[:2]), strict=True)]
    assert rows == ["Who? A", "What is it? "]
    T = made.asked.tokens.shape[1]
    assert np.asarray(made.asked.at)[:5].tolist() == [3, 4, 5, T + 10, T + 11]  # after "?", the blank, "A" …
    assert letters(np.asarray(made.asked.gold)[:5].tolist()) == " Al x"
    assert [places.tolist() for places in made.answers] == [[1, 2], [4]]


# ---- Tables


def record(text, method, kl, **more):
    where = {"measure": "lm", "length": 64, "text": text, "match": "bytes", "budget": 0.125, "method": method}
    heads = {"kept": [[0.5, 1.0]], "sinks": [[0.1, 0.3, 0.5, 0.5]]}
    return where | {"kl": kl, "same": 1.0, "read": 0.12, "kept": 0.1, "heads": heads} | more


def test_tables_by_hand():
    records = [record("a", "exact", 0.1), record("b", "exact", 0.2), record("a", "ours", 0.3), record("b", "ours", 0.4)]
    rows = {row["method"]: row for row in summary.summarize(records)}
    assert [rows["ours"][f"kl_more{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.2] * 3)
    assert rows["ours"]["texts"] == 2
    assert "missed" not in rows["ours"]
    heads = [row for row in summary.per_head(records) if row["method"] == "ours"]
    assert [(row["kept"], row["sinks"]) for row in heads] == [(0.5, pytest.approx(0.2)), (1.0, 0.5)]
    assert any("ours" in line and "0.2000 [0.2000, 0.2000]" in line for line in summary.lines([*rows.values()]))
    failed = summary.check([*rows.values()], "smollm2", "ours")
    assert [line.split(":")[0] for line in failed] == ["lm at 64 tokens, 0.125 of the bytes", "needles right_lost"]
    assert summary.check([*rows.values()], "other", "ours") == []


# ---- The command


def test_the_quick_form_on_the_embedded_model(tmp_path, capsys):
    command = ["--quick", "--model", "embedded", "--lengths", "384", "--fed", "32", "--num-texts", "1"]
    command += ["--budgets", "0.25", "--methods", "exact", "--out", str(tmp_path)]
    command += ["--config", "cluster_fractions=(0.1,)"]
    real.main(command)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    names = {one["method"] for one in found}
    assert names == {"dense", "exact", "library cluster_fractions=(0.1,)"}
    assert {one["measure"] for one in found} == {"lm", "needles"}
    dense = next(one for one in found if (one["measure"], one["method"]) == ("needles", "dense"))
    assert np.mean(dense["right"]) > 0.9  # all, with the weights of today
    for one in found:
        assert one["read"] <= 0.32 or one["match"] in ("asked", "dense")
    assert "more than exact keys" in capsys.readouterr().out
    # Killed while it wrote: what is whole stays, the rest is measured again.
    (tmp_path / "records.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    real.main(command)
    again = (tmp_path / "records.jsonl").read_text().splitlines()
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["method"] == json.loads(lines[-1])["method"]
    with pytest.raises(SystemExit, match="2"):
        real.main([*command, "--fed", "16"])


def test_wrong_commands_are_refused(capsys):
    for arguments, sentence in (
        (["--model", "embedded"], "name a directory"),
        (["--quick", "--model", "embedded", "--methods", "none"], "there is no method 'none'"),
        (["--quick", "--model", "embedded", "--config", "sparsity=nan()"], "--config"),
        (["--quick", "--model", "embedded", "--lengths", "100000"], "the model reads"),
        (["--quick", "--model", "/nowhere"], "/nowhere"),
    ):
        with pytest.raises(SystemExit, match="2"):
            real.main(arguments)
        assert sentence in capsys.readouterr().err


def test_embedded_questions_fill_a_context_exactly():
    tokenizer = chat.load_tokenizer(embedded.PATH)
    made = real.embedded_questions(0, 500, lambda text: chat.encode(tokenizer, text), tokenizer)
    assert len(made.ids) == 500
    assert made.ids[0] == tokenizer.bos_token_id
    whole = tokenizer.decode(made.ids)
    for answer in made.answers:
        assert tokenizer.decode(answer).split()[-1].rstrip(".") in whole
