"""What arrays take on each device, what a device has, and refusing work that surely does not fit before it starts.

A refusal must never hit anyone who would have fit. So what is compared is a lower bound of the need, arrays that are
certainly alive at the same time, with an upper bound of the supply; temporaries, fragmentation and other users of the
device are left out of both.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from squeezejax.mesh.sharding import mesh_of, shardings, size_of


def bytes_by_name(x, mesh=None) -> dict[str, int]:
    """Bytes on each device of every array of a pytree, by its path.

    With a mesh, as `shardings` places params, a tree or a state on it; else where the arrays lie.
    """
    named = jax.tree_util.tree_leaves_with_path(x)
    if mesh is None:
        places = [getattr(leaf, "sharding", None) for _, leaf in named]
    else:
        places = jax.tree.leaves(shardings(mesh, x))
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): local_bytes(leaf, place)
        for (path, leaf), place in zip(named, places, strict=True)
    }


def bytes_per_device(x, mesh=None) -> int:
    """Bytes of a pytree on each device; see `bytes_by_name`."""
    return sum(bytes_by_name(x, mesh).values())


def local_bytes(array, sharding) -> int:
    """Bytes on each device of one array, or its shape and dtype; None is a single device."""
    shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize


def device_limit(device: jax.Device) -> int | None:
    """The most bytes that this process's arrays may take on one device together; None if nobody says.

    On a GPU or TPU its allocator's limit; on the CPU what the system can still give and what this process already
    has, shared between its local devices.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            system = {line.split(":")[0]: int(line.split()[1]) for line in file}
        with open("/proc/self/status", encoding="ascii") as file:
            (own,) = (int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        # What lies in swap or in reclaimable pages can make room as well.
        total = 1024 * (system["MemAvailable"] + system["SwapFree"] + own)
    except (OSError, KeyError, ValueError):  # no Linux
        return None
    return total // jax.local_device_count("cpu")


def check_fits(work: str, needed: Mapping[str, int], device: jax.Device, advice: str):
    """Raises ValueError if arrays of the sizes `needed`, in bytes by name, cannot all be alive on this device."""
    limit = device_limit(device)
    total = sum(needed.values())
    if limit is None or total <= limit:
        return
    parts = ", ".join(f"{name} {readable_bytes(size)}" for name, size in needed.items())
    raise ValueError(
        f"{work} needs at least {readable_bytes(total)} on each device ({parts}), and {device} can give "
        f"{readable_bytes(limit)}: {advice}"
    )


def check_loading_fits(what: str, size: int, mesh=None):
    """`check_fits` for `size` bytes to be loaded on each device of a mesh, or on the default device."""
    device = jnp.zeros(()).device if mesh is None else mesh.local_devices[0]
    check_fits(f"loading {what}", {"arrays": size}, device, "use more devices (mesh=…), or 16 bits a number")


def check_state_fits(params, tree, num_users: int, room: int):
    """`check_fits` for answering num_users users with room tokens each; of their states the keys and values only.

    Nothing is checked under the caller's `jit`, nor of arrays that are not on a device yet.
    """
    leaves = jax.tree.leaves((params, tree))
    if not all(isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    mesh = mesh_of(tree)
    L, K, _, H = tree.keys.shape
    cached = 2 * L * K * H * num_users * room * tree.dtype.itemsize
    needed = {
        "weights": bytes_per_device(params),
        "the tree": bytes_per_device(tree),
        "users' own tokens": cached // (size_of(mesh, "data") * size_of(mesh, "model")),
    }
    advice = "use fewer users or tokens, or more devices (squeezejax.shardings)"
    check_fits(f"answering {num_users} users of {room:,} tokens", needed, local_device(tree.keys), advice)


def local_device(array: jax.Array) -> jax.Device:
    """A device of this process on which an array lies."""
    return min(array.sharding.addressable_devices, key=lambda device: device.id)


def readable_bytes(count: float) -> str:
    """A size for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
