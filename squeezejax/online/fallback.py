"""When selecting keys does not pay: the rule that turns a request into dense attention (docs/method.md, Selection).

Selecting costs a fixed overhead and a look-up that grows with the context, and a kept key, read by list, costs more
than a key read in order. With the time of dense attention as the unit, a step over S keys that keeps the fraction f
costs about

    LOOK_UP + READ_BY_LIST · f + OVERHEAD / bytes of one layer's keys and values

and pays where that is below 1. The numbers come from measurements on two CPU cores in float32 and are cautious there
(benchmarks/notes/online.md); f is taken as 1 − sparsity, which a decode step seldom exceeds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.arguments import check_number, on_device
from squeezejax.tree import Tree

LOOK_UP = 0.10
LOOK_UP_OF_CODES = 0.55  # with codes of keys, whose candidates are scored one by one
READ_BY_LIST = 2.0
OVERHEAD = 10e6  # bytes that dense attention reads in the time of the fixed overhead


def dense_if_cheaper(tree: Tree, sparsity, log_T):
    """log T f32[levels], or −∞, which keeps every key, where reading every key is expected to be faster.

    A sparsity of 1 and more stays what it is: nothing but the window, by definition. Of sparsities f32[B] and
    thresholds f32[B levels] every user's are decided by themselves: nobody's answer depends on who else asks.
    """
    _, K, _, H = tree.keys.shape
    read = 2 * K * H * tree.keys.dtype.itemsize * tree.num_keys
    look_up = LOOK_UP_OF_CODES if tree.config.key_bits else LOOK_UP
    fixed = on_device(look_up + OVERHEAD / read, jnp.float32)  # of this context: another one compiles nothing again
    return _dense_if_cheaper(check_number("sparsity", sparsity, per_user=True), log_T, fixed, READ_BY_LIST)


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
