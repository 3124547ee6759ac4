"""Two processes of two devices each, joined by jax.distributed on this machine: a run on several hosts in small."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torch_models import make_model

import squeezejax

FOLDER = Path(__file__).parent / "two_processes"
sys.path.insert(0, str(FOLDER))
import worker  # noqa: E402

LIMIT = 90  # seconds that the death of a process may stay unnoticed; the workers allow heartbeats to fail for 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and a tree that one process made of it."""
    folder = tmp_path_factory.mktemp("distributed") / "run"
    folder.mkdir()
    make_model("llama").save_pretrained(folder / "model")
    squeezejax.save(folder / "alone.tree", worker.build(folder)[1])
    return folder


def start(folder, what):
    """Both processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    # Programs that one run compiles serve the next.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, **cache, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    command = lambda process: [sys.executable, str(FOLDER / "worker.py"), str(process), port, str(folder), what]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command(process), env=environment, **pipes) for process in (0, 1)]


def test_the_tokens_are_those_of_one_process(folder):
    """Built, saved, loaded and asked over a mesh of both; and a disk that is full for the one that writes."""
    for process in start(folder, "build_save_load_generate"):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    params = squeezejax.models.load(folder / "model")
    alone = worker.ask(params, squeezejax.load(folder / "alone.tree", params))
    found = [json.loads((folder.parent / f"found-{process}.json").read_text()) for process in (0, 1)]
    for of_process in found:
        assert of_process["answer"]["tokens"] == alone["tokens"]
        np.testing.assert_allclose(of_process["answer"]["kept"], alone["kept"], rtol=1e-5)
    assert "No space left on device" in found[0]["error"]
    assert "process 0 could not write it" in found[1]["error"]
    # One file, which one process reads as well.
    assert worker.ask(params, squeezejax.load(folder / "together.tree", params)) == alone
    assert set(os.listdir(folder)) == {"model", "alone.tree", "together.tree"}


@pytest.mark.parametrize("what", ["die_while_building", "die_while_saving"])
def test_a_process_that_dies_ends_the_run(folder, what):
    survivor, victim = start(folder, what)
    victim.communicate(timeout=600)
    assert victim.returncode == -signal.SIGKILL
    died = time.monotonic()
    _, errors = survivor.communicate(timeout=600)
    assert time.monotonic() - died < LIMIT
    assert survivor.returncode != 0
    assert "another task died" in errors or "Gloo" in errors, errors
    assert not (folder / "dead.tree").exists()
