"""Loading Hugging Face checkpoint directories, one slab of one tensor at a time.

Everything that can be refused is refused from config.json and the safetensors headers, before a tensor is read. Each
parameter, all layers stacked, then has one buffer that is filled in place and handed to JAX without a copy (on CPU),
so peak host memory stays near one copy of the weights.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from squeezejax.memory import bytes_per_device, check_loading_fits
from squeezejax.mesh import sharding
from squeezejax.models.config import LlamaConfig, parse_config, parse_stop_tokens
from squeezejax.models.llama import Llama

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Attribute path in `Llama` -> tensor name in the checkpoint; below "layers", the name within one layer.
_TENSORS = {
    "embedding": _EMBEDDING,
    "final_norm": "model.norm.weight",
    "head": _HEAD,
    "layers.attention_norm": "input_layernorm.weight",
    "layers.mlp_norm": "post_attention_layernorm.weight",
    "layers.attention.query": "self_attn.q_proj.weight",
    "layers.attention.key": "self_attn.k_proj.weight",
    "layers.attention.value": "self_attn.v_proj.weight",
    "layers.attention.output": "self_attn.o_proj.weight",
    "layers.attention.query_bias": "self_attn.q_proj.bias",
    "layers.attention.key_bias": "self_attn.k_proj.bias",
    "layers.attention.value_bias": "self_attn.v_proj.bias",
    "layers.attention.output_bias": "self_attn.o_proj.bias",
    "layers.attention.query_norm": "self_attn.q_norm.weight",
    "layers.attention.key_norm": "self_attn.k_norm.weight",
    "layers.mlp.gate": "mlp.gate_proj.weight",
    "layers.mlp.up": "mlp.up_proj.weight",
    "layers.mlp.down": "mlp.down_proj.weight",
    "layers.mlp.gate_bias": "mlp.gate_proj.bias",
    "layers.mlp.up_bias": "mlp.up_proj.bias",
    "layers.mlp.down_bias": "mlp.down_proj.bias",
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names -> NumPy's
_IGNORED = "rotary_emb.inv_freq"  # a buffer that old checkpoints stored; it follows from the config
_SLAB_BYTES = 8 << 20  # what is read at once; fingerprints depend on it, so it must not change
_SAMPLE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """One leaf of `Llama` and the tensors that fill it: one, or one a layer."""

    shape: tuple[int, ...]  # of the leaf
    names: tuple[str, ...]
    stored_shape: tuple[int, ...]  # of each tensor
    is_stacked: bool  # with an axis of layers, a tensor each


def load(path, dtype=None, *, mesh=None) -> Llama:
    """The parameters in a Hugging Face checkpoint directory (Llama, Mistral, Qwen2, Qwen3; safetensors).

    `dtype` is that of the parameters: float32, bfloat16 or float16; None means float32 on CPU and elsewhere the
    checkpoint's own. `params.config.stop_tokens` holds the checkpoint's end-of-sequence ids and
    `params.config.fingerprint` identifies its weights, whatever the `dtype`. On a mesh (`squeezejax.shardings`) every
    device reads its own share of the weights; no device, and with several processes no host, holds them all.

    Raises FileNotFoundError for a directory or file that is not there, and ValueError for a checkpoint that is
    damaged, does not fit its config.json, or needs what is not supported (see `parse_config`); the sentence names
    which. Both come before any tensor is read. ValueError, too, for weights that surely do not fit in memory.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"no checkpoint directory at {folder}; models are not downloaded, give a local path")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the checkpoint directory that holds config.json")
    raw = _read_json(folder / "config.json")
    config = _parse(folder, raw)
    stored = _read_headers(folder)
    tied = config.tie_embeddings
    if tied and _EMBEDDING not in stored and _HEAD in stored:
        stored[_EMBEDDING] = stored.pop(_HEAD)
    config = dataclasses.replace(config, tie_embeddings=tied and _HEAD not in stored)
    _check_tensors(folder, config, stored)
    target = _parameter_dtype(dtype, raw, stored)
    # As in transformers 5, a tied checkpoint that stores both is tied only where both are the same.
    if tied and _HEAD in stored and _same(stored[_EMBEDDING], stored[_HEAD]):
        config = dataclasses.replace(config, tie_embeddings=True)
    check_loading_fits(str(folder), bytes_per_device(_shapes(config, target), mesh), mesh)
    return _read(config, stored, target) if mesh is None else _read_shares(config, stored, target, mesh)


def _parse(folder: Path, raw: dict) -> LlamaConfig:
    generation = folder / "generation_config.json"
    sampling = _read_json(generation) if generation.exists() else {}
    try:
        config = parse_config(raw)
        return dataclasses.replace(config, stop_tokens=parse_stop_tokens(sampling) or config.stop_tokens)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _read_json(file: Path) -> dict:
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} has no {file.name}, so it is not a Hugging Face checkpoint directory")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # malformed JSON or UTF-8, or brackets without end
        raise ValueError(f"{file} is damaged, it is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged, it must hold a JSON object")
    return content


def _read_headers(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the checkpoint by name, from the headers of its safetensors files."""
    listed = _list_files(folder)
    stored = {}
    for file in sorted(set(listed.values())):
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name in stored:
                    raise ValueError(
                        f"{folder}: tensor {name} is stored twice, in {stored[name].file.name} and {file.name}"
                    )
                view = tensors.get_slice(name)
                stored[name] = _Stored(file, name, tuple(view.get_shape()), view.get_dtype())
    for name, file in listed.items():
        if name and (name not in stored or stored[name].file != file):
            raise ValueError(f"{folder}: the index says that {file.name} holds tensor {name}, but it does not")
    return {name: tensor for name, tensor in stored.items() if not name.endswith(_IGNORED)}


def _list_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, as the index has it; one nameless entry for a checkpoint of a single file."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return {"": single}
    if not index.exists():
        pickles = [file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in sorted(folder.glob(pattern))]
        if pickles:
            raise ValueError(
                f"{folder} has its weights in PyTorch files only ({pickles[0]}), which are not supported; convert them "
                "to safetensors, for example with transformers' from_pretrained and save_pretrained"
            )
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise ValueError(f"{index} is damaged, its weight_map must map tensor names to files")
    outside = sorted(file for file in set(shards.values()) if file in ("", "..") or file != Path(file).name)
    if outside:
        raise ValueError(f"{index} names files outside its folder ({_some(outside)}): only names of files are allowed")
    absent = sorted(file for file in set(shards.values()) if not (folder / file).is_file())
    if absent:
        raise FileNotFoundError(f"{folder} lacks {_some(absent)}, which {index.name} names")
    return {name: folder / file for name, file in shards.items()}


@contextlib.contextmanager
def _open(file: Path):
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged, or no safetensors file ({error})") from error


def _shapes(config: LlamaConfig, dtype) -> Llama:
    """`Llama` without weights."""
    return jax.eval_shape(lambda key: Llama(config, key=key, dtype=dtype), jax.random.key(0))


def _structure(config: LlamaConfig, dtype):
    """The parameters of a `Llama`, with the tensors that fill them, and its tree structure."""
    abstract = _shapes(config, dtype)
    leaves, treedef = jax.tree.flatten(abstract)
    paths = jax.tree_util.tree_leaves_with_path(abstract, is_leaf=lambda node: isinstance(node, nnx.Param))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return [_parameter(name, leaf.shape) for name, leaf in zip(names, leaves, strict=True)], treedef


def _parameter(path: str, shape: tuple[int, ...]) -> _Parameter:
    name, one, is_stacked = _TENSORS[path], shape, path.startswith("layers.")
    names = (name,)
    if is_stacked:
        names, one = tuple(f"model.layers.{layer}.{name}" for layer in range(shape[0])), shape[1:]
    if name.endswith((".bias", "norm.weight")):
        return _Parameter(shape, names, (math.prod(one),), is_stacked)
    inputs = one[1:] if path.endswith("attention.output") else one[-1:]  # output [D N H] has two input axes
    return _Parameter(shape, names, (math.prod(one) // math.prod(inputs), math.prod(inputs)), is_stacked)


def _check_tensors(folder: Path, config: LlamaConfig, stored: dict[str, _Stored]):
    """ValueError unless the stored tensors are those that the config asks for, in name, shape and kind."""
    if config.num_layers > len(stored):  # also spares the names of a damaged config's billion layers
        raise ValueError(
            f"{folder} stores {len(stored)} tensors, missing most of the {config.num_layers} layers it names"
        )
    parameters, _ = _structure(config, jnp.float32)
    expected = {name: parameter.stored_shape for parameter in parameters for name in parameter.names}
    strange = {name: tensor.dtype for name, tensor in stored.items() if tensor.dtype not in _DTYPES}
    if strange:
        raise ValueError(
            f"{folder} stores {_some(strange)} as {' and '.join(sorted(set(strange.values())))}: quantised weights are "
            "not supported, nor any type but F32, F16 and BF16; dequantise or convert the checkpoint first"
        )
    missing, surplus = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or surplus:
        parts = [
            f"{what} tensors: {_some(names)}" for what, names in (("missing", missing), ("surplus", surplus)) if names
        ]
        raise ValueError(f"{folder} does not hold the tensors that its config.json asks for; {'; '.join(parts)}")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{folder}: tensor {name} has shape {list(stored[name].shape)}, but config.json asks for {list(shape)}"
            )


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _parameter_dtype(dtype, raw: dict, stored: dict[str, _Stored]):
    if dtype is None and jax.default_backend() == "cpu":
        return jnp.dtype("float32")  # CPUs compute the half precisions more slowly and less exactly
    if dtype is None:
        declared = raw.get("dtype", raw.get("torch_dtype"))
        return jnp.dtype(declared if declared in _DTYPES.values() else _DTYPES[stored[_EMBEDDING].dtype])
    if jnp.dtype(dtype).name not in _DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES.values())}, got {jnp.dtype(dtype).name}")
    return jnp.dtype(dtype)


def _read(config: LlamaConfig, stored: dict[str, _Stored], dtype) -> Llama:
    """Reads every tensor, in an order that depends on the architecture only, and fingerprints them on the way."""
    digest = hashlib.blake2b(_architecture(config).encode(), digest_size=16)
    leaves = []
    for parameter in _structure(config, dtype)[0]:
        buffer = _aligned_empty(parameter.shape, dtype)
        tensors = buffer.reshape(len(parameter.names), *parameter.stored_shape)
        for name, rows in zip(parameter.names, tensors, strict=True):
            for start, slab in _hashed_slabs(digest, name, stored[name]):
                rows[start : start + len(slab)] = slab
        leaves.append(jax.device_put(buffer))
    # The config is part of the tree's structure, so this is the structure of the finished config.
    _, treedef = _structure(dataclasses.replace(config, fingerprint=digest.hexdigest()), dtype)
    return jax.tree.unflatten(treedef, leaves)


def _read_shares(config: LlamaConfig, stored: dict[str, _Stored], dtype, mesh) -> Llama:
    """`_read` onto a mesh: once through every tensor for the fingerprint, then each device's share by itself."""
    digest = hashlib.blake2b(_architecture(config).encode(), digest_size=16)
    parameters, treedef = _structure(config, dtype)
    shardings = jax.tree.leaves(sharding.shardings(mesh, _shapes(config, dtype)))
    for parameter in parameters:
        for name in parameter.names:
            for _ in _hashed_slabs(digest, name, stored[name]):
                pass
    leaves = [
        jax.make_array_from_callback(p.shape, wanted, functools.partial(_read_share, p, stored, dtype))
        for p, wanted in zip(parameters, shardings, strict=True)
    ]
    _, treedef = _structure(dataclasses.replace(config, fingerprint=digest.hexdigest()), dtype)
    return jax.tree.unflatten(treedef, leaves)


def _read_share(parameter: _Parameter, stored: dict[str, _Stored], dtype, index) -> np.ndarray:
    """The part of a parameter that `index`, a slice for every axis, cuts out; of stored tensors only that is read."""
    shape, layers = parameter.shape, [0]
    share = np.empty([len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)], dtype)
    if parameter.is_stacked:
        layers, index, shape = range(*index[0].indices(shape[0])), index[1:], shape[1:]
    part = _stored_part(parameter.stored_shape, shape, index)
    for layer, rows in zip(layers, share.reshape(len(layers), -1), strict=True):
        done = 0
        for _, slab in _slabs(stored[parameter.names[layer]], part):
            rows[done : done + slab.size] = slab.reshape(-1)
            done += slab.size
    return share


def _stored_part(stored_shape, shape, index) -> tuple[slice, ...]:
    """The slices of a stored matrix, or vector, that hold `index` of the parameter of `shape` made from it."""
    part, axis = [], 0
    for size in stored_shape:
        # A stored axis holds several of the parameter; it is the first of these that may be cut.
        unit = size // shape[axis]
        part.append(slice(*(end * unit for end in index[axis].indices(shape[axis])[:2])))
        while size > 1:
            size, axis = size // shape[axis], axis + 1
    return tuple(part)


def _architecture(config: LlamaConfig) -> str:
    """What the weights' meaning depends on; default values stay out, so that a new field changes no fingerprint."""
    advisory = ("max_positions", "stop_tokens", "fingerprint")
    fields = [field for field in dataclasses.fields(config) if field.name not in advisory]
    rope = [(field.name, getattr(config.rope, field.name), field.default) for field in dataclasses.fields(config.rope)]
    values = [(field.name, getattr(config, field.name), field.default) for field in fields if field.name != "rope"]
    return repr([(name, value) for name, value, default in values + rope if value != default])


def _aligned_empty(shape, dtype) -> np.ndarray:
    """An uninitialised array at an address that XLA's CPU backend takes over as it is, instead of copying."""
    alignment = 64
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)


def _slabs(tensor: _Stored, part: tuple[slice, ...] = (slice(None),)):
    """Yields (first row, rows) over a tensor, or over the part of it that the slices cut out.

    The file is opened anew for every slab: closing it unmaps the pages just read, which would count as this process's
    memory, a second copy of the checkpoint in the end.
    """
    row_bytes = math.prod(tensor.shape[1:]) * jnp.dtype(_DTYPES[tensor.dtype]).itemsize
    step = max(1, _SLAB_BYTES // row_bytes)
    first, end, _ = part[0].indices(tensor.shape[0])
    for start in range(first, end, step):
        with _open(tensor.file) as tensors:
            slab = tensors.get_slice(tensor.name)[(slice(start, min(start + step, end)), *part[1:])]
        yield start, slab


def _hashed_slabs(digest, name: str, tensor: _Stored):
    """The slabs of a tensor, which the digest of all weights takes in as they pass by."""
    digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
    for start, slab in _slabs(tensor):
        _sample(digest, slab)
        yield start, slab


def _sample(digest, slab: np.ndarray):
    """Both ends of the slab, and the sum of its 64-bit words, to which every byte contributes."""
    data = np.ascontiguousarray(slab).reshape(-1).view(np.uint8)
    digest.update(data[:_SAMPLE_BYTES])
    digest.update(data[-_SAMPLE_BYTES:])
    words = data[: data.size - data.size % 8].view(np.uint64)
    digest.update(int(words.sum(dtype=np.uint64)).to_bytes(8, "little"))


def _same(one: _Stored, other: _Stored) -> bool:
    slabs = zip(_slabs(one), _slabs(other), strict=True)
    return one.dtype == other.dtype and all(np.array_equal(a, b) for (_, a), (_, b) in slabs)
