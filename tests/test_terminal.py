"""What reaches a terminal or a log: control characters, the width of help, progress, versions, closed streams."""

import importlib.metadata
import io
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jax
import pytest

import squeezejax
from squeezejax.chat.shown import shown, shown_line
from squeezejax.command_line import cache, cli, waiting
from squeezejax.offline.progress import Bar, Progress

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\ttext\nÉ何🙂", "plain\ttext\nÉ何🙂"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x00\x07\x7f\x9b", r"\x00\x07\x7f\x9b"),
        ("\u202e\u2066\u200f", r"\u202e\u2066\u200f"),
        ("a\r\nb\rc", "a\nb\\rc"),
        ("\ud800", r"\ud800"),
    ],
)
def test_shown_by_hand(text, expected):
    assert shown(text) == expected
    assert shown_line(text) == expected.replace("\n", r"\n").replace("\t", r"\t")
    shown(text).encode()


@pytest.mark.parametrize("columns", [30, 50, 80, 100, 300])
@pytest.mark.parametrize("command", [[], ["demo"], ["build"], ["append"], ["ask"], ["info"], ["plan"]])
def test_help_is_as_wide_as_the_terminal(columns, command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    # Commands to copy, which are indented, stay whole, as do the longest words.
    lines = [line for line in lines if not line.startswith("  ") or line.startswith("  -")]
    assert max(map(len, lines)) <= max(min(110, columns), 40)
    assert columns < 80 or max(map(len, lines)) > columns / 2 or columns > 200


class Terminal(io.StringIO):
    def isatty(self):
        return True


def tell(bar):
    for second in range(100):
        bar(Progress("layer 1/2", second, 100, float(second)))
    bar(Progress("done", 100, 100, 100.0))


def test_a_log_has_a_line_now_and_then(capsys):
    tell(Bar())
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    assert [line.split()[1] for line in err.splitlines()] == ["30%", "60%", "90%", "100%"]
    assert err.endswith("squeezing 100%  100.0 s\n")


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    tell(Bar())
    assert terminal.getvalue().count("\r") == 101
    assert terminal.getvalue().count("\n") == 1


def say_something(monkeypatch, terminal, compiling: bool):
    """What is said in a block that goes on until it has been said, that compiles then, and what is left at its end."""
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    with waiting.waiting_for("loading the model"):
        wait_for(terminal)
        if compiling:
            jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_to_mlir_module_duration", 1.0)
            wait_for(terminal)
            jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.0)
    return terminal.getvalue()


def wait_for(terminal):
    """Until more has been said."""
    before = len(terminal.getvalue())
    while len(terminal.getvalue()) == before:
        time.sleep(0.01)


def test_a_log_says_once_what_is_waited_for(monkeypatch):
    said = say_something(monkeypatch, io.StringIO(), compiling=True)
    compiling = "squeezejax: loading the model: compiling, once for this machine …"
    assert said.splitlines() == ["squeezejax: loading the model …", compiling]
    assert waiting._Compiler.since is None


def test_a_terminal_shows_it_in_place(monkeypatch):
    said = say_something(monkeypatch, Terminal(), compiling=False)
    assert said.startswith("\rsqueezejax: loading the model … 0 s")
    *_, last, end = said.split("\r")
    assert (set(last), end) == ({" "}, "")


def test_what_is_fast_is_not_worth_a_word(capsys):
    with waiting.waiting_for("loading the model"):
        pass
    assert capsys.readouterr().err == ""


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"squeezejax {squeezejax.__version__}\n"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == squeezejax.__version__
    assert importlib.metadata.version("squeezejax") == squeezejax.__version__


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams(tmp_path, closed):
    (tmp_path / "a").write_text("no tree, and long enough")
    command = ["sh", "-c", f"exec {sys.executable} -m squeezejax info {tmp_path}/a {closed}"]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == cli.BAD_INPUT
    error = f"squeezejax info: {tmp_path}/a is not a squeezejax tree file\n"
    assert (done.stdout, done.stderr) == ("", "" if "2>" in closed else error)


# ---- The compilation cache

LOOK = """
import sys, jax
sys.argv = ["squeezejax", "info", *sys.argv[1:], "x"]
from squeezejax.command_line.cli import main
main()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache)
"""


@pytest.mark.parametrize("how", ["by default", "another folder", "off", "off by JAX's variable"])
def test_the_program_keeps_what_it_compiles(tmp_path, how):
    env = {**ENVIRONMENT, "XDG_CACHE_HOME": f"{tmp_path}/cache"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    if how == "another folder":
        env["JAX_COMPILATION_CACHE_DIR"] = f"{tmp_path}/mine"
    if how == "off by JAX's variable":
        env["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    command = [sys.executable, "-c", LOOK, *["--no-compilation-cache"] * (how == "off")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    folder, enabled = done.stdout.split()
    assert (enabled == "True") == (not how.startswith("off"))
    if how == "by default":
        assert folder.startswith(f"{tmp_path}/cache/squeezejax/compiled-")
        assert os.stat(folder).st_mode & 0o777 == 0o700
    if how == "another folder":
        assert folder == f"{tmp_path}/mine"


def test_a_cache_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache._folder().chmod(0o777)
    assert cache._folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert cache._folder() is None


def test_callers_keep_their_own_settings(capsys):
    before = jax.config.jax_compilation_cache_dir
    cli.main(["info", "nope"])
    assert jax.config.jax_compilation_cache_dir == before
    assert "No such file" in capsys.readouterr().err
