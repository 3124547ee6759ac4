"""When selecting keys does not pay: the rule that turns a request into dense attention (docs/method.md, Selection).

Selecting costs a fixed overhead and a look-up that grows with the context, and a kept key, read by list, costs more
than a key read in order. With the time of dense attention as the unit, a step over S keys that keeps the fraction f
costs about

    LOOK_UP + READ_BY_LIST · f + OVERHEAD / bytes of one layer's keys and values

and pays where that is below 1. The numbers come from measurements on two CPU cores in float32 and are cautious there
(benchmarks/notes/online.md); f is taken as 1 − sparsity, which a decode step seldom exceeds.

Where the backend "wide" runs, on GPUs and TPUs without kernels of ours, the numbers are others, from launches and bytes
counted in programs compiled for GPUs (benchmarks/results/compile_wide.md), and have never been measured. A question's
tokens read every key there: many queries make products the limit, not bytes, and scoring codes takes as many as
attending to the keys themselves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.arguments import check_number, on_device
from squeezejax.pallas_kernels import registry
from squeezejax.tree import Tree

LOOK_UP = 0.10
LOOK_UP_OF_CODES = 0.55  # with codes of keys, whose candidates are scored one by one
READ_BY_LIST = 2.0
OVERHEAD = 10e6  # bytes that dense attention reads in the time of the fixed overhead


@dataclasses.dataclass(frozen=True)
class Costs:
    """The numbers of the rule on one kind of device."""

    look_up: float
    look_up_of_codes: float
    read_by_list: float
    overhead: float


# A room may be twice as large as what it holds; 25 launches and a wait for the host take 45 µs, and dense attention
# moves up to 5 TB a second.
WIDE = Costs(look_up=0.2, look_up_of_codes=0.25, read_by_list=2.0, overhead=250e6)


def costs() -> Costs:
    """Those of this machine's default backend."""
    return WIDE if runs_wide() else Costs(LOOK_UP, LOOK_UP_OF_CODES, READ_BY_LIST, OVERHEAD)


def runs_wide() -> bool:
    """Whether `implementation=None` begins with the backend "wide" on this machine."""
    return registry.preferred() == "wide"


def dense_if_cheaper(tree: Tree, sparsity, log_T):
    """log T f32[levels], or −∞, which keeps every key, where reading every key is expected to be faster.

    A sparsity of 1 and more stays what it is: nothing but the window, by definition. Of sparsities f32[B] and
    thresholds f32[B levels] every user's are decided by themselves: nobody's answer depends on who else asks.
    """
    _, K, _, H = tree.keys.shape
    read = 2 * K * H * tree.keys.dtype.itemsize * tree.num_keys
    here = costs()
    look_up = here.look_up_of_codes if tree.config.key_bits else here.look_up
    fixed = on_device(look_up + here.overhead / read, jnp.float32)  # of this context: another compiles nothing again
    return _dense_if_cheaper(check_number("sparsity", sparsity, per_user=True), log_T, fixed, here.read_by_list)


def of_blocks(log_T, block_log_T) -> jax.Array | None:
    """Thresholds of blocks of tokens f32[levels] or [B levels], for those of one token and of blocks, or None.

    Where the backend "wide" runs, −∞, unless nothing is to be read.
    """
    if not runs_wide():
        return block_log_T
    return jnp.where(log_T == jnp.inf, jnp.inf, -jnp.inf).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="by_list")
def _dense_if_cheaper(sparsity, log_T, fixed, by_list: float):
    kept = (1 - sparsity)[..., None]
    return jnp.where((fixed + by_list * kept >= 1) & (kept > 0), -jnp.inf, log_T)


def falls_back(tree: Tree, sparsity, B: int = 1) -> jax.Array:
    """Whether `dense_if_cheaper` does it, bool[B]; not where every key was asked for, at sparsity 0 and below."""
    nothing = on_device(np.zeros(1), jnp.float32)  # thresholds of one level: only the rule's word is wanted
    return _falls_back(check_number("sparsity", sparsity, per_user=True), dense_if_cheaper(tree, sparsity, nothing), B)


@functools.partial(jax.jit, static_argnames="B")
def _falls_back(sparsity, log_T, B: int):
    return jnp.broadcast_to((sparsity > 0) & (log_T[..., 0] == -jnp.inf), B)


def why_dense(tree: Tree, sparsity: float, implementation: str | None) -> str | None:
    """Why a request reads every key, in a sentence's words; None where keys are chosen.

    `sparsity` is one number of the host; the tree may be shapes only.
    """
    if sparsity <= 0:
        return f"sparsity {sparsity:g} was asked for"
    if implementation is not None or not np.asarray(falls_back(tree, sparsity)):
        return None
    return (
        f"in a text of {tree.num_keys:,} keys, at sparsity {sparsity:g}, choosing keys would take longer than reading "
        "all (a named implementation chooses them anyway)"
    )
