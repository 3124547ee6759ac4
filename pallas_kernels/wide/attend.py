"""Exact attention over kept rows in a room of static size, in a fixed number of launches.

Kept rows are taken in pieces, each of one lane. Scores and weighted values are written as sums, not as products of
matrices: XLA's GPU backend reads the rows of a cache inside a sum, gathered or not, but copies them before a product.
That suits a few query rows, as in decoding; many are better served by products.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.pallas_kernels.keys_values import KeysValues
from squeezejax.pallas_kernels.xla.lists import Rows
from squeezejax.pallas_kernels.xla.softmax import MASKED, Softmax

# Rows of a piece. XLA's GPU backend turns a sum over 32 rows and more, or over 2, 4, 8 or 16, into one along the
# fastest axis, by writing down what is summed with its axes swapped: all values, again. Of other numbers it does not.
PIECE = 31
# Fractions of all rows that the rooms hold, the smallest that suffices being taken. The last holds everything.
ROOMS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


class Pieces(NamedTuple):
    """Rows of keys and values in pieces, each of one lane."""

    rows: KeysValues  # leading axes [P J]
    listed: jax.Array  # bool[P J 1], the rows that are meant, or bool[P J M], for which of the lane's queries
    lane: jax.Array  # i32[P]


def in_pieces(rows: KeysValues, listed) -> Pieces:
    """The rows of every lane, leading axes [U R], that are listed bool[U R], in order."""
    U, R = listed.shape
    cut = lambda x: jnp.pad(x, ((0, 0), (0, -R % PIECE), *[(0, 0)] * (x.ndim - 2))).reshape(-1, PIECE, *x.shape[2:])
    listed = cut(listed[:, :, None])
    return Pieces(
        jax.tree.map(cut, rows), listed, jnp.asarray(np.repeat(np.arange(U, dtype=np.int32), len(listed) // U))
    )


def attend_pieces(q, *parts: Pieces):
    """Attention of lanes q [U M H] to the rows listed for them in all parts -> (out f32[U M H], lse f32[U M])."""
    together = lambda arrays: jnp.concatenate(list(arrays))
    lane = together(part.lane for part in parts)
    listed = together(jnp.broadcast_to(part.listed, (*part.listed.shape[:2], q.shape[1])) for part in parts)
    scores = jnp.where(listed, together(_scores(q[part.lane], part.rows) for part in parts), MASKED)  # [P J M]
    member = lane[None, :] == jnp.arange(len(q))[:, None]  # [U P]
    top = jnp.max(jnp.where(member[:, :, None], jnp.max(scores, axis=1)[None], MASKED), axis=1)  # [U M]
    weights = jnp.where(listed, jnp.exp(scores - top[lane][:, None, :]), 0.0)
    ends = list(itertools.accumulate(len(part.lane) for part in parts))
    sums = together(
        _sums(weights[end - len(part.lane) : end], part.rows) for part, end in zip(parts, ends, strict=True)
    )
    # A sum over one-hot weights, not a scatter: its order is fixed, so results repeat bit for bit on every device.
    found = jnp.einsum("UP,PMH->UMH", member.astype(jnp.float32), sums, precision=jax.lax.Precision.HIGHEST)
    return Softmax(top, found[:, :, -1], found[:, :, :-1]).end()


def _scores(q, rows: KeysValues):
    """q·k/√H f32[P J M] of queries q [P M H]; M comes last, so that a row that is read once serves all queries."""
    k, q = rows.keys.astype(jnp.float32), q.astype(jnp.float32)
    # The barrier keeps XLA's GPU backend from summing up a row in one thread, inside whatever uses the sum.
    scores = jax.lax.optimization_barrier(jnp.sum(k[:, :, None, :] * q[:, None, :, :], axis=-1))
    scores /= math.sqrt(q.shape[-1])
    return scores if rows.key_scales is None else scores * rows.key_scales.astype(jnp.float32)[:, :, None]


def _sums(weights, rows: KeysValues):
    """Values summed by weights f32[P J M], and behind them the weights by themselves: f32[P M H + 1]."""
    v = rows.values.astype(jnp.float32)
    if rows.value_scales is not None:
        v *= rows.value_scales.astype(jnp.float32)[:, :, None]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
    return jnp.sum(weights[:, :, :, None] * v[:, :, None, :], axis=1)


class Kept(NamedTuple):
    """Which rows every lane keeps."""

    mask: jax.Array  # bool[U R]
    # How many rows are kept up to each row, itself included, in two summands: f32[U T J], within its tile of J rows,
    # and f32[U T], before the tile. They are whole numbers, exact below 2²⁴.
    within: jax.Array
    before: jax.Array

    @classmethod
    def of(cls, mask) -> "Kept":
        """From the mask bool[U R] alone."""
        # In two launches on a GPU, where XLA's own running sum is five.
        U, R = mask.shape
        J = 1 << max(R - 1, 1).bit_length() // 2
        tiles = jnp.pad(mask, ((0, 0), (0, -R % J))).reshape(U, -1, J).astype(jnp.bfloat16)
        up_to = np.triu(np.ones((J, J), jnp.bfloat16))
        within = jnp.einsum("UTJ,Ji->UTi", tiles, up_to, preferred_element_type=jnp.float32)
        T = tiles.shape[1]
        earlier = jnp.arange(T)[None, :] < jnp.arange(T)[:, None]
        before = jnp.sum(jnp.where(earlier[None], within[:, None, :, -1], 0.0), axis=2)
        return cls(mask, within, before)

    @property
    def num_rows(self):
        """i32[U]."""
        return (self.within[:, -1, -1] + self.before[:, -1]).astype(jnp.int32)

    @property
    def num_pieces(self):
        """i32[U], those that a lane needs."""
        return (self.num_rows + PIECE - 1) // PIECE

    def _placed(self, first, size: int):
        """i32[size]: every kept row, as lane · R + row, behind those before it, from first[lane] on; elsewhere −1."""
        U, R = self.mask.shape
        place = (self.within - 1 + self.before[:, :, None]).reshape(U, -1)[:, :R].astype(jnp.int32) + first[:, None]
        number = jnp.arange(U * R, dtype=jnp.int32).reshape(U, R)
        place = jnp.where(self.mask, place, size)
        return jnp.full(size, -1, jnp.int32).at[place].set(number, mode="drop", unique_indices=True)

    def in_room(self, P: int):
        """The kept rows in P pieces, which must suffice: numbers i32[P J], −1 where there is none, and lane i32[P]."""
        U, R = self.mask.shape
        earlier = jnp.arange(U)[None, :] < jnp.arange(U)[:, None]
        first = jnp.sum(jnp.where(earlier, self.num_pieces[None, :], 0), axis=1)
        numbers = self._placed(first * PIECE, P * PIECE).reshape(P, PIECE)
        return jnp.where(numbers < 0, -1, numbers % R), jnp.maximum(numbers[:, 0], 0) // R

    def lists(self) -> Rows:
        """The kept rows as lists that hold as many as there are."""
        U, R = self.mask.shape
        return Rows(self._placed(jnp.arange(U) * R, U * R).reshape(U, R) % R, self.num_rows)


def rooms(U: int, R: int) -> tuple[int, ...]:
    """How many pieces the rooms of U lanes over R rows have."""
    return tuple(math.ceil(U * R * room / PIECE) + U for room in ROOMS)


def room_bytes(P: int, M: int, H: int) -> int:
    """Temporaries of attention to P pieces for M query rows a lane: scores, weights, and every piece's sums."""
    return 4 * P * (PIECE * (2 * M + 1) + M * (H + 1))
