"""One process of two: `python worker.py PROCESS PORT FOLDER WHAT`. test_distributed.py starts both.

Every process runs the same lines; JAX and the mesh make them one program.
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

import squeezejax
from squeezejax.storage import files as storage

CONTEXT = np.random.default_rng(3).integers(0, 97, 90)
QUESTIONS = np.array([[5, 6, 7, 8], [9, 10, 0, 0]], np.int32)
LENGTHS = np.array([4, 2], np.int32)
CONFIG = squeezejax.SqueezeConfig.paper(cluster_fractions=(0.25,), observation_window=8, sparsity=0.6)


def build(folder, mesh=None, progress=None):
    """A model, and a tree of the context."""
    params = squeezejax.models.load(folder / "model", mesh=mesh)
    return params, squeezejax.squeeze(params, CONTEXT, CONFIG, progress=progress)


def ask(params, tree) -> dict:
    """Generated tokens, and fractions of the keys kept."""
    options = {"lengths": LENGTHS, "max_new_tokens": 6, "implementation": "xla"}
    answer = squeezejax.generate(params, tree, QUESTIONS, **options)
    return {"tokens": np.asarray(answer.tokens).tolist(), "kept": np.asarray(answer.kept_fraction).tolist()}


def build_save_load_generate(folder, mesh):
    """Leaves found-PROCESS.json beside the folder: standard output is shared with Gloo's own messages."""
    params, tree = build(folder, mesh)
    squeezejax.save(folder / "together.tree", tree)
    found = {"answer": ask(params, squeezejax.load(folder / "together.tree", params, mesh=mesh))}

    if jax.process_index() == 0:
        os.fsync = _no_space
    try:
        squeezejax.save(folder / "full.tree", tree)
    except OSError as error:
        found["error"] = str(error)
    (folder.parent / f"found-{jax.process_index()}.json").write_text(json.dumps(found))


def _no_space(_):
    raise OSError(28, "No space left on device")


def die_while_building(folder, mesh):
    """Process 1 is killed when a layer has been clustered, and process 0 waits for it."""

    def progress(report):
        if report.done > 0.5 * report.total and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    _, tree = build(folder, mesh, progress)
    squeezejax.save(folder / "dead.tree", tree)


def die_while_saving(folder, mesh):
    """Process 1 is killed when it has handed over its shares of a few layers, and process 0 has written them."""
    tree = squeezejax.load(folder / "alone.tree", mesh=mesh)
    host_layers, handed = storage.host_layers, []

    def hand_over(array):
        for layer in host_layers(array):
            handed.append(layer)
            if len(handed) == 4 and jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield layer

    storage.host_layers = hand_over
    squeezejax.save(folder / "dead.tree", tree)


if __name__ == "__main__":
    process, port, folder, what = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(process), heartbeat_timeout_seconds=10)
    globals()[what](Path(folder), jax.make_mesh((2, 2), ("model", "context")))
