"""An interrupted build's finished layers, kept in a folder until the tree is complete.

    layer-0000.tree …   one tree file (storage.py) of a single, uncalibrated layer each
    state.npz           what the next layer needs: hidden states, the calibration queries so far, how many layers

The state is replaced last and atomically, so that it never counts a layer that is not there. It names the build: model,
context, configuration and random seeds, and so does every layer file, by a digest of all these and its own number: a
file of another build, or of another layer, is refused. While a build runs it holds a lock on the folder.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import zipfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.storage import files as storage
from squeezejax.tree import TreeLayer, stack_layers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STATE = "state.npz"


class Unfinished:
    """The folder of one build, locked while this is open; `num_layers` of its layers are finished.

    A context manager: leaving it unlocks the folder, and removes it where no layer was finished.
    """

    def __init__(self, folder, params, context_hash, config, seeds):
        """Opens or makes the folder. Raises ValueError for one that holds another build, or anything else.

        And for one in which another build is running; NotImplementedError on several hosts.
        """
        if jax.process_count() > 1:
            raise NotImplementedError(
                "finished layers are kept by a single process: give no checkpoint on several hosts"
            )
        self.folder = Path(folder)
        self._state = self.folder / STATE
        self._build = {
            "model": _identity(params),
            "dtype": str(jax.tree.leaves(params)[0].dtype),
            "context": np.asarray(context_hash).tobytes().hex(),
            "configuration": json.dumps(dataclasses.asdict(config), sort_keys=True, default=int),
            "seeds": np.asarray(jax.random.key_data(seeds)).tobytes().hex(),
        }
        self._most_layers = params.config.num_layers
        self._context_hash, self._fingerprint = context_hash, params.config.fingerprint
        self.num_layers = 0
        _refuse_others(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        try:
            if self._state.exists():
                found = self._read("build", "num_layers")
                self._check(json.loads(str(found["build"])))
                self._require(found["num_layers"].shape == ())
                self.num_layers = int(found["num_layers"])
                self._require(0 < self.num_layers <= self._most_layers)
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            if not self.num_layers:  # a first layer may have been written in part, or the disk be full
                self.remove()
        self._unlock()

    def layer(self, index: int) -> TreeLayer:
        """A finished layer. Raises ValueError for one of another build."""
        file = self._layer(index)
        try:
            notes = storage.read_header(file).notes
            tree = storage.load(file)
        except (storage.TreeFileError, FileNotFoundError) as error:
            raise ValueError(f"{error}: remove {self.folder} to build anew") from error
        if notes != self._notes(index):
            raise ValueError(f"{file} is of another build, or another layer: remove {self.folder} to build anew")
        return tree.layer(0)

    def state(self, like):
        """(queries of every finished layer, hidden states that the last one left), of the dtype and place of `like`.

        Raises ValueError where these are not the ones that were written with the number of layers.
        """
        found = self._read("seal", "queries", "x")
        # NumPy files know no bfloat16: its bits come back as two nameless bytes.
        same = all(found[name].dtype.itemsize == like.dtype.itemsize for name in ("queries", "x"))
        self._require(same and found["x"].shape == like.shape and len(found["queries"]) == self.num_layers)
        self._require(str(found["seal"]) == self._seal(self.num_layers, found["queries"], found["x"]))
        queries, x = (found[name].view(like.dtype) for name in ("queries", "x"))
        return list(jnp.asarray(queries)), jax.device_put(x, like.sharding)

    def write(self, index: int, layer: TreeLayer, queries: list, x):
        """Layer `index` is finished: its arrays, all queries up to it, and what comes out of it."""
        tree = dataclasses.replace(
            stack_layers([layer]), fingerprint=self._fingerprint, context_hash=self._context_hash
        )
        storage.save(self._layer(index), tree, self._notes(index))
        arrays = {"x": np.asarray(x), "queries": np.stack([np.asarray(q) for q in queries])}
        seal = self._seal(index + 1, arrays["queries"], arrays["x"])
        with storage.replacing(str(self._state)) as file:
            np.savez(file, build=json.dumps(self._build), num_layers=index + 1, seal=seal, **arrays)
        self.num_layers = index + 1

    def remove(self):
        """Removes what the build has written, and the folder if nothing else is in it."""
        # The state first: layers without it are no build that could be resumed.
        for path in (self._state, *_ours(self.folder)):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer-{index:04}.tree"

    def _notes(self, index: int) -> dict[str, str]:
        """What the file of layer `index` says of itself."""
        build = json.dumps(self._build, sort_keys=True)
        return {"layer": str(index), "build": hashlib.sha256(f"{index} {build}".encode()).hexdigest()}

    def _seal(self, num_layers: int, queries: np.ndarray, x: np.ndarray) -> str:
        """Binds the arrays of a state to the build and the number of layers that made them."""
        sums = [zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8)) for array in (queries, x)]
        return hashlib.sha256(f"{self._notes(num_layers)} {sums}".encode()).hexdigest()

    def _check(self, build):
        self._require(isinstance(build, dict))
        differ = [name for name, value in self._build.items() if build.get(name) != value]
        if differ:
            raise ValueError(
                f"{self.folder} holds an unfinished build that differs in {', '.join(differ)}: finish that one, or "
                "remove the folder to build anew"
            )

    def _require(self, condition):
        if not condition:
            raise ValueError(f"{self._state} is damaged: remove {self.folder} to build anew")

    def _read(self, *names: str) -> dict[str, np.ndarray]:
        """Arrays of the state by name."""
        try:
            with open(self._state, "rb") as file, np.load(file) as state:
                found = {name: state[name] for name in names}
                if "build" in found:
                    json.loads(str(found["build"]))
                return found
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{self._state} is damaged: remove {self.folder} to build anew") from error

    def _unlock(self):
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def check_free(folder):
    """Raises ValueError for a folder in which a build is running, or that holds something else; writes nothing."""
    folder = Path(folder)
    _refuse_others(folder)
    if folder.exists() and (lock := lock_folder(folder)) is not None:
        os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """A descriptor that keeps others from locking the folder until it is closed; None where systems cannot lock.

    Raises ValueError for a folder that is locked.
    """
    while fcntl is not None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ValueError(f"another build is running in {folder}: wait for it, or name another folder") from error
        except OSError:  # some network drives cannot
            os.close(descriptor)
            return None
        # Whoever held the lock may have removed the folder meanwhile: then make it again, and lock that one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
        os.close(descriptor)
        folder.mkdir(parents=True, exist_ok=True)
    return None


def _refuse_others(folder: Path):
    """Raises ValueError unless a folder holds an unfinished build, is empty or is not there."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file where the folder of an unfinished build should be: remove or rename it")
    if folder.is_dir() and not (folder / STATE).exists() and set(folder.iterdir()) - set(_ours(folder)):
        raise ValueError(f"{folder} holds something else than an unfinished build: name another folder")


def _ours(folder: Path) -> list[Path]:
    """Layers, and temporary files that a killed process left behind."""
    return [*folder.glob("layer-[0-9]*.tree"), *folder.glob(".squeezejax-*.tmp")]


def _identity(params) -> str:
    """The fingerprint of loaded weights, or else a hash of those in memory."""
    if params.config.fingerprint is not None:
        return params.config.fingerprint
    digest = hashlib.sha256(repr(params.config).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
