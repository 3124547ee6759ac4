"""What the numbers in a tree must be, when it is saved and when it is loaded."""

import numpy as np

from squeezejax.mesh.sharding import whole_on_host
from squeezejax.storage.header import require

_AT_ONCE = 1 << 17


def check_values(leaves: dict, num_keys: int, parts: int):
    """Raises ValueError unless indices stay in range and clusters are disjoint runs that hold every key once.

    Attention gathers rows without checks of its own. Keys and values are not looked at.
    """
    large = ("keys", "values", "key_codes", "window_keys", "window_values")
    small = {name: whole_on_host(leaf) for name, leaf in leaves.items() if name not in large}
    order = small["order"]
    for name, what in (("key_steps", "codes of keys"), ("key_scales", "keys"), ("value_scales", "values")):
        require(np.isfinite(small.get(name, np.zeros(1)).astype(np.float32)).all(), f"its {what} are not finite")
    above = 1
    for i in range(sum(name.endswith(".counts") for name in small)):
        starts, counts, parents = (small[f"levels.{i}.{name}"] for name in ("starts", "counts", "parents"))
        ends = starts.astype(np.int64) + counts
        require(starts.min() >= 0 and counts.min() >= 0 and ends.max() <= order.shape[2], f"level {i} leaves its rows")
        require((counts.sum(axis=2, dtype=np.int64) == num_keys).all(), f"level {i} does not hold {num_keys} keys")
        require(parents.min() >= 0 and parents.max() < above, f"level {i} has parents that do not exist")
        for name in ("centroids", "steps", "offset", "spreads"):
            numbers = small.get(f"levels.{i}.{name}", np.zeros(1, np.float32)).astype(np.float32)
            require(np.isfinite(numbers).all(), f"level {i} has {name} that are not finite")
        if parts > 1:
            _check_parts(parts, (starts, counts, parents if i else None), (order.shape[2], above), i)
        if i:
            _check_children(small[f"levels.{i - 1}.child_starts"], small[f"levels.{i - 1}.child_counts"], parents, i)
        above = counts.shape[2]
    for layer in range(order.shape[0]):  # now starts and counts are those of the finest level
        _check_runs(order[layer], starts[layer], counts[layer], num_keys)
    if "thresholds" in small:
        grid = small["sparsities"]
        require(np.isfinite(grid).all() and (np.diff(grid) >= 0).all(), "its sparsities do not ascend")
        for name in ("thresholds", "block_thresholds"):
            require(not np.isnan(small.get(name, 0)).any(), "its thresholds are not numbers")
        for name in ("denominators", "missed_masses"):
            require(np.isfinite(small.get(name, 0)).all(), f"its {name} are not finite")


def check_finite(name: str, array: np.ndarray):
    """Raises ValueError unless the floating-point numbers of a contiguous array are finite.

    A NaN among the values would make every answer nonsense, without a sign.
    """
    wholes = {2: np.uint16, 4: np.uint32}
    if array.dtype.kind == "i" or array.dtype.itemsize not in wholes:
        return
    exponent = np.array([np.inf]).astype(array.dtype).view(wholes[array.dtype.itemsize])[0]
    flat = array.reshape(-1).view(exponent.dtype)
    for start in range(0, flat.size, _AT_ONCE):  # pieces that stay in a processor's cache
        piece = flat[start : start + _AT_ONCE]
        require(((piece & exponent) != exponent).all(), f"its {name} are not all finite numbers")


def _check_parts(parts: int, level, sizes, i: int):
    """Level i's starts, counts, parents i32[L K C] must stay in their part; sizes: rows and clusters of level above."""
    (starts, counts, parents), (num_rows, above) = level, sizes
    C = counts.shape[2]
    require(C % parts == 0 == num_rows % parts, f"its {parts} parts are not of one size")
    part = np.arange(C) // (C // parts)
    inside = lambda numbers, size: (numbers // (size // parts) == part).all()
    last = starts.astype(np.int64) + np.maximum(counts, 1) - 1
    require(inside(starts, num_rows) and inside(last, num_rows), f"level {i} has rows in other parts")
    require(parents is None or inside(parents, above), f"level {i} has parents in other parts")


def _check_children(starts, counts, parents, i: int):
    """Level i's parents i32[L K C] and the runs of children i32[L K C_above] above must say the same."""
    require(starts.min() >= 0 and counts.min() >= 0, f"level {i - 1} has negative runs of children")
    first = np.take_along_axis(starts.astype(np.int64), parents, axis=2)
    end = first + np.take_along_axis(counts, parents, axis=2)
    child = np.arange(parents.shape[2])
    agree = ((first <= child) & (child < end)).all() and (counts.sum(axis=2, dtype=np.int64) == len(child)).all()
    require(agree, f"level {i - 1} does not hold the children that name it")


def _check_runs(order, starts, counts, num_keys: int):
    """For one layer, order i32[K R] and the finest level's starts, counts i32[K C]: every key has one row, one run."""
    require(order.min() >= -1 and order.max() < num_keys, "its order names keys that do not exist")
    heads = np.arange(order.shape[0])[:, None]
    seen = np.zeros((order.shape[0], num_keys + 1), bool)
    seen[heads, order] = True  # padding, −1, marks the extra column
    edges = np.zeros((order.shape[0], order.shape[1] + 1), np.int32)
    live = (counts > 0).astype(np.int32)
    np.add.at(edges, (heads, starts), live)
    np.add.at(edges, (heads, starts + counts), -live)
    require(seen[:, :num_keys].all() and (np.sum(order >= 0, axis=1) == num_keys).all(), "its order repeats a key")
    require((np.cumsum(edges, axis=1)[:, :-1] == (order >= 0)).all(), "its clusters overlap or miss rows")
