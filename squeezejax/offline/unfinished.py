"""An interrupted build's finished layers, kept in a folder until the tree is complete.

    layer-0000.tree …   one tree file (storage.py) of a single, uncalibrated layer each
    state.npz           what the next layer needs: hidden states, the calibration queries so far, how many layers

The state is replaced last and atomically, so that it never counts a layer that is not there. It names the build: model,
context, configuration and random seeds; a zip file, it has a CRC-32 of its own, as tree files do.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.storage import files as storage
from squeezejax.tree import Tree


class Unfinished:
    """The folder of one build; `num_layers` of its layers are finished."""

    def __init__(self, folder, params, context_hash, config, seeds):
        """Opens or makes the folder. Raises ValueError for one that holds another build, or anything else."""
        if jax.process_count() > 1:
            raise NotImplementedError(
                "finished layers are kept by a single process: give no checkpoint on several hosts"
            )
        self.folder = Path(folder)
        self._state = self.folder / "state.npz"
        self._build = {
            "model": _identity(params),
            "dtype": str(jax.tree.leaves(params)[0].dtype),
            "context": np.asarray(context_hash).tobytes().hex(),
            "configuration": json.dumps(dataclasses.asdict(config), sort_keys=True, default=int),
            "seeds": np.asarray(jax.random.key_data(seeds)).tobytes().hex(),
        }
        self._context_hash, self._fingerprint = context_hash, params.config.fingerprint
        self.num_layers = 0
        if self._state.exists():
            with self._reading() as state:
                self._check(json.loads(str(state["build"])))
                self.num_layers = int(state["num_layers"])
        elif self.folder.exists() and set(self.folder.iterdir()) - set(self._ours()):
            raise ValueError(f"{self.folder} holds something else than an unfinished build: name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)

    def layer(self, index: int) -> Tree:
        """A finished layer, its arrays without the axis L."""
        try:
            layer = storage.load(self._layer(index))
        except (storage.TreeFileError, FileNotFoundError) as error:
            raise ValueError(f"{error}: remove {self.folder} to build anew") from error
        layer = dataclasses.replace(layer, fingerprint=None, context_hash=None)  # marks of a finished tree
        return jax.tree.map(lambda leaf: leaf[0], layer)

    def state(self, like):
        """(queries of every finished layer, hidden states that the last one left), of the dtype and place of `like`."""
        with self._reading() as state:
            # NumPy files know no bfloat16: its bits come back as two nameless bytes.
            queries, x = (state[name].view(like.dtype) for name in ("queries", "x"))
        return list(jnp.asarray(queries)), jax.device_put(x, like.sharding)

    def write(self, index: int, layer: Tree, queries: list, x):
        """Layer `index` is finished: its arrays, without the axis L, all queries up to it, and what comes out of it."""
        layer = jax.tree.map(lambda leaf: leaf[None], layer)
        layer = dataclasses.replace(layer, fingerprint=self._fingerprint, context_hash=self._context_hash)
        storage.save(self._layer(index), layer)
        with storage.replacing(str(self._state)) as file:
            arrays = {"x": np.asarray(x), "queries": np.stack([np.asarray(q) for q in queries])}
            np.savez(file, build=json.dumps(self._build), num_layers=index + 1, **arrays)

    def remove(self):
        """Removes what the build has written, and the folder if nothing else is in it."""
        # The state first: layers without it are no build that could be resumed.
        for path in (self._state, *self._ours()):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer-{index:04}.tree"

    def _ours(self) -> list[Path]:
        """Layers, and temporary files that a killed process left behind."""
        return [*self.folder.glob("layer-[0-9]*.tree"), *self.folder.glob(".squeezejax-*.tmp")]

    def _check(self, build: dict):
        differ = [name for name, value in self._build.items() if build.get(name) != value]
        if differ:
            raise ValueError(
                f"{self.folder} holds an unfinished build that differs in {', '.join(differ)}: finish that one, or "
                "remove the folder to build anew"
            )

    @contextlib.contextmanager
    def _reading(self):
        try:
            with open(self._state, "rb") as file, np.load(file) as state:
                yield state
        except (zipfile.BadZipFile, EOFError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{self._state} is damaged: remove {self.folder} to build anew") from error


def _identity(params) -> str:
    """The fingerprint of loaded weights, or else a hash of those in memory."""
    if params.config.fingerprint is not None:
        return params.config.fingerprint
    digest = hashlib.sha256(repr(params.config).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
