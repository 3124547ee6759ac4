"""One program on many devices: where the arrays of params, trees and states lie on a mesh.

    mesh = jax.make_mesh((2, 2, 2), ("data", "model", "context"))  # any of these axes
    params = squeezejax.models.load(path, mesh=mesh)
    tree = squeezejax.squeeze(params, context)
    squeezejax.generate(params, tree, questions)

`data` splits users; `model` splits attention heads with their trees, the MLP and the vocabulary; `context` splits the
fixed context: each device holds some clusters of every head. Weights are JAX's to partition (GSPMD); whatever reads
the tree runs inside `shard_map`, where every gather is local.

The mesh is not an argument anywhere: the type of a tree's arrays names it (`mesh_of`), also under a caller's `jit`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "model", "context")
# Fewer key/value heads than devices of `model`: that axis is cut in two, and the devices of a group share their heads.
GROUP = "group"
# Which mesh axes split the axes of arrays. tree.py has the letters; besides: F the MLP's width, R rows of the context,
# and in a build, which has no users, X context tokens that are read together and E the hidden states kept for later.
_SPLIT = {
    "B": ("data",),
    "K": ("model",),
    "N": ("model", GROUP),
    "F": ("model", GROUP),
    "V": ("model", GROUP),
    "R": ("context",),
    "C": ("context",),
    "X": ("data", "context"),
    "E": ("data", "model", GROUP, "context"),
}


def shardings(mesh: Mesh | AbstractMesh, x):
    """The NamedSharding of every array of x: params, a tree or a state, or their shapes (`jax.ShapeDtypeStruct`).

    mesh has any of the axes `data`, `model` and `context`; x goes there by `jax.device_put(x, shardings(mesh, x))`.
    The mesh of the result is the given one with `Auto` axes and, where a model has fewer key/value heads than `model`
    has devices, with `model` cut in two, ("model", "group"): each head then lies on the devices of one group. An
    MLP's width or a vocabulary that `model` does not divide is kept whole on every device.

    Raises ValueError for a mesh with other axes, for heads or users that do not divide evenly, and for a tree that is
    not laid out in parts for `context` (`squeezejax.split_context`).
    """
    letters, sizes = _letters(x), {}
    for leaf, axes in zip(jax.tree.leaves(x), letters, strict=True):
        sizes.update(zip(axes, leaf.shape, strict=False))
    mesh = _cut_model(mesh, sizes["K"])
    _check_sizes(mesh, sizes)
    if hasattr(x, "parts"):
        _check_parts(mesh, x)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(mesh, x))


def spec(mesh, letters: str, shape=()) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these letters; sizes in `shape` that do not divide stay whole."""
    entries = []
    for i, letter in enumerate(letters):
        names = tuple(name for name in _SPLIT.get(letter, ()) if name in mesh.shape)
        if i < len(shape) and shape[i] % math.prod(mesh.shape[name] for name in names):
            names = ()
        entries.append(names if len(names) > 1 else next(iter(names), None))
    return PartitionSpec(*entries)


def specs(mesh, x):
    """`spec` for every array of params, a tree or a state."""
    leaves = [spec(mesh, letters, leaf.shape) for leaf, letters in zip(jax.tree.leaves(x), _letters(x), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(x), leaves)


def size_of(mesh, axis: str) -> int:
    """Devices along an axis of a mesh, 1 for one that it lacks."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def mesh_of(x) -> AbstractMesh | None:
    """The mesh that params or a tree lie on, concrete or traced; None on one device, and inside a shard_map."""
    mesh = jax.typeof(jax.tree.leaves(x)[0]).sharding.mesh
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    if not set(mesh.axis_names) <= {*AXES, GROUP} or AxisType.Explicit in mesh.axis_types:
        raise ValueError(f"arrays lie on {mesh}: place them by squeezejax.shardings(mesh, …)")
    return mesh


def context_axis(mesh) -> str | None:
    """The name of the axis that splits the context, for collectives; None if none does."""
    return "context" if size_of(mesh, "context") > 1 else None


def map_shards(f, mesh, in_specs, out_specs):
    """`jax.shard_map` without the check that results are replicated where the specs say so: the tests check it."""
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def constrain(beside, x, letters: str | None = None):
    """In a program: x, a state, a tree or an array with these letters, laid out on the mesh of what lies beside it."""
    mesh = mesh_of(beside)
    if mesh is None:
        return x
    layout = specs(mesh, x) if letters is None else spec(mesh, letters, x.shape)
    put = lambda spec, leaf: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))
    return jax.tree.map(put, layout, x)


def place(beside, x):
    """Between programs: x, params, a state or a tree, on the mesh of what lies beside it; shapes become zeros."""
    sharding = jax.tree.leaves(beside)[0].sharding
    wanted = jax.tree.map(lambda _: None, x) if mesh_of(beside) is None else shardings(sharding.mesh, x)

    def put(leaf, sharding):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, x, wanted)


def to_host(x):
    """x as NumPy arrays, also where devices of other processes hold parts of it; all processes must ask together."""

    def fetch(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
            leaf = jax.jit(lambda leaf: leaf, out_shardings=whole)(leaf)
        return np.asarray(leaf)

    return jax.tree.map(fetch, x)


def host_layers(array):
    """The layers of an array [L …] on the host, one after another; an array of less than three axes whole."""
    # JAX keeps the host's copy of an array that was fetched whole for as long as the array lives.
    return map(to_host, (array[i] for i in range(array.shape[0])) if array.ndim > 2 else [array])


def whole_on_host(array) -> np.ndarray:
    """`to_host`; what lies on several processes is never whole on a device, but for a layer at a time."""
    return np.asarray(array) if getattr(array, "is_fully_addressable", True) else np.stack(list(host_layers(array)))


def map_heads(f, keys, *args):
    """f(keys, *args) for arrays [K …] of one layer, each device with its own heads; f maps every head by itself."""
    mesh = mesh_of(keys)
    if mesh is None:
        return f(keys, *args)
    names, heads = (), keys.shape[0]
    for name in ("model", "context", "data"):  # the last two have nothing else to do meanwhile
        if heads % size_of(mesh, name) == 0 and name in mesh.shape:
            names, heads = (*names, name), heads // size_of(mesh, name)
    spread = PartitionSpec(names)
    return map_shards(f, mesh, spread, spread)(keys, *args)


def check_users(tree, num_users: int):
    """Raises ValueError unless the tree fits the mesh that it lies on, and its data axis divides the users evenly."""
    mesh = mesh_of(tree)
    _check_parts(mesh, tree)
    if num_users % size_of(mesh, "data"):
        raise ValueError(
            f"{num_users} users cannot be divided among the {size_of(mesh, 'data')} devices of the mesh's data axis: "
            "pad the batch"
        )


def _check_parts(mesh, tree):
    if tree.parts % size_of(mesh, "context"):
        raise ValueError(
            f"the tree is laid out in {tree.parts} parts, and the mesh's context axis has {size_of(mesh, 'context')} "
            "devices: lay it out anew by squeezejax.split_context(tree, parts)"
        )


def _letters(x) -> list[str]:
    """The letters of the axes of every leaf of x, whose class lists them by attribute path as AXES."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        name = ".".join(part for part in parts if not part.isdigit()).removesuffix(".value")
        letters = type(x).AXES.get(name, "")
        if len(letters) != len(leaf.shape):
            raise ValueError(f"the axes of {type(x).__name__}.{name}, of shape {leaf.shape}, are not known")
        found.append(letters)
    return found


def _cut_model(mesh: Mesh | AbstractMesh, num_kv_heads: int) -> Mesh | AbstractMesh:
    """The mesh with Auto axes, `model` cut in (model, group) where it has more devices than there are heads."""
    if not mesh.axis_names or not set(mesh.axis_names) <= {*AXES, GROUP}:
        raise ValueError(f"a mesh may have the axes {', '.join(AXES)}, this one has {mesh.axis_names}")
    shape, devices = dict(mesh.shape), size_of(mesh, "model")
    if devices > num_kv_heads and devices % num_kv_heads == 0 and GROUP not in shape:
        cut = {"model": num_kv_heads, GROUP: devices // num_kv_heads}
        shape = {
            name: size
            for axis in mesh.axis_names
            for name, size in (cut.items() if axis == "model" else [(axis, mesh.shape[axis])])
        }
    axis_types = (AxisType.Auto,) * len(shape)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=axis_types)
    return Mesh(mesh.devices.reshape(tuple(shape.values())), tuple(shape), axis_types=axis_types)


def _check_sizes(mesh: Mesh, sizes: dict[str, int]):
    names = {"K": "key/value heads", "N": "query heads", "B": "users"}
    for letter, name in names.items():
        devices = math.prod(size_of(mesh, axis) for axis in _SPLIT[letter])
        if sizes.get(letter, devices) % devices:
            raise ValueError(
                f"{sizes[letter]} {name} cannot be divided among {devices} devices of the mesh's "
                f"{_SPLIT[letter][0]} axis"
            )


def local_numbers(tree):
    """The tree with rows and clusters numbered within the part that a device holds, as its readers in shard_map need.

    In a tree at rest numbers count through all parts, so that one device reads it as it is.
    """
    n = size_of(mesh_of(tree), "context")
    if n == 1:
        return tree

    def relative(numbers, owners: int):  # i32[L K C]: the numbers of rows, or of clusters of another level
        C = numbers.shape[2]
        part = jnp.arange(C, dtype=jnp.int32) // (C // n)
        return numbers - (part * (owners // n))[None, None, :]

    levels = []
    for above, level, below in zip((None, *tree.levels), tree.levels, (*tree.levels[1:], None), strict=False):
        changes = {"starts": relative(level.starts, tree.keys.shape[2])}
        if above is not None:
            changes["parents"] = relative(level.parents, above.counts.shape[2])
        if below is not None:
            changes["child_starts"] = relative(level.child_starts, below.counts.shape[2])
        levels.append(dataclasses.replace(level, **changes))
    return dataclasses.replace(tree, levels=tuple(levels))
