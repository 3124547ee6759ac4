"""Sizes that programs are compiled for: outside a trace, those that users choose are rounded up to a few.

A program is compiled for shapes, and compiling takes seconds where answering takes a fraction of one. So `generate`,
`prefill`, `decode`, `squeeze` and `append` round up, and pass on how much of it is real as a number on the device:

| what | rounded up to |
|---|---|
| T, tokens of a question | 32, 64, 128, 256, then four steps a doubling: 320, 384, 448, 512, 640, … |
| tokens to generate | the same from 64 on |
| rows of room in a state | the same from 128 on |
| stop tokens | the same from 4 on |
| rows of a tree with codes of keys | multiples of 64, from 4,096 on 32 to 64 steps a doubling |

Nothing that a caller sees depends on it but the room of a state, and in a tree rows of order −1 and clusters without
keys: padding enters no mean and no cache, and what is generated is cut to what was asked for. The number of users is
not rounded. Under a caller's `jit` shapes stay as given.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.arguments import on_device

QUESTION, ANSWER, ROOM, STOP_TOKENS = 32, 64, 128, 4  # the least of each

_POWERS_ONLY = 256  # up to here only powers of two: smaller steps would save next to nothing


def round_up(count: int, least: int) -> int:
    """The bucket of a size; under a trace the size itself."""
    if tracing():
        return count
    power = 1 << (count - 1).bit_length()  # of two, the first that reaches it
    if power <= _POWERS_ONLY:
        return max(power, least)
    step = power // 8
    return -(-count // step) * step


def round_up_rows(count: int) -> int:
    """The bucket of a context's rows, in steps of 64 up to 4,096 and of 3 % at most from there on.

    A step costs memory and time in proportion, at every answer and in the file: hence finer ones than for questions.
    """
    step = max(64, (1 << (count - 1).bit_length()) // 64)
    return -(-count // step) * step


def in_room(tree, implementation: str):
    """The tree as programs are handed it: its number of keys is a number on the device, where they can do with that.

    Contexts whose rows are rounded up to as many share programs then. A kernel is compiled for its number of keys.
    """
    if implementation != "xla" or tree.live_keys is not None or tracing():
        return tree
    return dataclasses.replace(tree, num_keys=tree.keys.shape[2], live_keys=on_device(tree.num_keys, jnp.int32))


def tracing() -> bool:
    """Whether this runs under somebody's `jit`, also where everything that is known of is a constant there."""
    return isinstance(jax.device_put(np.int32(0)), jax.core.Tracer)


def pad_tokens(tokens):
    """Questions' tokens [B T], of the host or a device, in the columns of their bucket, zeros behind them."""
    return pad_columns(tokens, round_up(tokens.shape[1], QUESTION), fill=0)


def pad_columns(array, width: int, fill: int):
    """array [B n], of the host or a device, with columns of `fill` up to width."""
    if array.shape[1] == width:
        return array
    if isinstance(array, jax.Array):
        return _pad_on_device(array, width, fill)
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


@functools.partial(jax.jit, static_argnames=("width", "fill"))
def _pad_on_device(array, width: int, fill: int):
    return jnp.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


@functools.partial(jax.jit, static_argnames="width")  # an eager slice would send its indices to the device
def cut_columns(arrays, width: int):
    """The first columns of arrays [B n]: a small program of its own, so that the large one serves any width."""
    return jax.tree.map(lambda array: array[:, :width], arrays)
