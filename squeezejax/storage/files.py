"""Saving and loading trees: one file that comes back bit for bit, or is refused with a sentence that says why.

    8 bytes   N, length of the header, little endian
    N bytes   the header: JSON; `__metadata__` comes first and holds version, checksums, config and notes
    the rest  the tensors back to back, named by their path in `Tree` (`levels.0.centroids`); a None has no tensor

This is the safetensors layout, and any safetensors reader opens it. Every byte is under a CRC-32: that finds any one
flipped bit, any run of damage up to 32 bits, and all but one in 4 billion of the rest, at 7 GB/s (one core of an AMD
EPYC; SHA-256 2 GB/s). It protects from accidents, not from forgers: what a forged file can say is bounded by the
checks of `check_shapes` and `check_values`, so that a tree never points outside its own rows.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import secrets
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from squeezejax.arguments import check_model
from squeezejax.memory import check_loading_fits
from squeezejax.mesh.parts import distribute
from squeezejax.mesh.sharding import host_layers, shardings, size_of
from squeezejax.storage.header import (
    MOST_HEADER_BYTES,
    Header,
    StoredTensor,
    TreeFileError,
    check_shapes,
    encode,
    parse_header,
)
from squeezejax.storage.values import check_finite, check_values
from squeezejax.tree import Level, Tree

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TEMPORARY = re.compile(r"\.squeezejax-[0-9a-f]{16}\.tmp")


def save(path, tree: Tree, notes: dict[str, str] | None = None):
    """Writes a tree to one file; a file that was there stays whole until the new one is complete and on the disk.

    `notes` are strings to keep beside the tree, for `read_header`. Arrays may be sharded; they reach the host one layer
    at a time. A tree on the devices of several processes is saved by all of them together: process 0 writes, and none
    returns before the file is complete.

    Raises ValueError for a tree that `load` would refuse, FileNotFoundError for a directory that does not exist and
    IsADirectoryError for a path that is one, all before anything is written; OSError when writing fails, in every
    process. An exception removes the temporary file; a killed process leaves it behind (`.squeezejax-….tmp`), and the
    next save to the same directory removes it.
    """
    path = _writable(path)
    leaves = _named_leaves(tree)
    header = _describe(tree, leaves, notes or {})
    pieces = ((name, piece) for name in header.tensors for piece in host_layers(leaves[name]))
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves.values()):
        _write(path, header, pieces)
    else:
        _write_together(path, header, pieces)


def load(path, params=None, *, mesh=None) -> Tree:
    """The tree in a file that `save` wrote, bit for bit, on JAX's default device or on a mesh (`shardings`).

    The file is memory-mapped and handed over tensor by tensor, so that the host never holds a second copy; devices of
    a mesh are each given their share only. For a mesh that splits the context, a tree that is not laid out in such
    parts is rearranged on the way. With `params`, a tree for another model is refused before its tensors are read. The
    file must not be written to in place while it is read (`save` never does).

    Raises TreeFileError, naming the file and the reason, for one that is cut, altered, not a tree, of a newer version
    or for another model; OSError (FileNotFoundError, …) for one that cannot be read; ValueError as `shardings` does,
    and for a tree that surely does not fit in memory.
    """
    with _naming(path), open(path, "rb") as file:
        header, data_start = parse_header(file)
        if params is not None:
            _check_model(params, header)
        if mesh is not None:  # refused now rather than after reading; parts are made to fit
            shardings(mesh, dataclasses.replace(_shapes(header), parts=size_of(mesh, "context")))
        check_loading_fits("the tree", header.nbytes // (1 if mesh is None else mesh.size), mesh)
        # XLA's CPU backend takes host memory over as it is, where aligned. A tree must not go on living in the file:
        # a later change of the file would change it or end the process. Other devices copy what they are given.
        on_cpu = jnp.zeros(()).device.platform == "cpu"
        leaves = {}
        for name, tensor in header.tensors.items():
            rows = _map(file, tensor, data_start)
            rows = _aligned_copy(rows) if on_cpu and mesh is None else rows
            if zlib.crc32(rows.reshape(-1).view(np.uint8)) != tensor.crc32:
                raise TreeFileError(f"is altered: its tensor {name} does not match its checksum")
            if name.endswith(("keys", "values")):
                try:
                    check_finite(name, rows)
                except ValueError as error:
                    raise TreeFileError(f"is not a valid squeezejax tree: {error}") from error
            # On one device, done with the map before the next one.
            leaves[name] = rows if mesh is not None else jax.block_until_ready(jax.device_put(rows))
        try:
            check_values(leaves, header.num_keys, header.parts)
        except ValueError as error:
            raise TreeFileError(f"is not a valid squeezejax tree: {error}") from error
        tree = _assemble(header, leaves)
        return tree if mesh is None else jax.block_until_ready(distribute(mesh, tree))


def read_header(path) -> Header:
    """The header of a tree file, verified; of the tensors only that they are all there. Raises as `load` does."""
    with _naming(path), open(path, "rb") as file:
        return parse_header(file)[0]


# ---- Writing


def _writable(path) -> str:
    """The absolute path to write to, behind symbolic links, after checks of what is there now."""
    path = os.path.realpath(os.fsdecode(path))
    if os.path.isdir(path):
        raise IsADirectoryError(f"cannot save a tree to {path}: it is a directory")
    if not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(f"cannot save a tree to {path}: its directory does not exist")
    if os.path.exists(path) and not os.path.isfile(path):  # renaming over /dev/null would remove the device
        raise ValueError(f"cannot save a tree to {path}: it is not a regular file")
    return path


def _named_leaves(tree: Tree) -> dict:
    """Every array of the tree by its path: `keys`, `levels.0.centroids`, …; fields that are None have none."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _describe(tree: Tree, leaves: dict, notes: dict) -> Header:
    """The header for a tree, without checksums. Raises ValueError for what a file cannot hold."""
    if not all(isinstance(text, str) for item in notes.items() for text in item):
        raise ValueError("notes must map strings to strings")
    leaves = dict(leaves)
    digest = leaves.pop("context_hash", None)  # goes into the header, which is read without the tensors
    if digest is not None and (digest.shape != (32,) or digest.dtype != np.uint8):
        raise ValueError(f"cannot save this tree: context_hash must be u8[32], got {digest.dtype}{digest.shape}")
    # Large items first: every tensor then starts at a multiple of its item size.
    leaves = dict(sorted(leaves.items(), key=lambda item: -item[1].dtype.itemsize))
    sizes = (math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    tensors = {
        name: StoredTensor(np.dtype(leaf.dtype), tuple(leaf.shape), start)
        for (name, leaf), start in zip(leaves.items(), itertools.accumulate(sizes, initial=0), strict=False)
    }
    try:
        check_shapes(tensors, tree.config, tree.num_keys)
        check_values(leaves, tree.num_keys, tree.parts)
    except ValueError as error:
        raise ValueError(f"cannot save this tree: {error}") from error
    header = Header(
        config=tree.config,
        num_keys=tree.num_keys,
        tensors=tensors,
        fingerprint=tree.fingerprint,
        context_hash=None if digest is None else np.asarray(digest).tobytes().hex(),
        parts=tree.parts,
        notes=dict(notes),
    )
    if len(encode(header)) > MOST_HEADER_BYTES:
        raise ValueError(f"cannot save this tree: its notes do not fit in a header of {MOST_HEADER_BYTES} bytes")
    return header


def _write(path: str, header: Header, pieces):
    """The file of a header without checksums and of its tensors, given as (name, array) piece by piece."""
    checksums = dict.fromkeys(header.tensors, 0)
    with replacing(path) as file:
        # Checksums come first in the file and are known last; their digits have a fixed number.
        file.seek(len(encode(header)))
        for name, piece in pieces:
            rows = np.ascontiguousarray(piece)
            if name.endswith(("keys", "values")):
                try:
                    check_finite(name, rows)
                except ValueError as error:
                    raise ValueError(f"cannot save this tree: {error}") from error
            data = rows.reshape(-1).view(np.uint8)
            checksums[name] = zlib.crc32(data, checksums[name])
            file.write(data)
        tensors = {name: dataclasses.replace(header.tensors[name], crc32=crc32) for name, crc32 in checksums.items()}
        file.seek(0)
        file.write(encode(dataclasses.replace(header, tensors=tensors)))


def _write_together(path: str, header: Header, pieces):
    """`_write` by process 0, to which all processes hand over their shares of each piece."""
    failure = None
    try:
        if jax.process_index() == 0:
            _write(path, header, pieces)
    except (OSError, ValueError) as error:
        failure = error
    for _ in pieces:  # also after a failure: the other processes are waiting to hand over theirs
        pass
    failures = multihost_utils.process_allgather(np.array(failure is not None))
    if failure is not None:
        raise failure
    if failures.any():
        raise OSError(f"the tree was not saved to {path}: process 0 could not write it, and its own error says why")


@contextlib.contextmanager
def replacing(path: str):
    """A file to write in the block; at its end it is on the disk and takes the name, an exception removes it.

    It is never open to more people than the file that it replaces. What killed processes left behind beside it is
    removed first. An OSError of the system names `path`.
    """
    _sweep(os.path.dirname(path))
    temporary, file, lock = _temporary(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut could keep the new name and lose the new bytes
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, temporary):
            error.filename, error.filename2 = path, None
        raise
    finally:
        if lock is not None:
            os.close(lock)
    _sync_directory(os.path.dirname(path))


def _temporary(path: str):
    """(name, file, lock) of a new file beside path; whoever can lock it knows that it is abandoned."""
    mode = 0o666
    with contextlib.suppress(FileNotFoundError):
        mode &= os.stat(path).st_mode
    while True:
        name = os.path.join(os.path.dirname(path), f".squeezejax-{secrets.token_hex(8)}.tmp")
        file = open(name, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115 - for the caller
        lock = None
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock = os.dup(file.fileno())  # stays locked when the file is closed, until it has its name
            if lock is None or os.path.samestat(os.fstat(lock), os.stat(name)):
                return name, file, lock
        except (BlockingIOError, FileNotFoundError):  # another save swept it away before it was locked
            pass
        except OSError:  # some network drives cannot lock
            return name, file, lock
        file.close()
        if lock is not None:
            os.close(lock)


def _sweep(directory: str):
    """Removes temporary files of saves that were killed: nobody holds a lock on those."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        names = [entry.path for entry in entries if _TEMPORARY.fullmatch(entry.name) and entry.is_file()]
        for name in names:
            with contextlib.suppress(OSError):
                descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name)
                finally:
                    os.close(descriptor)


def _sync_directory(directory: str):
    """Makes the new name last through a power cut, where the system lets directories be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- Reading


@contextlib.contextmanager
def _naming(path):
    """Begins the sentence of a TreeFileError with the file."""
    try:
        yield
    except TreeFileError as error:
        raise TreeFileError(f"{os.fsdecode(path)} {error}") from error.__cause__


def _check_model(params, header: Header):
    try:
        check_model(params, _shapes(header))
    except ValueError as error:
        raise TreeFileError(f"cannot be used: {error}") from error


def _map(file, tensor: StoredTensor, data_start: int) -> np.ndarray:
    """A tensor's bytes in the file, as an array that reads them when they are looked at."""
    if not tensor.nbytes:
        return np.empty(tensor.shape, tensor.dtype)  # nothing can be mapped
    start = data_start + tensor.start
    return np.memmap(file, np.uint8, "r", start, tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)


def _aligned_copy(mapped: np.ndarray) -> np.ndarray:
    """A copy in memory that JAX on CPU takes over instead of copying it again."""
    room = np.empty(mapped.nbytes + 63, np.uint8)
    copy = room[-room.ctypes.data % 64 :][: mapped.nbytes].view(mapped.dtype).reshape(mapped.shape)
    copy[...] = mapped
    return copy


def _shapes(header: Header) -> Tree:
    """The tree of a file with shapes in place of arrays."""
    shapes = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in header.tensors.items()}
    return _assemble(header, shapes)


def _assemble(header: Header, leaves: dict) -> Tree:
    """The tree of the leaves named in the header."""
    top = {name: leaf for name, leaf in leaves.items() if "." not in name}
    fields = [field.name for field in dataclasses.fields(Level)]
    levels = (
        Level(**{name: leaves.get(f"levels.{i}.{name}") for name in fields}) for i in range(header.config.num_levels)
    )
    digest = None
    if header.context_hash is not None:
        digest = jnp.asarray(np.frombuffer(bytes.fromhex(header.context_hash), np.uint8))
    return Tree(
        **top,
        levels=tuple(levels),
        config=header.config,
        num_keys=header.num_keys,
        fingerprint=header.fingerprint,
        context_hash=digest,
        parts=header.parts,
    )
