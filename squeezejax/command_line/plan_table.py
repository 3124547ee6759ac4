"""What `squeezejax plan` prints."""

import dataclasses
import json

import jax
from jax.sharding import AbstractMesh, AxisType

from squeezejax.command_line.commands import model_directory, read_model_config, squeeze_config
from squeezejax.memory import readable_bytes
from squeezejax.models.llama import Llama
from squeezejax.plan import Plan, dtype_of, plan

GB = 1e9


def plan_command(arguments):
    """`squeezejax plan`: 1 if the plan does not fit in the memory given, else 0."""
    folder = model_directory(arguments.model)
    model = read_model_config(folder)
    dtype = arguments.dtype or checkpoint_dtype(folder)
    params = jax.eval_shape(lambda: Llama(model, key=jax.random.key(0), dtype=dtype))
    axes = dict(arguments.mesh)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    config = squeeze_config(arguments)
    options = {"users": arguments.users, "room": arguments.question_tokens + arguments.new_tokens}
    made = plan(params, arguments.context_tokens, config, mesh=mesh, **options)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(made), indent=2))
    else:
        print("\n".join(plan_lines(made, params, arguments.device_memory, arguments.bandwidth)))
    needed = max(made.memory.build_floor, made.memory.answering)
    return int(arguments.device_memory is not None and needed > arguments.device_memory * GB)


def checkpoint_dtype(folder) -> str:
    """The dtype of a checkpoint's weights, as its config.json says; bfloat16 if it does not."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"


def plan_lines(made: Plan, params, device_memory: float | None = None, bandwidth: float | None = None):
    """A plan for people: device_memory in GB, bandwidth in GB/s, each of one device."""
    yield from _setting(made, params)
    yield ""
    yield from _memory_lines(made, device_memory)
    yield ""
    yield from _read_lines(made, bandwidth)
    if made.collectives:
        yield ""
        yield "told between devices in each decode step"
    for found in made.collectives:
        yield f"  {found.axis:9}{found.count:6,} × {found.what}, {readable_bytes(found.bytes)} in all"


def _setting(made: Plan, params):
    model, axes = params.config, made.axes or (("device", 1),)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    clusters = " and ".join(f"{count:,}" for count in made.clusters)
    yield (
        f"model     {model.num_layers} layers, {model.num_heads} query and {model.num_kv_heads} key/value heads of "
        f"{model.head_dim}, {parameters / 1e9:.3g} G parameters, {dtype_of(params)}"
    )
    yield f"context   {made.num_tokens:,} tokens, {clusters} clusters a head"
    yield f"users     {made.users}, with room for {made.room:,} tokens each"
    if made.dense_because is not None:
        yield f"answers   densely: {made.dense_because}"
    yield f"mesh      {' × '.join(f'{name} {size}' for name, size in axes)}"


def _memory_lines(made: Plan, device_memory: float | None):
    memory = made.memory
    yield "memory on each device"
    rows = {
        "weights": memory.weights,
        "keys and values": memory.keys_values,
        "centroids": memory.centroids,
        "codes of keys": memory.key_codes,
        "index, thresholds": memory.index,
        "sinks and window": memory.window,
        "users' own tokens": memory.state,
        "answering, at least": memory.answering,
        "answering, about": memory.answering + memory.temporaries,
        "GPU, no own kernels": memory.answering + memory.temporaries_wide,
        "building, at least": memory.build_floor,
        "building, about": memory.build_peak,
    }
    if not made.axes:
        # Where arrays share the memory with the program.
        rows |= {"on a CPU: answering": memory.resident_answering, "on a CPU: building": memory.resident_building}
    for name, size in rows.items():
        if name == "codes of keys" and not size:
            continue
        yield f"  {name:20}{_gigabytes(size)}"
    if device_memory is not None:
        yield f"  {'the device has':20}{_gigabytes(device_memory * GB)}  {_verdict(made, device_memory * GB)}"


def _verdict(made: Plan, available: float) -> str:
    memory = made.memory
    needed = max(memory.build_floor, memory.answering)
    if needed <= available:
        return "fits" if memory.build_peak <= available else "may be too little to build"
    if memory.weights >= available:
        return "too little for the weights: more devices on the model axis"
    # All but the weights grows with the context.
    tokens = made.num_tokens * (available - memory.weights) / (needed - memory.weights)
    return f"too little; about {tokens:,.0f} tokens would fit"


def _read_lines(made: Plan, bandwidth: float | None):
    dense, squeezed = made.dense, made.squeezed
    yield f"{'read by each decode step':26}{'dense':>12}{f'at sparsity {made.sparsity:g}':>22}"
    levels = [f"  centroids, level {i + 1}" for i in range(len(made.clusters))]
    rows = {
        "  weights": (dense.weights, squeezed.weights),
        **{name: (0, size) for name, size in zip(levels, squeezed.centroids, strict=False)},
        "  codes of keys": (0, squeezed.key_codes),
        "  keys and values": (dense.keys_values, squeezed.keys_values),
        "  sinks and window": (dense.window, squeezed.window),
        "  users' own tokens": (dense.own, squeezed.own),
        "  in all": (dense.total, squeezed.total),
    }
    for name, (before, after) in rows.items():
        if not before and not after:
            continue
        yield f"{name:22}{_gigabytes(before)}{_gigabytes(after):>22}"
    if bandwidth is not None:
        least, less = (f"{reads.total / bandwidth / 1e6:.3g} ms" for reads in (dense, squeezed))
        yield f"{f'  at {bandwidth:,.0f} GB/s, at least':22}{least:>16}{less:>22}"


def _gigabytes(size: float) -> str:
    return f"{size / GB:13.3f} GB"
