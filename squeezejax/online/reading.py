"""From what a caller asks for, a sparsity, thresholds, estimates, to the `Reading` that backends follow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from squeezejax.arguments import check_number, on_device
from squeezejax.offline.thresholds import block_log_thresholds
from squeezejax.offline.thresholds import log_thresholds as log_thresholds_at
from squeezejax.online.fallback import dense_if_cheaper, falls_back, of_blocks
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.interface import Reading
from squeezejax.tree import Tree


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Estimate:
    """What centroids are to tell of the keys that are not read (estimate.py); without one, nothing is estimated.

    Attributes:
      min_mass: f32[] in (0, 1], may be traced: in place of a sparsity, every selection keeps the fewest clusters that
        hold this much of all clusters' estimated attention. None: thresholds choose.
      tail: attention to what is not kept is estimated and added; needs `add_value_centroids(tree)`.

    Any `Estimate`, also one without options, has `Generation.missed_mass` say how much was missed.
    """

    min_mass: jax.Array | float | None = None
    tail: bool = dataclasses.field(default=False, metadata={"static": True})


EVERY_KEY = Reading()  # dense attention


def reading_of(
    tree: Tree, *, sparsity=None, log_thresholds=None, estimate: Estimate | None = None, implementation=None
) -> Reading:
    """How to read `tree`, from the options of `attend` and `generate`.

    Raises ValueError for options that exclude each other, are out of range, or need what the tree lacks;
    NotImplementedError for an implementation that cannot run here or cannot estimate.
    """
    if estimate is None:
        name = registry.resolve(implementation)
        return Reading(*thresholds(tree, sparsity, log_thresholds, implementation), implementation=name)
    if not isinstance(estimate, Estimate):
        raise ValueError(f"estimate must be a squeezejax.Estimate, such as Estimate(tail=True), got {estimate!r}")
    if implementation != "xla" and implementation in registry.names():
        raise NotImplementedError("estimates run as plain XLA: use implementation=None or 'xla'")
    registry.resolve(implementation)  # refuses a name that is unknown
    if estimate.tail and any(level.value_centroids is None for level in tree.levels):
        raise ValueError("tail=True needs a tree with value centroids: tree = squeezejax.add_value_centroids(tree)")
    options = {"tail": bool(estimate.tail), "missed_mass": True, "implementation": "xla"}
    if estimate.min_mass is None:
        return Reading(*thresholds(tree, sparsity, log_thresholds, implementation), **options)
    if sparsity is not None or log_thresholds is not None:
        raise ValueError("give min_mass, sparsity or log_thresholds, not two of them")
    min_mass = check_number("min_mass", estimate.min_mass, 0, 1, wanted="in [0, 1]")
    return Reading(min_mass=min_mass, **options)


def dense_reading(implementation: str | None) -> Reading:
    """Every key, by a named backend or the best."""
    return dataclasses.replace(EVERY_KEY, implementation=registry.resolve(implementation))


def thresholds(tree: Tree, sparsity, log_thresholds, implementation: str | None = None) -> tuple:
    """(log T f32[levels] of one token, the same of W tokens or None), from explicit values or a sparsity.

    Of one sparsity a user, f32[B levels]. The tree's own sparsity is the default. A sparsity, where no implementation
    is named, becomes −∞ if dense attention is expected to be faster.
    """
    if log_thresholds is None:
        sparsity = tree.config.sparsity if sparsity is None else sparsity
        sparsity = check_number("sparsity", sparsity, per_user=True)
        found = log_thresholds_at(tree, sparsity), block_log_thresholds(tree, sparsity)
        if implementation is not None:
            return found
        one, block = (None if log_T is None else dense_if_cheaper(tree, sparsity, log_T) for log_T in found)
        return one, of_blocks(one, block)
    if sparsity is not None:
        raise ValueError("give sparsity or log_thresholds, not both")
    log_T = on_device(log_thresholds, jnp.float32)
    wanted = tree.config.num_thresholds
    if log_T.ndim not in (1, 2) or log_T.shape[-1] != wanted:
        raise ValueError(f"log_thresholds must be f32[{wanted}], one a level, or [B {wanted}], got shape {log_T.shape}")
    return log_T, None


def fell_back(tree: Tree, B: int, *, sparsity, estimate, implementation) -> jax.Array | None:
    """Whether `reading_of` turns a sparsity into dense attention, bool[B]; None where it never does."""
    if implementation is not None or (estimate is not None and estimate.min_mass is not None):
        return None
    return falls_back(tree, tree.config.sparsity if sparsity is None else sparsity, B)


def check_reading(reading: Reading, B: int):
    """Raises ValueError unless thresholds that are given one a user are given for B users."""
    if reading.per_user and len(reading.log_T) != B:
        raise ValueError(
            f"sparsity is given for {len(reading.log_T)} users, and there are {B}: give one, or one a user"
        )
