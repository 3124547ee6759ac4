"""The command line: arguments, the one line that an error takes, and build → info → ask → chat on a tiny checkpoint."""

import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from chat_models import CHATML, CONTEXT, make_tokenizer
from torch_models import make_model

import squeezejax
from squeezejax import SqueezeConfig, build_tree, models
from squeezejax.chat import prompts as chat
from squeezejax.chat import stream
from squeezejax.chat.prompts import assistant, user
from squeezejax.chat.shown import shown
from squeezejax.command_line import cli, commands, demo, info, trust
from squeezejax.explain.text import context_ids
from squeezejax.online import fallback
from squeezejax.pallas_kernels import registry
from squeezejax.storage import files as storage

QUESTION = "What is the passcode of Amber Falcon?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a ChatML tokenizer, a text and a tree of it."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = make_tokenizer("llama3", CHATML)
    tokenizer.save_pretrained(folder / "model")
    _model(len(tokenizer)).save_pretrained(folder / "model")
    other = make_model("llama", vocab_size=len(tokenizer), seed=1)
    other.save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    (folder / "text.txt").write_text(CONTEXT + "\n", encoding="utf-8")
    assert _build(folder, "text.tree") == 0
    return folder


def _model(vocab_size):
    return make_model("llama", vocab_size=vocab_size, max_position_embeddings=2048, eos_token_id=1)


def _build(folder, out, *extra):
    files = f"build --model {folder}/model --context {folder}/text.txt --out {folder}/{out}"
    return cli.main([*f"{files} --paper --window 8 --cluster-fractions 0.05,0.2 --quiet".split(), *extra])


def _reference(tokenizer, messages, count):
    """The reply of transformers' own model, given the whole conversation."""
    ids = chat.whole_prompt_ids(tokenizer, messages)
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 1}
    made = _model(len(tokenizer)).generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
    return chat.decode(tokenizer, made[0, len(ids) :].tolist())


# ---- The whole way


def test_build_says_what_it_wrote(folder, capsys):
    assert _build(folder, "again.tree", "--seed", "0") == 0
    out, err = capsys.readouterr()
    assert "tokens squeezed in" in out
    assert f"squeezejax ask --tree {folder}/again.tree" in out
    assert all(f"{kind} " in out for kind in ("(prefill", "clustering", "calibration", "checkpoints", "writing"))
    assert err == ""
    assert not (folder / "again.tree.unfinished").exists()
    assert (folder / "again.tree").read_bytes() == (folder / "text.tree").read_bytes()


def test_answers_are_those_of_the_whole_prompt(folder, capsys):
    """At sparsity 0 a question over the tree is a question over the whole rendered prompt."""
    tokenizer = chat.load_tokenizer(folder / "model")
    questions = (QUESTION, "Why 7?")
    arguments = ["ask", "--tree", f"{folder}/text.tree", "--max-new-tokens", "10", *questions]
    assert cli.main([*arguments, "--sparsity", "0"]) == 0
    squeezed = capsys.readouterr().out
    expected = [_reference(tokenizer, [user(f"{CONTEXT}\n\n{question}")], 10) for question in questions]
    texts = [f"> {question}\n{shown(reply.lstrip())}\n" for question, reply in zip(questions, expected, strict=True)]
    assert squeezed == "\n".join(texts)
    assert cli.main([*arguments, "--dense", "--stats"]) == 0
    dense, stats = capsys.readouterr()
    assert dense.split() == squeezed.split()
    assert stats.count("kept: 100.0% in replying, 100.0% in reading") == 2


def test_chat_sees_earlier_turns(folder, capsys, monkeypatch):
    tokenizer = chat.load_tokenizer(folder / "model")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why 7?\nHow many?\n\nnot asked\n"))
    arguments = ["ask", "--tree", f"{folder}/text.tree", "--chat", "--sparsity", "0", "--max-new-tokens", "10"]
    assert cli.main([*arguments, "--stats", QUESTION]) == 0
    out, err = capsys.readouterr()
    messages, text = [user(f"{CONTEXT}\n\n{QUESTION}")], ""
    for question in (QUESTION, "Why 7?", "How many?"):
        if question != QUESTION:
            messages.append(user(question))
        reply = _reference(tokenizer, messages, 10)
        text += f"you> {question}\n{shown(reply.lstrip())}\n"
        messages.append(assistant(reply.strip()))
    assert out == text
    assert err.count("keys of the context kept: 100.0% in replying") == 3


def test_append(folder, capsys):
    """At sparsity 0 a question over the longer tree is a question over both texts, joined by an empty line."""
    more = "In summer the miller's dog slept under the cart. The passcode of Silver Heron is indigo."
    (folder / "more.txt").write_text(more + "\n")
    files = f"--tree {folder}/text.tree --context {folder}/more.txt --out {folder}/longer.tree"
    assert cli.main(["append", *files.split(), "--quiet"]) == 0
    assert "tokens squeezed in" in capsys.readouterr().out
    assert (
        cli.main(["ask", "--tree", f"{folder}/longer.tree", "--sparsity", "0", "--max-new-tokens", "10", QUESTION]) == 0
    )
    tokenizer = chat.load_tokenizer(folder / "model")
    expected = _reference(tokenizer, [user(f"{CONTEXT}\n\n{more}\n\n{QUESTION}")], 10)
    assert capsys.readouterr().out == shown(expected.lstrip()) + "\n"
    notes = storage.read_header(folder / "longer.tree").notes
    assert notes["context"] == f"{folder}/text.txt, {folder}/more.txt"
    assert cli.main(["append", *files.split()]) == cli.BAD_INPUT
    assert "longer.tree exists; give --force" in capsys.readouterr().err


def test_session_reads_only_what_is_new(folder, monkeypatch):
    """A turn that keeps the beginning of what was read goes on from there, to the same reply as from the start."""
    params = models.load(folder / "model")
    options = stream.Options(max_new_tokens=10, sparsity=0.0)
    read = []

    def prefill(params, tree, tokens, **options):
        read.append(tokens.shape[1])
        return squeezejax.prefill(params, tree, tokens, **options)

    monkeypatch.setattr(stream, "prefill", prefill)
    session, fresh = (stream.Session(params, storage.load(folder / "text.tree"), options) for _ in range(2))
    first = [20, 21, 22, 23]
    reply = list(session.reply(first))
    assert list(session.reply(first)) == reply
    changed = [*first, *reply[:3], 24, 25]
    session.rehearse(changed)
    assert list(session.reply(changed)) == list(fresh.reply(changed))
    assert read == [4, 1, 9 - 7, 9 - 7, 9]


def test_sampling_repeats_with_its_seed(folder, capsys):
    def answer(*extra):
        sampling = ("--temperature", "2", "--top-k", "50", "--top-p", "0.95", "--max-new-tokens", "8")
        assert cli.main(["ask", "--tree", f"{folder}/text.tree", *sampling, *extra, QUESTION]) == 0
        return capsys.readouterr().out

    assert answer() == answer() != answer("--seed", "1")


def test_info(folder, capsys):
    assert cli.main(["info", f"{folder}/text.tree", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    tree = storage.load(folder / "text.tree")
    assert content["tokens"] == tree.context_length
    assert [level["clusters"] for level in content["levels"]] == [level.counts.shape[2] for level in tree.levels]
    assert content["notes"]["model"] == f"{folder}/model"
    assert content["config"]["observation_window"] == content["window"] == 8
    assert len(content["log_thresholds"]["0.9"]) == 2
    assert cli.main(["info", f"{folder}/text.tree"]) == 0
    text = capsys.readouterr().out
    assert f"{tree.context_length} tokens: {tree.num_keys} clustered, then a window of 8" in text
    assert all(len(line) < 120 for line in text.splitlines() if "=" not in line)


def test_info_of_the_machine(capsys):
    """Without a file: every implementation, and why it runs or does not."""
    assert cli.main(["info"]) == 0
    found = capsys.readouterr().out
    assert "implementation   xla, unless another is named" in found
    assert re.search(
        r"wide +does not run: it is for GPUs and TPUs, and this is a CPU\n +checked against plain XLA", found
    )
    assert re.search(r"xla +runs here\n +checked against float64", found)
    with registry.force_wide():
        assert cli.main(["info", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["implementation"] == "wide"
    assert [entry["name"] for entry in content["implementations"]] == ["mosaic", "wide", "xla"]
    assert [entry["missing"] is None for entry in content["implementations"]] == [False, True, True]


def test_info_says_what_a_sparsity_misses(tmp_path, capsys):
    keys, values, queries = (jax.random.normal(jax.random.key(i), (1, 2, 300, 8)) for i in range(3))
    tree = squeezejax.calibrate(build_tree(keys, values, SqueezeConfig()), queries[:, :, :100])
    storage.save(tmp_path / "a.tree", tree)
    assert cli.main(["info", "--json", str(tmp_path / "a.tree")]) == 0
    missed = json.loads(capsys.readouterr().out)["missed_mass"]
    for sparsity, share in missed.items():
        assert abs(share - float(squeezejax.expected_missed_mass(tree, float(sparsity)))) < 1e-4
    assert 0 < missed["0.5"] < missed["0.9"] < missed["0.99"] < 1
    least = squeezejax.sparsity_for(tree, missed["0.9"] + 1e-3)
    assert 0.9 <= least < 0.95
    assert cli.main(["info", str(tmp_path / "a.tree")]) == 0
    assert f"{missed['0.9']:8.1%}" in capsys.readouterr().out


def test_info_of_a_tree_that_is_not_calibrated(tmp_path):
    keys = jax.random.normal(jax.random.key(0), (2, 2, 40, 4))
    config = SqueezeConfig.paper(cluster_fractions=(0.2,), observation_window=0)
    labels = (np.broadcast_to(np.arange(40, dtype=np.int32) // 5, (2, 2, 40)),)
    storage.save(tmp_path / "bare.tree", build_tree(keys, keys, config, labels=labels))
    assert info.describe_tree(tmp_path / "bare.tree")["log_thresholds"] is None
    assert cli.main(["info", f"{tmp_path}/bare.tree"]) == 0
    with pytest.raises(ValueError, match="no notes on its prompt"):
        chat.Prompt.from_notes(storage.read_header(tmp_path / "bare.tree").notes)


def test_as_a_program(folder):
    """One real process: the console's own entry, its exit code, and a reader that goes away."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "squeezejax", "info", f"{folder}/text.tree"]
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, timeout=120, check=False)
    os.close(writing)
    assert (process.returncode, process.stderr) == (cli.BROKEN_PIPE, b"")


def test_dense_answers_are_said_to_be(folder, capsys, monkeypatch):
    """Where selecting cannot pay, one line says so; a named implementation selects."""
    monkeypatch.setattr(fallback, "OVERHEAD", 1e12)
    ask = f"ask --tree {folder}/text.tree --max-new-tokens 2 --stats"
    assert cli.main([*ask.split(), "hello"]) == 0
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert re.fullmatch(r"squeezejax: every key is read: .* at sparsity 0.9, .*\(--implementation xla .*\)", err[0])
    assert "kept: 100.0% in replying" in err[1]
    assert cli.main([*ask.split(), "--implementation", "xla", "hello"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "kept: 100.0%" not in line
    assert cli.main([*ask.split(), "--sparsity", "0", "hello"]) == 0
    assert "every key is read" not in capsys.readouterr().err
    page = ["--implementation", "xla", "--explain", f"{folder}/page.html", "hello"]
    assert cli.main([*ask.split(), *page]) == 0
    assert 'id="all-kept"' not in (folder / "page.html").read_text()


# ---- Builds that meet, and files that cannot be written


def test_a_build_waits_for_no_other(folder, capsys, monkeypatch):
    """The second of two builds to one file is refused before it loads a model; a failed save loses no layer."""

    save = storage.save

    def fail_at_the_tree(path, *rest):
        if "unfinished" in str(path):
            return save(path, *rest)
        assert _build(folder, "met.tree") == cli.BAD_INPUT
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save", fail_at_the_tree)
        assert _build(folder, "met.tree") == cli.FAILED
    err = capsys.readouterr().err
    assert f"another build is running in {folder}/met.tree.unfinished" in err
    assert f"{folder}/met.tree: No space left on device" in err
    assert (folder / "met.tree.unfinished").is_dir()
    assert _build(folder, "met.tree") == 0
    assert (folder / "met.tree").read_bytes() == (folder / "text.tree").read_bytes()
    assert not (folder / "met.tree.unfinished").exists()


def test_logs_have_lines_and_no_bars(folder, capsys):
    files = f"build --model {folder}/model --context {folder}/text.txt --out {folder}/logged.tree"
    assert cli.main([*files.split(), "--window", "8", "--cluster-fractions", "0.05,0.2"]) == 0
    err = capsys.readouterr().err
    assert "\r" not in err
    assert re.fullmatch(r"squeezing 100%  \d+\.\d s\n", err)


# ---- Whom the command line trusts


def test_the_folder_that_a_received_tree_names_is_not_opened(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # another user
    opened = []
    monkeypatch.setattr(commands, "read_model_config", lambda folder: opened.append(folder))
    append = f"append --tree {folder}/text.tree --context {folder}/text.txt --out {tmp_path}/more.tree"
    for line in (f"ask --tree {folder}/text.tree hello", append):
        assert cli.main(line.split()) == cli.BAD_INPUT
        err = capsys.readouterr().err
        assert f"names the model folder {folder}/model" in err
        assert "give it with --model" in err
    assert not opened
    assert not list(tmp_path.iterdir())


def test_a_received_tree_is_answered_with_the_model_given(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    line = f"ask --tree {folder}/text.tree --model {folder}/model --max-new-tokens 1 hello"
    assert cli.main(line.split()) == 0
    capsys.readouterr()
    assert _build(folder, "own.tree") == 0
    assert f'squeezejax ask --tree {folder}/own.tree "…"' in capsys.readouterr().out
    (key,) = (tmp_path / "squeezejax").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    notes = storage.read_header(folder / "own.tree").notes
    assert commands.asked_model(None, notes) == folder / "model"
    for forged in ({**notes, "model": "/evil"}, {**notes, trust.NOTE: "é"}, {"model": notes["model"]}):
        with pytest.raises(ValueError, match="not made by you"):
            commands.asked_model(None, forged)
    assert commands.asked_model(None, {"model": "embedded"}) == commands.model_directory("embedded")
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")  # no place for a key
    assert _build(folder, "unsigned.tree") == 0
    assert f"--tree {folder}/unsigned.tree --model {folder}/model" in capsys.readouterr().out


def test_code_of_a_tokenizer_is_never_run(folder, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    line = f"build --model {model} --context {folder}/text.txt --out {tmp_path}/a.tree"
    assert cli.main(line.split()) == cli.BAD_INPUT
    assert "such code is never run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_template_that_never_ends_is_stopped(monkeypatch):
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(chat, "LONGEST_RENDERING", 0.2)
    tokenizer = make_tokenizer("llama3", loops + CHATML)
    with pytest.raises(ValueError, match=r"template cannot render .*not done after 0.2 seconds"):
        chat.split_prompt(tokenizer, CONTEXT)
    assert sys.gettrace() is None


def test_control_characters_are_shown(folder, tmp_path, capsys, monkeypatch):
    """Of a note, a fingerprint and a generated text: shown as programs write them, and not obeyed."""
    evil = "a\x1b[2J\x00\u202eb"
    safe = r"a\x1b[2J\x00\u202eb"
    tree = dataclasses.replace(storage.load(folder / "text.tree"), fingerprint=evil)
    notes = storage.read_header(folder / "text.tree").notes
    storage.save(tmp_path / "evil.tree", tree, {**notes, "model": evil, evil: evil})
    assert cli.main(["info", f"{tmp_path}/evil.tree"]) == 0
    out = capsys.readouterr().out
    assert f"fingerprint {safe}" in out
    assert not set(out) & set("\x1b\x00\u202e")
    assert cli.main(["info", "--json", f"{tmp_path}/evil.tree"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["notes"][evil] == evil
    assert not set(out) & set("\x1b\x00\u202e")
    assert cli.main(["ask", "--tree", f"{tmp_path}/evil.tree", "hello"]) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert f"names the model folder {safe}:" in err
    monkeypatch.setattr(chat.Detokenizer, "push", lambda *_: evil)
    for dense in ([], ["--dense"]):
        line = ["ask", "--tree", f"{folder}/text.tree", "--max-new-tokens", "1", *dense, "hello"]
        assert cli.main(line) == 0
        assert capsys.readouterr().out.startswith(safe)


# ---- Errors take one line

BUILD = "build --model {0}/model --context {0}/text.txt --out {0}/new.tree"
ASK = "ask --tree {0}/text.tree"
WRONG = {
    "no such command": ("paint", "invalid choice: 'paint'"),
    "nothing required": ("build", "--model, --context, --out"),
    "no text": (BUILD.replace("text.txt", "nope.txt"), "nope.txt: No such file"),
    "empty text": (BUILD.replace("text.txt", "empty.txt"), "empty.txt is empty"),
    "not UTF-8": (BUILD.replace("text.txt", "bytes.txt"), "bytes.txt is not UTF-8 text (byte 3 is 0xff)"),
    "short text": (BUILD.replace("text.txt", "short.txt"), "nothing is left to squeeze"),
    "no model": (BUILD.replace("/model", "/nope"), "no model directory at"),
    "not a model": (BUILD.replace("/model", ""), "has no config.json"),
    "tree exists": (BUILD.replace("new.tree", "text.tree"), "text.tree exists; give --force"),
    "out is the text": (BUILD.replace("new.tree", "text.txt") + " --force", "is the text itself"),
    "out is a directory": (BUILD.replace("/new.tree", ""), "is a directory"),
    "out is a device": (BUILD.replace("{0}/new.tree", "/dev/null") + " --force", "is a device or a pipe"),
    "out is a pipe": (BUILD.replace("new.tree", "pipe"), "is a device or a pipe"),
    "page is a device": (ASK + " --explain /dev/null --force hello", "is a device or a pipe"),
    "page is a pipe": (ASK + " --explain {0}/pipe --force hello", "is a device or a pipe"),
    "out nowhere": (BUILD.replace("new.tree", "no/new.tree"), "no does not exist"),
    "sparsity no number": (BUILD + " --sparsity many", "--sparsity: must be a number, got 'many'"),
    "sparsity in percent": (BUILD + " --sparsity 90", "for 90 % write 0.9"),
    "fractions": (BUILD + " --cluster-fractions 0.1,0.05", "must increase from coarse to fine"),
    "window": (BUILD + " --window -1", "--window: must be at least 0"),
    "margin": (BUILD + " --coarse-margin 0.5", "coarse_margin must be at least 1"),
    "tree missing": ("ask --tree {0}/nope.tree hello", "nope.tree: No such file"),
    "not a tree": ("ask --tree {0}/text.txt hello", "is not a squeezejax tree file"),
    "cut tree": ("ask --tree {0}/cut.tree hello", "cut.tree is cut"),
    "another model": (ASK + " --model {0}/other hello", "made by another model"),
    "model gone": (ASK + " --model {0}/nope hello", "no model directory at"),
    "empty question": (ASK + " _", "the question is empty"),
    "no question": (ASK, "nothing to ask"),
    "dense chat": (ASK + " --dense --chat", "--dense answers single questions only"),
    "dense sparsity": (ASK + " --dense --sparsity 0.5 hello", "has no --sparsity"),
    "top-k alone": (ASK + " --top-k 5 hello", "need a --temperature above 0"),
    "top-p": (ASK + " --temperature 1 --top-p 0 hello", "--top-p must be above 0"),
    "temperature": (ASK + " --temperature -1 hello", "--temperature: must be at least 0"),
    "no tokens": (ASK + " --max-new-tokens 0 hello", "--max-new-tokens: must be at least 1"),
    "info of a text": ("info {0}/text.txt", "is not a squeezejax tree file"),
    "info of a directory": ("info {0}", "Is a directory"),
    "demo too short": ("demo --tokens 20", "--tokens: must be at least 200"),
}


@pytest.fixture(scope="module")
def broken(folder):
    (folder / "empty.txt").write_bytes(b"\xef\xbb\xbf \n")
    (folder / "bytes.txt").write_bytes(b"abc\xff")
    (folder / "short.txt").write_text("Too short.")
    os.mkfifo(folder / "pipe")
    (folder / "cut.tree").write_bytes((folder / "text.tree").read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(("line", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_input(line, sentence, broken, capsys):
    arguments = [" " if part == "_" else part.format(broken) for part in line.split()]
    try:
        code = cli.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (cli.BAD_INPUT, "", 1)
    assert err.startswith("squeezejax")
    assert sentence in err
    assert not (broken / "new.tree").exists()


FAILURES = {
    "failure": (RuntimeError("out of device\nmemory"), cli.FAILED, "squeezejax info: out of device memory\n"),
    "bug": (KeyError("x"), cli.FAILED, "squeezejax info: KeyError: 'x' (--debug shows where)\n"),
    "memory": (MemoryError(), cli.FAILED, "squeezejax info: out of memory\n"),
    "disk": (OSError(28, "No space left on device"), cli.FAILED, "squeezejax info: No space left on device\n"),
    "interrupted": (KeyboardInterrupt(), cli.INTERRUPTED, "\nsqueezejax: interrupted\n"),
}


@pytest.mark.parametrize(("error", "code", "line"), FAILURES.values(), ids=FAILURES)
def test_failures(error, code, line, capsys, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(info, "info", fail)
    assert cli.main(["info", "x"]) == code
    assert capsys.readouterr().err == line
    if code == cli.FAILED:
        assert cli.main(["info", "x", "--debug"]) == code
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["demo"], ["build"], ["append"], ["ask"], ["info"], ["plan"]])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "\n  squeezejax " in text  # an example line
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("command", ["build --model m --context c --out o", "plan --model m --context-tokens 9"])
def test_options_are_those_of_the_configuration(command):
    """Left out, the defaults, or with --paper the paper's; given, what is given."""
    config = lambda options: commands.squeeze_config(cli.make_parser().parse_args(f"{command} {options}".split()))
    assert config("") == SqueezeConfig()
    assert config("--paper") == SqueezeConfig.paper()
    assert config("--paper --sinks 2 --index-bits 8") == SqueezeConfig.paper(sinks=2, index_bits=8)
    every = "--cluster-fractions 0.1,0.2 --window 7 --sinks 3 --index-bits 16 --key-bits 1 --cluster-metric cosine"
    expected = {"cluster_fractions": (0.1, 0.2), "observation_window": 7, "sinks": 3, "index_bits": 16, "key_bits": 1}
    assert config(every) == SqueezeConfig(**expected, cluster_metric="cosine")
    assert config("--score mean --key-bits 0") == SqueezeConfig(score="mean", key_bits=0)
    assert config("--cache-bits 8") == SqueezeConfig(cache_bits=8)
    with pytest.raises(ValueError, match="key_bits=0"):
        config("--score mean")
    if command.startswith("build"):
        more = "--coarse-loss 0.1 --coarse-margin 2 --cluster-segment none --query-block none --cluster-cap 3"
        expected = {"coarse_loss": 0.1, "coarse_margin": 2.0, "cluster_segment": None, "query_block": None}
        assert config(more) == SqueezeConfig(**expected, cluster_cap=3.0)
        assert config("--cluster-segment 512").cluster_segment == 512


def test_without_a_command(capsys):
    assert cli.main([]) == 0
    assert "a first session" in capsys.readouterr().out


def test_warning_of_a_context_that_is_too_long(capsys):
    commands.warn_of_length(11, SimpleNamespace(max_positions=10))
    assert "trained for at most 10" in capsys.readouterr().err
    commands.warn_of_length(11, SimpleNamespace(max_positions=None))
    assert capsys.readouterr().err == ""


# ---- The demo's parts


def test_facts_are_spread():
    assert demo.choose_facts(list(range(10)), 5) == [1, 3, 5, 7, 9]
    assert demo.choose_facts(list(range(3)), 5) == [0, 1, 2]
    assert demo.choose_facts(list(range(7)), 1) == [3]


def test_summary_says_what_was_measured():
    dense = [demo.Answer("yes", True, 1.0, 10, 0.02), demo.Answer("no", True, 1.0, 10, 0.02)]
    squeezed = [demo.Answer("yes", True, 0.1, 10, 0.04), demo.Answer("so", False, 0.2, 10, 0.04)]
    text = demo.summarize(dense, squeezed, 3996, 100)
    assert "dense 2 of 2, squeezed 1 of 2; the same words in 1 of 2" in text
    assert "dense all 3,996, squeezed 15.0%" in text
    assert "dense 2.00 ms, squeezed 4.00 ms: squeezed was 2.00 times as slow" in text
    assert "2.00 times as fast" in demo.summarize(squeezed, dense, 3996, 100)


def test_what_next():
    assert "demo --out demo.tree" in demo.what_next(None, "Why?", lost=False)
    text = demo.what_next("my trees/demo.tree", "Why?", lost=True)
    assert """squeezejax ask --tree 'my trees/demo.tree' --implementation xla --stats "Why?"\n""" in text
    assert "squeezejax info 'my trees/demo.tree' " in text
    for line in text.splitlines():  # what is suggested can be parsed
        if "squeezejax ask" in line:
            command = line.split("  see what")[0].split("  ask in")[0]
            arguments = cli.make_parser().parse_args(shlex.split(command)[1:])
            assert arguments.implementation == demo.IMPLEMENTATION
    assert "--sparsity 0.7 " in text


@pytest.mark.skipif(
    not (commands.model_directory(commands.EMBEDDED) / "model.safetensors").exists(), reason="no embedded weights"
)
def test_demo(tmp_path, capsys):
    arguments = ["--tokens", "300", "--questions", "2", "--sparsity", "0.5", "--out", f"{tmp_path}/demo.tree"]
    assert cli.main(["demo", *arguments]) == 0
    out = capsys.readouterr().out
    assert "right answers   dense 2 of 2, squeezed" in out
    assert out.count("keys read 100.0%") == 2
    header, kept_text = storage.read_header(tmp_path / "demo.tree"), (tmp_path / "demo.tree.txt").read_text()
    assert header.notes["context"] == f"{tmp_path}/demo.tree.txt"
    tokenizer = chat.load_tokenizer(commands.model_directory(commands.EMBEDDED))
    assert context_ids(tokenizer, [kept_text], header)  # as `ask --explain` checks it
