"""What was read for an answer: its numbers, the text behind them, the page as a file and as a browser shows it."""

import dataclasses
import hashlib
import html.parser
import json
import os
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from chat_models import CHATML, CONTEXT, KINDS, make_tokenizer
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

import squeezejax
from squeezejax import SqueezeConfig
from squeezejax.chat import prompts as chat
from squeezejax.command_line import cli, commands
from squeezejax.explain import page as explain_page
from squeezejax.explain.answer import Explanation, explain
from squeezejax.explain.text import Piece, context_files, context_ids, passages, pieces
from squeezejax.mesh import sharding
from squeezejax.models.embedded import text
from squeezejax.online import fallback
from squeezejax.storage import files as storage

# ---- Numbers

S, W, QUESTION, ANSWER = 40, 6, [3, 1, 4, 1, 5], [9, 2, 6]
CONFIG = SqueezeConfig.paper(cluster_fractions=(0.1, 0.3), observation_window=W, query_block=3, sparsity=0.6)
TOKENS = np.random.default_rng(7).integers(0, 31, S + W)


@pytest.fixture(scope="module")
def params():
    return oracle.make_model()


@pytest.fixture(scope="module")
def tree(params):
    return oracle.model_tree(params, TOKENS, CONFIG)


def attend_and_tell(fixed, q, k, v, masks):
    """Attention of user tokens q [T N H], k, v [T K H] in float64, written down: (out [T N H], attended, missed).

    fixed: keys and values [K S+W H] of the context in its own order; masks bool[T K S]. attended, missed [T K S+W].
    """
    T, N, H = q.shape
    K = k.shape[1]
    group = np.arange(N) // (N // K)
    out, attended, missed = np.zeros(q.shape), np.zeros((T, K, S + W)), np.zeros((T, K, S + W))
    for t, n in np.ndindex(T, N):
        head = group[n]
        keys, values = (np.concatenate([x[head], own[: t + 1, head]]) for x, own in zip(fixed, (k, v), strict=True))
        weights = np.exp(keys @ q[t, n] / np.sqrt(H))
        kept = np.concatenate([masks[t, head], np.ones(W + t + 1, bool)])
        paid = np.where(kept, weights, 0) / weights[kept].sum()
        out[t, n] = paid @ values
        attended[t, head] += paid[: S + W] * K / N
        missed[t, head] += np.where(kept, 0, weights / weights.sum())[: S + W] * K / N
    return out, attended, missed


def labels_of(tree, layer, head):
    """Clusters as the oracle takes them: parents i[C] of the finest level, and the finest cluster i[S] of every key."""
    fine = tree.levels[-1]
    starts, counts, order = (np.asarray(x[layer, head]) for x in (fine.starts, fine.counts, tree.order))
    cluster = np.zeros(S, int)
    for c, (start, count) in enumerate(zip(starts, counts, strict=True)):
        cluster[order[start : start + count]] = c
    return np.asarray(fine.parents[layer, head]), cluster


def test_numbers_are_those_of_numpy(params, tree):
    """Against the model's own layers with selection and attention in NumPy, float64."""
    T, n, K = len(QUESTION), len(ANSWER), tree.num_kv_heads
    log_T = np.asarray(squeezejax.log_thresholds(tree, 0.6))
    _, *fixed, _ = (np.asarray(x, np.float64) for x in oracle.plain_forward(params, TOKENS))
    shared = [range(0, 3), range(3, 5), *(range(t, t + 1) for t in range(T, T + n))]  # tokens of one selection
    told = []

    def attend(q, k, v):
        layer = len(told)
        masks = np.zeros((T + n, K, S), bool)
        for tokens in shared:
            rows = oracle.grouped(q[0, tokens.start : tokens.stop].swapaxes(0, 1), K)
            for head in range(K):
                _, kept = oracle.descend(fixed[0][layer, head, :S], labels_of(tree, layer, head), rows[head], log_T)
                masks[tokens.start : tokens.stop, head] = kept[-1]
        own = (np.asarray(x[0], np.float64) for x in (q, k, v))
        out, attended, missed = attend_and_tell([x[layer] for x in fixed], *own, masks)
        told.append((masks, attended, missed))
        return out[None].astype(np.float32)

    @jax.jit
    def forward(tokens):
        x, positions = params.embed(tokens), S + W + jnp.arange(T + n)[None]
        call = lambda q, k, v: (None, jax.pure_callback(attend, jax.ShapeDtypeStruct(q.shape, q.dtype), q, k, v))
        for layer in range(params.config.num_layers):
            x, _ = params.apply_layer(params.layer(layer), x, positions, call)
        return params.unembed(x)[0]

    logits = np.asarray(forward(jnp.array([QUESTION + ANSWER])), np.float64)[T - 1 : T + n - 1]
    masks, attended, missed = (np.stack(x, axis=1) for x in zip(*told, strict=True))  # [T+n L K …]
    passes = slice(T - 1, T + n - 1)

    found = explain(params, tree, QUESTION, ANSWER, sparsity=0.6, implementation="xla")
    kept, attended, missed = masks[passes].astype(float), attended[passes], missed[passes, ..., :S]
    assert 0.1 < kept.mean() < 0.7
    for name, each in (("kept", kept), ("attended", attended), ("missed", missed)):
        np.testing.assert_allclose(getattr(found, f"token_{name}"), each.mean(axis=(1, 2)), atol=2e-5)
        np.testing.assert_allclose(getattr(found, f"head_{name}"), each.mean(axis=0), atol=2e-5)
        whole = each.mean(axis=3) if name == "kept" else each.sum(axis=3)
        np.testing.assert_allclose(getattr(found, name), whole, atol=2e-5)
    np.testing.assert_allclose(found.kept_fraction, masks[T:].mean(), atol=1e-6)
    np.testing.assert_allclose(found.prefill_kept_fraction, masks[:T].mean(), atol=1e-6)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = (odds / odds.sum(axis=1, keepdims=True))[range(n), ANSWER]
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)
    never, always = found.head_kept == 0, found.head_kept > 1 - 1e-6
    assert never.any()
    assert np.all(found.head_attended[..., :S][never] == 0)
    assert np.all(found.head_missed[always] == 0)
    assert not found.dense


def test_numbers_of_the_default_index(params):
    """Sinks first, the window last; what is kept is what answering kept; all attention is accounted for."""
    config = SqueezeConfig(cluster_fractions=(0.1, 0.3), sinks=4, observation_window=W, query_block=3, sparsity=0.6)
    tree = oracle.model_tree(params, np.random.default_rng(8).integers(0, 31, 4 + S + W), config)
    options = {"sparsity": 0.6, "implementation": "xla"}
    made = squeezejax.generate(params, tree, QUESTION, max_new_tokens=3, **options)
    found = explain(params, tree, QUESTION, made.tokens[0], **options)
    assert found.token_attended.shape == (3, 4 + S + W)
    assert found.token_kept.shape == found.token_missed.shape == (3, S)
    np.testing.assert_allclose(found.kept_fraction, made.kept_fraction[0], rtol=1e-5)
    np.testing.assert_allclose(found.prefill_kept_fraction, made.prefill_kept_fraction[0], rtol=1e-5)
    assert 0.1 < found.kept_fraction < 0.9
    np.testing.assert_allclose(found.head_kept.mean(axis=2), found.kept.mean(axis=0), atol=1e-6)
    never, always = found.head_kept == 0, found.head_kept > 1 - 1e-6
    assert np.all(found.head_attended[..., 4 : 4 + S][never] == 0)
    assert np.all(found.head_missed[always] == 0)
    assert np.all(found.head_attended[..., [*range(4), *range(4 + S, 4 + S + W)]] > 0)
    # On the page, too, values of the clustered tokens lie behind the sinks.
    assert found.sinks == 4
    shown = explain_page._padded(found.token_kept, "kept", found)
    np.testing.assert_array_equal(shown[:, 4 : 4 + S], found.token_kept)
    assert np.all(shown[:, :4] == 1)
    assert np.all(shown[:, 4 + S :] == 1)
    missed = explain_page._padded(found.token_missed, "missed", found)
    np.testing.assert_array_equal(missed, np.pad(found.token_missed, ((0, 0), (4, W))))
    np.testing.assert_array_equal(explain_page._padded(found.token_attended, "attended", found), found.token_attended)
    # With every key kept, nothing is missed, and own tokens receive the rest.
    whole = explain(params, tree, QUESTION, made.tokens[0], sparsity=0.0, implementation="xla")
    assert np.all(whole.missed == 0)
    assert np.all((whole.attended > 0) & (whole.attended < 1))


def test_every_key_kept_is_said(params, tree, monkeypatch):
    """By sparsity 0, and where a context is so short that selecting cannot pay."""
    asked = explain(params, tree, QUESTION, ANSWER, sparsity=0.0)
    monkeypatch.setattr(fallback, "OVERHEAD", 1e12)
    fell_back = explain(params, tree, QUESTION, ANSWER, sparsity=0.7)
    for found in (asked, fell_back):
        assert found.dense
        assert found.kept_fraction == found.prefill_kept_fraction == 1
        assert np.all(found.token_kept == 1)
        assert np.all(found.missed == 0)
    assert not explain(params, tree, QUESTION, ANSWER, sparsity=0.7, implementation="xla").dense


def test_refused(params, tree, monkeypatch):
    with pytest.raises(ValueError, match="one question and one answer at a time"):
        explain(params, tree, [QUESTION, QUESTION], ANSWER)
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 31\)"):
        explain(params, tree, QUESTION, [31])
    monkeypatch.setattr(sharding, "mesh_of", lambda _: "a mesh")
    with pytest.raises(NotImplementedError, match="without a mesh"):
        explain(params, tree, QUESTION, ANSWER)


# ---- Text


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_text(kind):
    tokenizer = make_tokenizer(kind, CHATML)
    ids = chat.whole_prompt_ids(tokenizer, [chat.user(CONTEXT + " 港は静か 🙂")])
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    text = "".join(piece.text for piece in found if not piece.special)
    # Where a special token stands, decoders disagree with themselves about one space.
    assert text.split() == chat.decode(tokenizer, ids).split()
    assert [piece.text for piece in found if piece.special] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    if kind != "metaspace":  # which knows no bytes
        assert pieces(tokenizer, chat.encode(tokenizer, "🙂")[:-1])[-1].text.endswith("�")


def test_passages_by_hand():
    words = ["<bos>", "Of", " Pi", "\n", "\n", "It", " is", " 3", ".", "14", "!", " Why", "?", " 何", "。", "か", " x"]
    found = passages([Piece(word) for word in words], window_start=16)
    assert ["".join(words[i] for i in part) for part in found] == [
        "<bos>Of Pi\n\n", "It is 3.14!", " Why?", " 何。", "か", " x",
    ]  # fmt: skip
    assert [len(part) for part in passages([Piece(" a")] * 130, window_start=130)] == [64, 64, 2]


def test_the_hash_of_appended_texts():
    """Texts in the order in which they were squeezed give all ids; anything else is refused."""
    tokenizer = make_tokenizer("llama3", CHATML)
    texts = [CONTEXT, "In summer the dog slept.", "It rained."]
    ids, prompt = chat.split_prompt(tokenizer, texts[0])
    digest = hashlib.sha256(np.array(ids, np.int32).tobytes()).digest()
    for more in texts[1:]:
        added, prompt = chat.extend_prompt(tokenizer, prompt, more)
        digest = hashlib.sha256(digest + np.array(added, np.int32).tobytes()).digest()
        ids = ids + added
    header = SimpleNamespace(context_hash=digest.hex())
    assert context_ids(tokenizer, texts, header) == ids
    for wrong in (texts[:2], texts[::-1], ["\n\n".join(texts)], [texts[0], texts[1] + "!", texts[2]]):
        with pytest.raises(ValueError, match="its hash is another"):
            context_ids(tokenizer, wrong, header)


def test_files_that_a_tree_names(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    notes = {"context": f"{tmp_path}/a.txt, {tmp_path}/b.txt"}
    assert context_files(None, notes) == [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"]
    assert context_files(["elsewhere.txt"], notes) == ["elsewhere.txt"]
    (tmp_path / "b.txt").unlink()
    for broken in (notes, {}):
        with pytest.raises(FileNotFoundError, match="say where with --context FILE"):
            context_files(None, broken)


# ---- The page as a file


class Page(html.parser.HTMLParser):
    """The tokens shown, (classes, text) each, the text of every element with an id, and every address."""

    def __init__(self, source):
        super().__init__()
        self.tokens, self.texts, self.addresses, self._open = [], {}, [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("href", "src") if name in attrs]
        if tag not in ("meta", "link", "input"):
            self._open.append((tag, attrs))
        if "id" in attrs:
            self.texts[attrs["id"]] = ""
        if "t" in attrs.get("class", "").split():
            self.tokens.append([attrs["class"].split(), ""])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open and "t" in self._open[-1][1].get("class", "").split():
            self.tokens[-1][1] += data
        for _, attrs in self._open:
            if "id" in attrs:
                self.texts[attrs["id"]] += data


def make_explanation(seed, P, L, K, S, W):
    rng = np.random.default_rng(seed)
    kept = rng.random((P, L, K, S)) < 0.2
    attention = rng.dirichlet(np.full(S + W, 0.05), (P, L, K)).astype(np.float32)
    attended = attention * np.concatenate([kept, np.ones((P, L, K, W), bool)], axis=3)
    missed = attention[..., :S] * ~kept
    arrays = {}
    for name, each in (("kept", kept), ("attended", attended), ("missed", missed)):
        arrays[f"token_{name}"], arrays[f"head_{name}"] = each.mean(axis=(1, 2)), each.mean(axis=0)
        arrays[name] = each.mean(axis=3) if name == "kept" else each.sum(axis=3)
    numbers = {"kept_fraction": 0.2, "prefill_kept_fraction": 0.25, "dense": False}
    return Explanation(**arrays, **numbers, probabilities=rng.random(P))


def make_about(context):
    answer = [Piece(" <b>no</b>"), Piece("\n"), Piece(" way"), Piece("<eos>", special=True)]
    return explain_page.About('Is 1 < 2 & "3"?', answer, "<i>yes</i>", context, 0.8, "my<tree>.tree")


def test_a_long_text_is_shown_in_part(monkeypatch):
    """The passages with most attention, in their order, and how much lies between them."""
    monkeypatch.setattr(explain_page, "MOST_SHOWN", 200)
    monkeypatch.setattr(explain_page, "MOST_ROWS", 3)
    found = make_explanation(0, 4, 3, 2, 950, 50)
    words = [f" w{i}{'.' * (i % 10 == 9)}" for i in range(1000)]
    source = explain_page.render(found, make_about([Piece(word) for word in words]))
    page = Page(source)
    shown = [words.index(word) for _, word in page.tokens]
    assert shown == sorted(shown)
    assert len(shown) == 200
    gaps = re.findall(r"([\d,]+) tokens with less attention, not shown", page.texts["text"])
    assert sum(int(gap.replace(",", "")) for gap in gaps) == 800
    whole = found.token_attended.mean(axis=0)
    whole[:950] += found.token_missed.mean(axis=0)
    weight = whole.reshape(100, 10).sum(axis=1)  # every sentence has ten words
    assert {i // 10 for i in shown} == set(np.argsort(-weight)[:20].tolist())
    assert source.count(" disabled>") == 1  # the answer's fourth token
    assert {address for address in page.addresses if not address.startswith("#")} == {"data:,"}


def check_shades(classes, attended, kept, missed):
    """Classes of every token count the bounds that its values reach; kept and missed lack the window's W."""
    kept = np.concatenate([kept, np.ones(len(attended) - len(kept))])
    missed = np.concatenate([missed, np.zeros(len(attended) - len(missed))])
    mass, share = explain_page.MASS_BOUNDS, explain_page.SHARE_BOUNDS
    assert len(classes) == len(attended)
    for found, *values in zip(classes, attended, kept, missed, strict=True):
        for letter, value, bounds in zip("akm", values, (mass, share, mass), strict=True):
            if all(abs(value / bound - 1) > 0.05 for bound in bounds):  # numbers are rounded before
                assert f"{letter}{sum(value >= bound for bound in bounds)}" in found


def whole_answer(found):
    whole = (x.mean(axis=0) for x in (found.token_attended, found.token_kept, found.token_missed))
    return with_sinks(found, *whole)


def with_sinks(found, attended, kept, missed):
    """As they are on the page: the sinks, in front, are always kept and never missed."""
    return attended, np.concatenate([np.ones(found.sinks), kept]), np.concatenate([np.zeros(found.sinks), missed])


def test_classes_say_the_shade():
    found = make_explanation(1, 4, 3, 2, 90, 10)
    page = Page(explain_page.render(found, make_about([Piece(f" w{i}") for i in range(100)])))
    check_shades([classes for classes, _ in page.tokens], *whole_answer(found))


def test_what_a_text_says_is_not_markup():
    words = ["</span>", "<script>", "alert(1)", "</script>", "<!--", " &lt;", "\u2028", "]]>", "'\"", " end"]
    page = Page(explain_page.render(make_explanation(2, 4, 1, 1, 8, 2), make_about([Piece(word) for word in words])))
    assert [word for _, word in page.tokens] == words
    assert page.texts["question"] == 'Is 1 < 2 & "3"?'
    assert page.texts["dense"] == "another answer: <i>yes</i>"
    assert "<b>no</b>" in page.texts["answer"]


def test_control_characters_are_shown_on_pages():
    evil = "\x1b\x00\u202e"
    about = dataclasses.replace(
        make_about([Piece(evil)] * 10), question=evil, answer=[Piece(evil)] * 4, dense_answer=evil, tree=evil
    )
    text = explain_page.render(make_explanation(2, 4, 1, 1, 8, 2), about)
    page = Page(text)
    assert not set(evil) & set(text)
    assert [word for _, word in page.tokens] == [r"\x1b\x00\u202e"] * 10
    assert page.texts["question"] == r"\x1b\x00\u202e"


@pytest.mark.parametrize(("sparsity", "reason"), [(0.8, "a sparsity of 0.8 was asked for"), (0.0, "with sparsity 0.")])
def test_dense_answers_are_called_so(sparsity, reason):
    found = dataclasses.replace(make_explanation(3, 4, 1, 1, 8, 2), dense=True)
    about = dataclasses.replace(make_about([Piece(" w")] * 10), sparsity=sparsity, dense_answer=None)
    page = Page(explain_page.render(found, about))
    assert page.texts["all-kept"].startswith("Every key was kept")
    assert reason in page.texts["all-kept"]
    assert page.texts["dense"] == "the same answer"


def test_percent_by_hand():
    shares = (0, 1e-6, 0.00012345, 0.00951, 0.5, 1)
    assert [explain_page.percent(share) for share in shares] == [
        "0 %", "below 0.001 %", "0.012 %", "1.0 %", "50.0 %", "100.0 %",
    ]  # fmt: skip


# ---- `ask --explain`, with the embedded model

HOSTILE = "</article><script>document.title = 'taken'</script> <img src=x onerror=\"document.title='taken'\"> & so on."


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A folder with a text, its tree and the page of one answer; the question, what `explain` gave, the record."""
    folder = tmp_path_factory.mktemp("explain")
    document = text.make_document(3, 220, 5)
    question = document.facts[2].question
    (folder / "text.txt").write_text(f"{HOSTILE}\n\n{document.text}\n")
    (folder / "other.txt").write_text(document.text)
    seen, replies = [], []
    with pytest.MonkeyPatch.context() as patch:
        for cost in ("LOOK_UP", "READ_BY_LIST", "OVERHEAD"):
            patch.setattr(fallback, cost, 0.0)
        patch.setattr(commands, "explain", lambda *args, **options: seen.append(explain(*args, **options)) or seen[0])
        ask = squeezejax.text.ask
        patch.setattr(squeezejax.text, "ask", lambda *args: replies.append(ask(*args)) or replies[-1])
        files = f"--context {folder}/text.txt --out {folder}/text.tree"
        assert cli.main(["build", "--model", "embedded", *files.split(), "--window", "16", "--paper", "--quiet"]) == 0
        options = f"--tree {folder}/text.tree --sparsity 0.6 --max-new-tokens 6 --explain {folder}/page.html"
        assert cli.main(["ask", *options.split(), question]) == 0
    return SimpleNamespace(folder=folder, question=question, found=seen[0], record=replies[0].record)


def test_ask_writes_the_page(asked):
    source = (asked.folder / "page.html").read_text(encoding="utf-8")
    page, found = Page(source), asked.found
    shown = "".join(word for _, word in page.tokens).removeprefix("<bos>")
    assert (asked.folder / "text.txt").read_text().strip().startswith(shown)
    assert len(shown) > 900  # all but what belongs to the question's side: a full stop at most
    assert page.texts["question"] == asked.question
    record = asked.record
    assert 0.05 < record.kept_fraction < 0.8
    np.testing.assert_allclose(found.kept_fraction, record.kept_fraction, rtol=1e-5)
    np.testing.assert_allclose(found.prefill_kept_fraction, record.prefill_kept_fraction, rtol=1e-5)
    assert page.texts["kept-fraction"] == f"{100 * record.kept_fraction:.1f} %"
    assert f"{100 * record.prefill_kept_fraction:.1f} % in reading the question" in " ".join(source.split())
    assert (
        found.token_attended.shape[1]
        == len(page.tokens)
        == storage.read_header(asked.folder / "text.tree").num_keys + 16  # the window
    )


WRONG = {
    "page exists": ("--explain {0}/page.html", "page.html exists; give --force"),
    "nowhere": ("--explain {0}/no/page.html", "no does not exist"),
    "a directory": ("--explain {0}", "is a directory"),
    "the tree": ("--explain {0}/text.tree --force", "is the text itself or the tree"),
    "the text": ("--explain {0}/text.txt --force", "is the text itself or the tree"),
    "a chat": ("--explain {0}/new.html --chat", "without --chat"),
    "two questions": ("Why? --explain {0}/new.html", "ask it alone"),
    "dense": ("--explain {0}/new.html --dense", "give --sparsity 0"),
    "other text": ("--explain {0}/new.html --context {0}/other.txt", "is not the one that was squeezed"),
    "one text too many": ("--explain {0}/new.html" + 2 * " --context {0}/text.txt", "is not the one that was squeezed"),
    "no such text": ("--explain {0}/new.html --context {0}/gone.txt", "gone.txt: No such file"),
    "context alone": ("--context {0}/text.txt", "go with --explain"),
    "force alone": ("--force", "go with --explain"),
}


@pytest.mark.parametrize(("line", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_before_the_model_is_loaded(asked, line, sentence, capsys, monkeypatch):
    monkeypatch.setattr(commands.models, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    folder = asked.folder
    before = (folder / "page.html").read_bytes()
    assert cli.main(["ask", "--tree", f"{folder}/text.tree", "Who?", *line.format(folder).split()]) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert sentence in err
    assert (folder / "page.html").read_bytes() == before
    assert not (folder / "new.html").exists()


# ---- The page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that makes no requests of its own."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "chromium and chromedriver are not installed (Debian: chromium, chromium-driver)"
        assert os.environ.get("SQUEEZEJAX_BROWSER") != "required", missing
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.add_argument("--headless")
    options.add_argument("--no-first-run")
    options.add_argument("--window-size=1200,900")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    for feature in ("quic", "background-networking", "component-update", "sync", "gpu"):
        options.add_argument(f"--disable-{feature}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to run as root otherwise
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, asked):
    """The page, ready; at the end nothing must have been reported to the console or asked of a network."""
    address = (asked.folder / "page.html").as_uri()
    browser.get_log("performance")
    browser.get(address)
    WebDriverWait(browser, 60).until(lambda _: browser.find_elements("css selector", "html.js"))
    yield browser
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # Chromium's own start page may still be loading when it opens ours.
    ours = [request["request"]["url"] for request in sent if request["documentURL"].startswith(address)]
    assert set(ours) == {address}


def all_of(browser, selector, value):
    """A JavaScript expression of every element `e` that a selector finds."""
    return browser.execute_script(f"return [...document.querySelectorAll(arguments[0])].map(e => {value})", selector)


def classes_of(browser):
    return [classes.split() for classes in all_of(browser, "#text .t", "e.className")]


def text_of(browser, identifier):
    return browser.find_element("id", identifier).text


def press(browser, selector, number=0):
    """Clicks by script: where the page has scrolled to does not matter."""
    browser.execute_script("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, number)


def rgba(colour):
    """(red, green, blue, alpha) of a computed colour."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", colour)]
    return (*numbers, 1.0) if len(numbers) == 3 else tuple(numbers)


def test_opens_as_it_is(opened, asked):
    assert opened.title == f"What was read: {asked.question}"  # nothing in the text has run
    assert HOSTILE in opened.execute_script("return document.getElementById('text').textContent")
    assert text_of(opened, "kept-fraction") == f"{100 * asked.record.kept_fraction:.1f} %"
    check_shades(classes_of(opened), *whole_answer(asked.found))
    cells = np.array(all_of(opened, ".cell", "e.innerText"), float).reshape(asked.found.kept.shape[1:])
    np.testing.assert_allclose(cells, 100 * asked.found.kept.mean(axis=0), atol=0.051)


def test_views_colour_what_they_say(opened, asked):
    """Each view shades the tokens that have most of its kind, and no token without it."""
    values = dict(zip(("attended", "kept", "missed"), whole_answer(asked.found), strict=True))
    hues = set()
    for kind, share in values.items():
        press(opened, f"#view-{kind}")
        colours = [rgba(colour) for colour in all_of(opened, "#text .t", "getComputedStyle(e).backgroundColor")]
        most, least = int(np.argmax(share)), int(np.argmin(share))
        assert colours[most][3] > 0.2
        assert colours[most][3] > colours[least][3] + 0.15
        hues.add(colours[most][:3])
        assert text_of(opened, "map-note").split()[:2] == (
            ["Attention", "that"] if kind == "missed" else ["Keys", "that"]
        )
    assert len(hues) == 3
    cells = np.array(all_of(opened, ".cell", "e.innerText"), float)
    np.testing.assert_allclose(cells, 100 * asked.found.missed.mean(axis=0).reshape(-1), atol=0.051)


def test_a_head_by_itself(opened, asked):
    found = asked.found
    press(opened, ".cell", 5)
    of_head = found.head_attended[2, 1], found.head_kept[2, 1], found.head_missed[2, 1]
    check_shades(classes_of(opened), *with_sinks(found, *of_head))
    assert text_of(opened, "scope-text") == "Layer 2, head 1, the whole answer."
    assert all_of(opened, "[aria-pressed=true]", "e.dataset.row") == ["6"]
    for identifier, share in (("most-attended", found.head_attended[2, 1]), ("most-missed", found.head_missed[2, 1])):
        listed = all_of(opened, f"#{identifier} small", "e.textContent")
        numbers = [float(note.split()[1]) for note in listed]
        assert numbers == sorted(numbers, reverse=True)
        assert 0 < sum(numbers) <= 103 * share.sum()
    press(opened, ".cell", 5)
    check_shades(classes_of(opened), *whole_answer(found))


def test_a_word_by_itself(opened, asked):
    found = asked.found
    press(opened, ".word", 1)
    of_word = found.token_attended[1], found.token_kept[1], found.token_missed[1]
    check_shades(classes_of(opened), *with_sinks(found, *of_word))
    word = all_of(opened, ".word", "e.textContent")[1]
    assert text_of(opened, "scope-text").startswith(f"“{word}”, all layers and heads: written with probability")
    cells = np.array(all_of(opened, ".cell", "e.innerText"), float)
    np.testing.assert_allclose(cells, 100 * found.kept[1].reshape(-1), atol=0.051)
    opened.find_element("tag name", "body").send_keys("\ue00c")  # Escape
    assert text_of(opened, "scope-text") == "The whole answer, all layers and heads."
    check_shades(classes_of(opened), *whole_answer(found))


def test_numbers_under_the_pointer(opened, asked):
    number = int(np.argmax(asked.found.token_attended.mean(axis=0)[:100]))
    token = opened.find_elements("css selector", "#text .t")[number]
    ActionChains(opened).scroll_to_element(token).move_to_element(token).perform()
    lines = text_of(opened, "tip").splitlines()
    assert lines[0] == f"token {number}: “{token.text.strip()}”"
    shares = [float(re.search(r"([\d.]+) %", line)[1]) / 100 for line in lines[1:]]
    expected = [share[number] for share in whole_answer(asked.found)]
    np.testing.assert_allclose(shares, expected, rtol=0.06, atol=0.003)


def test_passages_lead_into_the_text(opened):
    link = opened.find_element("css selector", "#most-attended a")
    link.click()
    target = opened.find_element("css selector", ":target")
    assert link.text in target.text
    top, height = opened.execute_script(
        "return [document.querySelector(':target').getBoundingClientRect().top, innerHeight]"
    )
    assert 0 <= top < height


def test_without_javascript(browser, asked):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get((asked.folder / "page.html").as_uri())
        colours = {}
        for kind in ("attended", "kept", "missed"):
            browser.find_element("id", f"view-{kind}").click()
            colours[kind] = set(all_of(browser, "#text .t", "getComputedStyle(e).backgroundColor"))
        assert not browser.find_element("class name", "hint").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    check_shades(classes_of(browser), *whole_answer(asked.found))
    assert all(len(shown) > 2 for shown in colours.values())


def test_colours_can_be_read(opened):
    """Every text on its background has the contrast that WCAG 2.1 asks for (4.5), by day and by night."""
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        page = rgba(opened.find_element("tag name", "body").value_of_css_property("background-color"))
        assert (luminance(page) < 0.1) == (scheme == "dark")
        for kind in ("attended", "kept", "missed"):
            press(opened, f"#view-{kind}")
            style = "[getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
            for ink, ground in all_of(opened, "#text .t:not(.special), .cell, .swatch, .hint, #scope-text, p", style):
                *ground, alpha = rgba(ground)
                mixed = [alpha * over + (1 - alpha) * under for over, under in zip(ground, page, strict=False)]
                lighter, darker = sorted((luminance(rgba(ink)), luminance(mixed)), reverse=True)
                assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (scheme, kind, ink, ground, alpha)
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def luminance(colour):
    """Relative luminance as WCAG defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour[:3])]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_fits_a_telephone(opened):
    size = {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    widths = opened.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert widths == [360, 360]
