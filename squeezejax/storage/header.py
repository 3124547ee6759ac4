"""The header of a tree file: what it holds, how it is written, and reading it without trust in any of it.

VERSION grows whenever a file can hold what earlier readers do not know. Every version keeps the beginning
(`_BEGINNING`), so that readers can tell a newer file from a damaged one.
"""

import dataclasses
import json
import math
import operator
import os
import re
import zlib

import jax.numpy as jnp
import numpy as np

from squeezejax.config import SqueezeConfig

# 1: only trees as the paper's, whose configuration lacks the fields of the index. 2: no keys and values in 8 bits.
VERSION = 3
MOST_HEADER_BYTES = 16 << 20  # far above any real header; bounds what a damaged length can make us read

_FORMAT = "squeezejax tree"
_FIRST = b'{"__metadata__":{"format":"%s","version":"' % _FORMAT.encode()
_BEGINNING = re.compile(re.escape(_FIRST) + rb'([1-9][0-9]{0,3})","header_crc32":"([0-9a-f]{8})"')
_REQUIRED = {"format", "version", "header_crc32", "checksums", "config", "num_keys", "notes"}
_OPTIONAL = {"fingerprint", "context_sha256", "parts"}
_DTYPES = {  # safetensors' names
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}


class TreeFileError(ValueError):
    """A file that is no whole, unaltered tree of a known version (and, where asked, for this model)."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a tree file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes after the header
    crc32: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file, exact at any size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Header:
    """What a tree file says of itself."""

    config: SqueezeConfig
    num_keys: int  # S
    tensors: dict[str, StoredTensor]  # in the order of the file
    fingerprint: str | None = None  # of the model; None = unknown
    context_hash: str | None = None  # SHA-256 of the context's token ids in hexadecimal digits
    parts: int = 1  # that the tree is laid out in
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # whatever the writer wanted kept beside the tree
    version: int = VERSION

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what the tree takes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def encode(header: Header) -> bytes:
    """Length and header as they stand in the file; as long whatever the checksums are."""
    metadata = {
        "format": _FORMAT,
        "version": str(header.version),
        "header_crc32": "0" * 8,
        "checksums": _compact({name: f"{tensor.crc32:08x}" for name, tensor in header.tensors.items()}),
        "config": _compact(dataclasses.asdict(header.config)),
        "num_keys": str(header.num_keys),
        "fingerprint": header.fingerprint,
        "context_sha256": header.context_hash,
        "parts": str(header.parts) if header.parts > 1 else None,
        "notes": _compact(header.notes),
    }
    names = {dtype: name for name, dtype in _DTYPES.items()}
    content = {"__metadata__": {name: text for name, text in metadata.items() if text is not None}}
    for name, tensor in header.tensors.items():
        offsets = [tensor.start, tensor.start + tensor.nbytes]
        content[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = _compact(content).encode()
    text += b" " * (-len(text) % 8)
    return seal(len(text).to_bytes(8, "little") + text)


def seal(head: bytes) -> bytes:
    """Length and header with the header's checksum, of all these bytes with zeros for its digits, in its place."""
    begin, end = _BEGINNING.match(head, 8).span(2)
    checksum = zlib.crc32(head[:begin] + b"0" * 8 + head[end:])
    return head[:begin] + b"%08x" % checksum + head[end:]


def _compact(value) -> str:
    return json.dumps(value, separators=(",", ":"), default=operator.methodcaller("item"))  # NumPy's numbers


def parse_header(file) -> tuple[Header, int]:
    """The header and where the tensors start. Nothing that the file says is used before it is checked."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    text = file.read(min(length, MOST_HEADER_BYTES))
    _check_beginning(length, text, size)
    try:
        header = _interpret(_parse(text.decode()))
        check_shapes(header.tensors, header.config, header.num_keys)
    # Deep JSON recurses too far; a config field of the wrong kind is a TypeError, one of 4,000 digits overflows.
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise TreeFileError(f"is not a valid squeezejax tree: {error}") from error
    missing = 8 + length + header.nbytes - size
    if missing > 0:
        raise TreeFileError(f"is cut: {missing} of its {size + missing} bytes are missing")
    if missing < 0:
        raise TreeFileError(f"is altered: {-missing} bytes follow the end of its last tensor")
    return header, 8 + length


def _check_beginning(length: int, text: bytes, size: int):
    """Tells foreign, cut, altered and newer files apart; `text` is what could be read of a header of `length` bytes."""
    if size < 8:
        raise TreeFileError(f"is cut, or no tree file at all: it has {size} bytes")
    is_ours = _FORMAT.encode() in text or (len(text) < length and _FIRST.startswith(text))
    if not is_ours:
        raise TreeFileError("is not a squeezejax tree file")
    if length > MOST_HEADER_BYTES:
        raise TreeFileError("is altered: the length of its header is damaged")
    if len(text) < length:
        raise TreeFileError(f"is cut: at least {length - len(text)} bytes are missing")
    beginning = _BEGINNING.match(text)
    sealed = beginning is not None and seal(length.to_bytes(8, "little") + text)[8:] == text
    version = re.search(rb'"version": ?"([1-9][0-9]{0,3})"', text)
    if version is not None and int(version[1]) > VERSION:
        doubt = "" if sealed else " (or it is altered: its header does not match its checksum)"
        raise TreeFileError(
            f"is of version {int(version[1])} of the tree format, and this squeezejax reads versions up to {VERSION}: "
            f"upgrade squeezejax{doubt}"
        )
    if not sealed:
        raise TreeFileError("is altered: its header does not match its checksum")


def require(condition, otherwise: str):
    """Raises ValueError(otherwise) unless the condition holds."""
    if not condition:
        raise ValueError(otherwise)


def _parse(text: str) -> dict:
    """A JSON object whose objects repeat no name (most parsers, this one included, would keep the last)."""
    content = json.loads(text, object_pairs_hook=_without_repeats)
    require(isinstance(content, dict), "its header does not hold JSON objects")
    return content


def _without_repeats(pairs: list) -> dict:
    content = dict(pairs)
    require(len(content) == len(pairs), "its header repeats a name")
    return content


def _interpret(content: dict) -> Header:
    """The header in a JSON object; what does not fit raises ValueError (or TypeError, inside the config)."""
    metadata = content.pop("__metadata__")  # there: `_BEGINNING` matched, and no name occurs twice
    strings = isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    require(strings and _REQUIRED <= metadata.keys() <= _REQUIRED | _OPTIONAL, "its metadata is not that of a tree")
    notes, checksums = _parse(metadata["notes"]), _parse(metadata["checksums"])
    require(all(isinstance(text, str) for text in notes.values()), "a note is not a string")
    require(re.fullmatch("[1-9][0-9]{0,9}", metadata["num_keys"]), "its number of keys is not a number")
    parts = metadata.get("parts", "1")
    require(re.fullmatch("[1-9][0-9]{0,5}", parts), "its number of parts is not a number")
    context_hash = metadata.get("context_sha256")
    require(context_hash is None or re.fullmatch("[0-9a-f]{64}", context_hash), "its context's hash is not SHA-256")
    return Header(
        config=_interpret_config(metadata),
        num_keys=int(metadata["num_keys"]),
        tensors=_interpret_tensors(content, checksums),
        fingerprint=metadata.get("fingerprint"),
        context_hash=context_hash,
        parts=int(parts),
        notes=notes,
        version=int(metadata["version"]),
    )


def _interpret_config(metadata: dict) -> SqueezeConfig:
    fields = _parse(metadata["config"])
    if metadata["version"] == "1":
        return SqueezeConfig.paper(**fields)
    if metadata["version"] == "2":
        fields = {"cache_bits": 16} | fields
    names = {field.name for field in dataclasses.fields(SqueezeConfig)}
    require(fields.keys() == names, "its configuration lacks fields, or has others")
    return SqueezeConfig(**fields)


def _interpret_tensors(content: dict, checksums: dict) -> dict[str, StoredTensor]:
    """The tensors by name; they must lie back to back in the order of the header."""
    require(content.keys() == checksums.keys(), "its tensors and its checksums differ in their names")
    tensors, start = {}, 0
    for name, entry in content.items():
        fields = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        require(fields, f"tensor {name!r} lacks dtype, shape or data_offsets")
        shape, offsets, dtype, checksum = entry["shape"], entry["data_offsets"], entry["dtype"], checksums[name]
        require(isinstance(dtype, str) and dtype in _DTYPES, f"tensor {name!r} has a dtype that trees do not have")
        lists = isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= 4
        require(lists and all(type(n) is int and n >= 0 for n in shape + offsets), f"tensor {name!r} has no shape")
        require(isinstance(checksum, str) and re.fullmatch("[0-9a-f]{8}", checksum), f"tensor {name!r} has no checksum")
        tensors[name] = StoredTensor(_DTYPES[dtype], tuple(shape), start, int(checksum, 16))
        require(offsets == [start, start + tensors[name].nbytes], f"tensor {name!r} does not lie where its shape says")
        start += tensors[name].nbytes
    return tensors


def check_shapes(tensors: dict[str, StoredTensor], config: SqueezeConfig, num_keys: int):
    """Raises ValueError unless the tensors are those of a tree, with dtypes and axes that fit together."""
    given = tensors["window_keys"].dtype if "window_keys" in tensors else None  # by the model
    stored, bf16 = (np.int8 if config.cache_bits == 8 else given), jnp.dtype(jnp.bfloat16)
    required = dict.fromkeys(("keys", "values"), (stored, "LKRH")) | {"order": (np.int32, "LKR")}
    required |= dict.fromkeys(("window_keys", "window_values"), (given, "LKWH"))
    if config.cache_bits == 8:
        required |= dict.fromkeys(("key_scales", "value_scales"), (bf16, "LKR"))
    for i in range(config.num_levels):
        of_cluster = ("L", "K", f"C{i}")
        if config.index_bits >= 16:
            dtype = np.float32 if config.index_bits == 32 else bf16
            required[f"levels.{i}.centroids"] = (dtype, (*of_cluster, "H"))
        else:
            required[f"levels.{i}.codes"] = (np.uint8, (*of_cluster, "b"))
            required[f"levels.{i}.steps"] = (bf16, of_cluster)
            required[f"levels.{i}.offset"] = (np.float32, "LKH")
        if config.score == "variance":
            required[f"levels.{i}.spreads"] = (bf16, of_cluster)
        links = ("child_starts", "child_counts") if i < config.num_levels - 1 else ()
        for name in ("counts", "starts", "parents", *links):
            required[f"levels.{i}.{name}"] = (np.int32, of_cluster)
    if config.key_bits:
        required |= {"key_codes": (np.uint8, "LKRk"), "key_steps": (bf16, "LKR")}
    table = {"sparsities": (np.float32, "P"), "thresholds": (np.float32, "nP")}
    if config.score == "variance":
        table |= {"block_thresholds": (np.float32, "nP"), "denominators": (np.float32, "LKGz")}
        table["missed_masses"] = (np.float32, "P")
    means = {f"levels.{i}.value_centroids": (np.float32, ("L", "K", f"C{i}", "H")) for i in range(config.num_levels)}
    expected = required
    for optional in (table, means):  # all of it, or nothing
        expected = expected | (optional if optional.keys() & tensors.keys() else {})
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"tensor {name!r} is {'missing' if name in expected else 'not one of a tree'}")
    groups = tensors["keys"].shape[-1:]
    eighths = -(-groups[0] // 8) if groups else 0
    sizes = {"n": config.num_thresholds, "z": 2, "b": config.index_bits * eighths, "k": config.key_bits * eighths}
    for name, (dtype, axes) in expected.items():
        shape = tensors[name].shape
        same = (sizes.setdefault(axis, n) == n for axis, n in zip(axes, shape, strict=False))
        require(
            len(shape) == len(axes) and all(same),
            f"the shape {list(shape)} of tensor {name} does not fit the other tensors",
        )
        require(tensors[name].dtype == dtype, f"tensor {name} has dtype {tensors[name].dtype}")
    require(given in (np.float32, jnp.bfloat16, np.float16), f"tensor window_keys has dtype {given}")
    require(all(n > 0 for axis, n in sizes.items() if axis not in ("W", "k")), "an axis has no entries")
    require(num_keys <= sizes["R"] < 2**31, f"it has {sizes['R']} rows for {num_keys} keys")
    require(config.sinks <= sizes["W"], f"it has {sizes['W']} tokens that are always read for {config.sinks} sinks")
    require(sizes.get("P", 2) >= 2, "its table of thresholds has only one entry")
