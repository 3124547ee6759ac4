"""What `squeezejax info` says of a tree file, without the model and without reading its keys and values; or of this
machine."""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from squeezejax.chat.shown import shown_line
from squeezejax.memory import readable_bytes
from squeezejax.offline.thresholds import expected_missed_mass, log_thresholds
from squeezejax.pallas_kernels import registry
from squeezejax.storage import files as storage
from squeezejax.tree import Tree

# In JSON those below a space are escaped already; a line break here is one of the layout.
_UNSEEN = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SHOWN_SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def info(arguments):
    """`squeezejax info`."""
    content = describe_machine() if arguments.tree is None else describe_tree(arguments.tree)
    lines = _machine_lines if arguments.tree is None else _lines
    if arguments.json:
        print(_UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(content, indent=2, ensure_ascii=False)))
    else:
        print("\n".join(map(shown_line, lines(content))))


def describe_machine() -> dict:
    """What `info --json` prints without a tree: devices, and every implementation that answers questions."""
    devices = jax.devices()
    return {
        "jax": jax.__version__,
        "devices": [f"{device.platform}: {device.device_kind}" for device in devices],
        "implementation": registry.preferred(),
        "implementations": [found._asdict() for found in registry.survey()],
    }


def _machine_lines(content: dict):
    """`describe_machine` for people."""
    kinds = dict.fromkeys(content["devices"])
    counted = ", ".join(f"{content['devices'].count(kind)} × {kind}" for kind in kinds)
    yield f"devices          {counted}; JAX {content['jax']}"
    yield f"implementation   {content['implementation']}, unless another is named; what it refuses falls to the next:"
    for found in content["implementations"]:
        runs = "runs here" if found["missing"] is None else f"does not run: it {found['missing']}"
        yield f"  {found['name']:14} {runs}"
        yield f"  {'':14} checked {found['checked']}"


def describe_tree(path) -> dict:
    """What `info --json` prints, from the header and the small tensors; keys and values are not read."""
    header = storage.read_header(path)
    L, K, _, H = header.tensors["keys"].shape
    always_read = header.tensors["window_keys"].shape[2]
    with safe_open(path, framework="numpy") as tensors:
        counts = [tensors.get_tensor(f"levels.{i}.counts") for i in range(header.config.num_levels)]
        table = {}
        if "thresholds" in header.tensors:
            names = {"sparsities", "thresholds", "missed_masses"} & header.tensors.keys()
            table = {name: jnp.asarray(tensors.get_tensor(name)) for name in names}
    return {
        "file": os.path.abspath(path),
        "bytes": os.path.getsize(path),
        "version": header.version,
        "tokens": header.num_keys + always_read,
        "clustered_keys": header.num_keys,
        "sinks": header.config.sinks,
        "window": always_read - header.config.sinks,
        "layers": L,
        "kv_heads": K,
        "head_dim": H,
        "dtype": header.tensors["window_keys"].dtype.name,
        "levels": [_describe_level(count) for count in counts],
        "log_thresholds": _describe_thresholds(header, table),
        "missed_mass": _describe_missed(header, table),
        "config": dataclasses.asdict(header.config),
        "model_fingerprint": header.fingerprint,
        "context_sha256": header.context_hash,
        "notes": header.notes,
    }


def _describe_level(counts: np.ndarray) -> dict:
    """Clusters of one level, and how many keys the smallest, the mean and the largest live one have."""
    live = counts[counts > 0]
    return {
        "clusters": counts.shape[2],
        "smallest": int(live.min()),
        "mean": round(float(live.mean()), 2),
        "largest": int(live.max()),
    }


def _describe_thresholds(header, table) -> dict[str, list[float]] | None:
    """log T of every level at a few sparsities; None for a tree that is not calibrated."""
    if not table:
        return None
    tree = _tables(header, table)
    return {str(p): [round(float(t), 3) for t in log_thresholds(tree, p)] for p in SHOWN_SPARSITIES}


def _describe_missed(header, table) -> dict[str, float] | None:
    """The share of attention that goes to keys not read, at a few sparsities, as the build measured it."""
    if "missed_masses" not in table:
        return None
    tree = _tables(header, table)
    return {str(p): round(float(expected_missed_mass(tree, p)), 4) for p in SHOWN_SPARSITIES}


def _tables(header, table) -> Tree:
    """A tree of nothing but the tables."""
    nothing = dict.fromkeys(("keys", "values", "order", "window_keys", "window_values"))
    return Tree(**nothing, levels=(), config=header.config, num_keys=header.num_keys, **table)


def _lines(content: dict):
    """`describe_tree` for people."""
    config = content["config"]
    yield f"{content['file']} ({readable_bytes(content['bytes'])}, format version {content['version']})"
    sinks = f"{content['sinks']:,} sinks that are always read, " if content["sinks"] else ""
    yield (
        f"context      {content['tokens']:,} tokens: {sinks}{content['clustered_keys']:,} clustered, then a window "
        + (f"of {content['window']:,} that is always read")
    )
    yield (
        f"model        {content['layers']} layers, {content['kv_heads']} key/value heads of {content['head_dim']}, "
        f"{content['dtype']}; fingerprint {content['model_fingerprint'] or 'unknown'}"
    )
    if config["cache_bits"] == 8:
        yield "keys, values clustered ones in 8 bits, with a scale a row; sinks and window as the model gives them"
    for number, level in enumerate(content["levels"], 1):
        name = "levels" if number == 1 else ""
        yield (
            f"{name:12} {number}: {level['clusters']:,} clusters a head, of {level['smallest']:,} to "
            f"{level['largest']:,} keys, {level['mean']:.1f} on average"
        )
    bits = {bits: f"{bits} bits" for bits in (1, 2, 4, 8)} | {0: "none", 16: "bfloat16", 32: "float32"}
    yield f"index        {config['cluster_metric']} clusters in {bits[config['index_bits']]}, codes of keys: " + (
        f"{bits[config['key_bits']]}, score {config['score']}"
    )
    yield f"sparsity     {config['sparsity']:g} unless asked otherwise; selections shared by " + (
        f"{config['query_block'] or 'all'} tokens of a question"
    )
    if content["log_thresholds"] is None:
        yield "thresholds   none: the tree is not calibrated"
    else:
        yield "thresholds   sparsity  " + "  ".join(f"{p:>8}" for p in content["log_thresholds"])
        names = [*range(1, len(content["levels"]) + 1), *(["k"] if config["key_bits"] else [])]  # k: of single keys
        for number, name in enumerate(names):
            row = (thresholds[number] for thresholds in content["log_thresholds"].values())
            yield f"{'':12} log T, {name}  " + "  ".join(f"{value:8.2f}" for value in row)
    if content["missed_mass"] is not None:
        yield f"{'':12} missed    " + "  ".join(f"{share:8.1%}" for share in content["missed_mass"].values())
    yield f"context hash {content['context_sha256'] or 'unknown'}"
    for name, text in content["notes"].items():
        yield f"{'notes' if name == next(iter(content['notes'])) else '':12} {name} = {text!r}"
