"""The tree: a squeezed context as one pytree.

Axis letters, used in names, shape comments and einsum strings throughout the repository:

    B  batch (user inputs over one tree)        S  clustered keys of the fixed context
    T  query tokens of a user input             C  clusters (centroids) of one level
    L  layers                                   W  observation window: last tokens of the context
    N  query heads                              H  head dimension
    K  key/value heads                          D  model (embedding) dimension
    G  query heads per key/value head, N/K      V  vocabulary

Keys and values lie in cluster order, the clusters of one parent side by side, so that a cluster at any level is one
run of rows: `starts` and `counts` say which. Readers use these two and `order`, and assume nothing else about rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from squeezejax.config import SqueezeConfig
from squeezejax.pallas_kernels.keys_values import KeysValues


def _static(**kwargs):
    return dataclasses.field(metadata={"static": True}, **kwargs)


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Level:
    """The clusters of one level of the hierarchy; a cluster with count 0 is dead and masked everywhere.

    Shapes are those in a `Tree`; in a `TreeLayer` the axis L is absent.
    """

    # Means of the raw keys after RoPE: f32 or bf16[L K C H], or, in 8 or 4 bits (codes.py), None and the three below.
    centroids: jax.Array | None
    counts: jax.Array  # i32[L K C], keys in the cluster
    starts: jax.Array  # i32[L K C], first row of the cluster's run
    parents: jax.Array  # i32[L K C], cluster of the next coarser level; zeros at the coarsest
    # The same relation downwards, as runs of clusters of the next finer level; None at the finest.
    child_starts: jax.Array | None = None  # i32[L K C]
    child_counts: jax.Array | None = None  # i32[L K C]
    codes: jax.Array | None = None  # u8[L K C bits·H/8], turned and rounded, less `offset`
    steps: jax.Array | None = None  # bf16[L K C], what one step of a code is worth
    offset: jax.Array | None = None  # f32[L K H], mean of the head's keys, turned
    # Score "variance": mean squared distance per dimension between the cluster's keys and its rounded centroid.
    spreads: jax.Array | None = None  # bf16[L K C]
    value_centroids: jax.Array | None = None  # f32[L K C H], means of the values, for the tail estimate (estimate.py)


class _Arrays:
    """What a tree and one of its layers can be asked for alike."""

    keys: jax.Array
    values: jax.Array
    order: jax.Array
    window_keys: jax.Array
    window_values: jax.Array
    key_codes: jax.Array | None
    key_steps: jax.Array | None
    key_scales: jax.Array | None
    value_scales: jax.Array | None

    @property
    def cache(self) -> KeysValues:
        """The clustered keys and values as one object, which is what attention is handed."""
        return KeysValues(self.keys, self.values, self.key_scales, self.value_scales)

    @property
    def window(self) -> KeysValues:
        """What is always read: sinks, then the window."""
        return KeysValues(self.window_keys, self.window_values)

    def row_arrays(self) -> dict[str, jax.Array]:
        """The arrays with an axis of rows, by name: keys, values, order, and scales and codes where there are any."""
        names = ("keys", "values", "order", "key_scales", "value_scales", "key_codes", "key_steps")
        arrays = {name: getattr(self, name) for name in names}
        return {name: x for name, x in arrays.items() if x is not None}

    @property
    def dtype(self) -> jnp.dtype:
        """Of keys and values as the model gives them; what is always read stays so, whatever the clustered ones are."""
        return self.window_keys.dtype


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class TreeLayer(_Arrays):
    """One layer of a tree that is being built: clustered and rounded, not calibrated. Fields are named as in `Tree`."""

    keys: jax.Array  # [K R H]
    values: jax.Array  # [K R H]
    order: jax.Array  # i32[K R]
    window_keys: jax.Array  # [K sinks+W H]
    window_values: jax.Array  # [K sinks+W H]
    levels: tuple[Level, ...]  # coarse → fine, arrays [K C …]
    config: SqueezeConfig = _static()
    num_keys: int = _static()
    key_codes: jax.Array | None = None  # u8[K R bits·H/8]
    key_steps: jax.Array | None = None  # bf16[K R]
    key_scales: jax.Array | None = None  # bf16[K R]
    value_scales: jax.Array | None = None  # bf16[K R]
    parts: int = _static(default=1)

    AXES: ClassVar[dict[str, str]]  # those of a tree, without L: at the end of this file


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Tree(_Arrays):
    """A squeezed fixed context: all that answering questions about it needs, besides the model."""

    keys: jax.Array  # [L K R H], after RoPE, in cluster order; R rows, at least S; i8 where there are scales
    values: jax.Array  # [L K R H]
    order: jax.Array  # i32[L K R], position in the context of each row; −1 = padding
    window_keys: jax.Array  # [L K sinks+W H], what is always read: the first tokens, then the last
    window_values: jax.Array  # [L K sinks+W H]
    levels: tuple[Level, ...]  # coarse → fine
    config: SqueezeConfig = _static()
    num_keys: int = _static()  # S; rows may be more, by padding
    # Within programs that serve contexts of any S: S, i32[], and `num_keys` is R (buckets.py); None elsewhere.
    live_keys: jax.Array | None = None
    # Codes of single keys (codes.py), turned and less their cluster's rounded centroid; None without.
    key_codes: jax.Array | None = None  # u8[L K R bits·H/8]
    key_steps: jax.Array | None = None  # bf16[L K R]
    # What keys and values in 8 bits are multiplied by, row by row (`KeysValues`); None where they are floating point.
    key_scales: jax.Array | None = None  # bf16[L K R]
    value_scales: jax.Array | None = None  # bf16[L K R]
    # Score "variance": log of the true denominator ≈ a + b · log of that estimated from clusters, a query head; (a, b).
    denominators: jax.Array | None = None  # f32[L K G 2]; None = not calibrated, 0 and 1
    fingerprint: str | None = _static(default=None)  # of the model that made it; None = unknown
    sparsities: jax.Array | None = None  # f32[P], ascending grid of the table below
    thresholds: jax.Array | None = None  # f32[levels P], log T of one query token; None = not calibrated
    # The same for the mean over W query tokens, which select together in blocks; None: the thresholds above serve.
    block_thresholds: jax.Array | None = None  # f32[levels P]
    # Share of the window's attention that goes to keys not kept, f32[P] at `sparsities`; None = not measured.
    missed_masses: jax.Array | None = None
    context_hash: jax.Array | None = None  # u8[32], SHA-256 of the context's token ids (with every part that was
    # appended: of the hash so far and the part's); a leaf, so that another document compiles nothing again
    parts: int = _static(default=1)  # of equal size, along rows and clusters; a cluster lies in one with its children
    # i32[L K R], the finest cluster of every row, −1 for padding. It follows from `levels`: programs whose backend
    # wants it make it once (`online.attention.prepared`), and no tree at rest has it.
    row_clusters: jax.Array | None = None

    # Axes by attribute path; what `squeezejax.shardings` splits a tree by.
    AXES: ClassVar[dict[str, str]] = {
        "keys": "LKRH",
        "values": "LKRH",
        "order": "LKR",
        "window_keys": "LKWH",
        "window_values": "LKWH",
        "levels.centroids": "LKCH",
        "levels.counts": "LKC",
        "levels.starts": "LKC",
        "levels.parents": "LKC",
        "levels.child_starts": "LKC",
        "levels.child_counts": "LKC",
        "levels.value_centroids": "LKCH",
        "levels.codes": "LKCb",
        "levels.steps": "LKC",
        "levels.offset": "LKH",
        "levels.spreads": "LKC",
        "live_keys": "",
        "key_codes": "LKRb",
        "key_steps": "LKR",
        "key_scales": "LKR",
        "value_scales": "LKR",
        "row_clusters": "LKR",
        "denominators": "LKGz",
        "sparsities": "P",
        "thresholds": "nP",
        "block_thresholds": "nP",
        "missed_masses": "P",
        "context_hash": "h",
    }

    @property
    def size(self) -> int | jax.Array:
        """S, clustered keys: a number of the host, or in a program perhaps one on the device."""
        return self.num_keys if self.live_keys is None else self.live_keys

    @property
    def context_length(self) -> int | jax.Array:
        """Tokens of the fixed context, sinks + S + W; the first user token has this position."""
        return self.size + self.window_keys.shape[2]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.keys.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.keys.shape[1]

    def layer(self, index) -> TreeLayer:
        """Layer `index`, which may be traced."""
        return jax.tree.map(lambda leaf: leaf[index], TreeLayer(**layer_fields(self)))


def layer_fields(tree: Tree | TreeLayer) -> dict[str, Any]:
    """The fields that a tree and its layers share, by name; of a tree, arrays have the axis L."""
    return {field.name: getattr(tree, field.name) for field in dataclasses.fields(TreeLayer)}


def stack_layers(layers: Sequence[TreeLayer], stack: Callable[[Sequence], Any] = jnp.stack) -> Tree:
    """The uncalibrated tree of these layers; `stack` makes one array, with an axis L in front, of one a layer."""
    stacked = jax.tree.map(lambda *leaves: stack(leaves), *layers)
    return Tree(**layer_fields(stacked))


TreeLayer.AXES = {name: axes[1:] for name, axes in Tree.AXES.items() if axes.startswith("L")}
