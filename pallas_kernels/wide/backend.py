"""Plain XLA for GPUs and TPUs as a backend: what `implementation=None` means there where no kernels of ours run.

A launch on a GPU takes microseconds whatever it does, and a loop whose length the device finds out waits for the host.
So a decode step is a fixed number of wide launches. Compiled for GPUs and read there, never run on one.
"""

import functools

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import cudnn
from squeezejax.pallas_kernels.interface import Attended, Own, Reading
from squeezejax.pallas_kernels.keys_values import KeysValues
from squeezejax.pallas_kernels.layout import from_lanes, to_lanes
from squeezejax.pallas_kernels.wide import select
from squeezejax.pallas_kernels.wide.attend import Kept, Pieces, attend_pieces, in_pieces, room_bytes, rooms
from squeezejax.pallas_kernels.xla.backend import Xla, attend_window, own_block
from squeezejax.pallas_kernels.xla.dense import attend_all, attend_cached
from squeezejax.pallas_kernels.xla.lists import attend_lists
from squeezejax.pallas_kernels.xla.softmax import merge, merge_shards

FEW_ROWS = 16  # query rows of a head up to which sums read a cache; products of matrices serve more
MOST_BYTES = 2**30  # what the temporaries of selecting, and of a room, may take
SCORE_BYTES = 2**28  # what scores of dense attention may take at once: chunks of keys are as long as that allows


class Wide(Xla):
    """The backend "wide"; see `interface.Backend` for its methods."""

    name = "wide"
    checked = "against plain XLA in tests, on CPUs; compiled for GPUs, never run on a GPU or TPU yet"
    forced = False  # taken to run here: for tests on a CPU, and for compiling without a device

    def missing(self) -> str | None:
        """A CPU, which would rather have its caches minded than its launches counted."""
        if self.forced or jax.default_backend() != "cpu":
            return None
        return "is for GPUs and TPUs, and this is a CPU"

    def check(self, task: str, *arguments):
        """No estimates, and no selection that takes too much memory; nothing to prove."""
        if task not in ("decode", "prefill"):
            return
        tree, q, _, reading, _ = arguments
        if reading.estimates:
            raise NotImplementedError("wide launches estimate nothing")
        needed = select.temporaries(tree, q)
        if task == "decode" and reading.log_T is not None and needed > MOST_BYTES:
            raise NotImplementedError(f"a selection in wide launches would take {needed / 2**20:,.0f} MiB")

    def decode(self, tree, q, own: Own, layer, reading: Reading, context: str | None = None) -> Attended:
        """Selects by a mask, and attends to what is kept in the smallest room that holds it."""
        B, _, _, G, _ = q.shape
        rows, rest = to_lanes(q), _always_read(tree, own, layer, context)

        def every_key():
            return *_attend_every(tree, rows, layer, rest), jnp.ones(B, jnp.float32)

        def kept_keys():
            valid = jnp.broadcast_to((own.start < own.lengths)[:, None], (B, G))
            mask = select.keep_rows(tree, rows, valid, G, layer, reading, context)
            kept = Kept.of(mask.reshape(-1, mask.shape[2]))
            num_rows = jnp.mean(kept.num_rows.reshape(B, -1).astype(jnp.float32), axis=1)
            num_rows = jax.lax.psum(num_rows, context) if context else num_rows
            return *_attend_kept(tree, rows, kept, layer, rest), num_rows / jnp.float32(tree.size)

        if reading.log_T is None:
            out, lse, kept = every_key()
        else:
            out, lse, kept = jax.lax.cond(jnp.all(reading.log_T == -jnp.inf), every_key, kept_keys)
        out, lse = merge_shards(out, lse, context) if context else (out, lse)
        return Attended(from_lanes(out, G), from_lanes(lse, G), kept)

    def prefill(self, tree, q, own: Own, layer, reading: Reading, context: str | None = None) -> Attended:
        """Every key at once where all are read; blocks of tokens that select do so as plain XLA does, in loops."""
        every_key = lambda: _prefill_every(tree, q, own, layer, context)
        if reading.log_T is None:
            return every_key()
        block_by_block = lambda: Xla.prefill(self, tree, q, own, layer, reading, context)
        return jax.lax.cond(reading.dense_blocks, every_key, block_by_block)

    def attend_chunk(self, q, k, v, start, before):
        """By cuDNN on a GPU where that has proved itself, else in as few chunks of keys as memory allows."""
        if cudnn.usable(q, k):
            return cudnn.attend_fused(q, k, v, start, before=before)
        return attend_cached(q, k, v, start, before=before, chunk=_chunk(q.shape[1] * q.shape[2]))


def _always_read(tree, own: Own, layer, context: str | None) -> Pieces:
    """Sinks, window and the tokens up to the newest of every user, whose lanes are [B K]."""
    window = jax.tree.map(lambda x: x[layer], tree.window)
    keys, values = (x.swapaxes(1, 2).astype(window.keys.dtype) for x in (own.keys, own.values))  # [B K T' H]
    B, K = keys.shape[:2]
    column = jnp.arange(keys.shape[2])[None, :]
    seen = (column <= own.start[:, None]) & (column < own.lengths[:, None])
    listed = jnp.concatenate([jnp.ones((B, window.keys.shape[1]), bool), seen], axis=1)
    if context:  # all devices along this axis hold the same: one of them counts it
        listed &= jax.lax.axis_index(context) == 0
    join = lambda shared, own: jnp.concatenate([jnp.broadcast_to(shared, (B, *shared.shape)), own], axis=2)
    together = jax.tree.map(join, window, KeysValues(keys, values))
    flat = jax.tree.map(lambda x: x.reshape(B * K, *x.shape[2:]), together)
    return in_pieces(flat, jnp.repeat(listed, K, axis=0))


def _attend_kept(tree, rows, kept: Kept, layer, rest: Pieces):
    """rows [B K M H] over the rows that every lane keeps, and the rest -> (out f32[B K M H], lse f32[B K M])."""
    B, K, M, H = rows.shape
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    q, cache, head = flat(rows), jax.tree.map(flat, tree.cache), jnp.tile(layer * K + jnp.arange(K), B)
    wanted = rooms(*kept.mask.shape)
    affordable = [P for P in wanted if room_bytes(P, M, H) <= MOST_BYTES]

    def in_room(P: int):
        numbers, lane = kept.in_room(P)
        at = head[lane][:, None], jnp.maximum(numbers, 0)
        found = jax.tree.map(lambda x: x.at[at].get(mode="promise_in_bounds"), cache)
        return attend_pieces(q, Pieces(found, (numbers >= 0)[:, :, None], lane), rest)

    def by_list():
        return merge(attend_lists(q, cache, kept.lists(), head), attend_pieces(q, rest))

    branches = [functools.partial(in_room, P) for P in affordable]
    if len(affordable) < len(wanted):  # then there may be more than the largest of these holds
        branches.append(by_list)
    with jax.named_scope("attend_kept_keys"):
        needed = jnp.sum(kept.num_pieces)
        too_small = sum((needed > P).astype(jnp.int32) for P in affordable)
        out, lse = jax.lax.switch(too_small, branches) if affordable else by_list()
    return out.reshape(rows.shape), lse.reshape(rows.shape[:-1])


def _attend_every(tree, rows, layer, rest: Pieces):
    """rows [B K M H] over every clustered key, and the rest -> (out f32[B K M H], lse f32[B K M])."""
    B, K, M, H = rows.shape
    with jax.named_scope("attend_every_key"):
        if B * M > FEW_ROWS:
            fixed = attend_all(rows, tree.cache, tree.order[layer] >= 0, layer, chunk=_chunk(B * K * M))
            others = attend_pieces(rows.reshape(B * K, M, H), rest)
            return merge(fixed, tuple(x.reshape(B, K, *x.shape[1:]) for x in others))
        # All users' queries read a row of the context together: a lane is a head.
        fixed = in_pieces(jax.tree.map(lambda x: x[layer], tree.cache), tree.order[layer] >= 0)
        user = jnp.repeat(jnp.arange(B), M)
        theirs = rest.listed & (rest.lane[:, None, None] // K == user[None, None, :])
        q = rows.swapaxes(0, 1).reshape(K, B * M, H)
        found = attend_pieces(q, fixed, rest._replace(listed=theirs, lane=rest.lane % K))
        return tuple(x.reshape(K, B, M, *x.shape[2:]).swapaxes(0, 1) for x in found)


def _prefill_every(tree, q, own: Own, layer, context: str | None) -> Attended:
    """q [B T K G H] over every key."""
    B, _, K, G, _ = q.shape
    rows, back = to_lanes(q), lambda found: tuple(from_lanes(x, G) for x in found)
    with jax.named_scope("attend_every_key"):
        whole = context is None and tree.live_keys is None and tree.num_keys == tree.keys.shape[2]
        if whole and tree.key_scales is None and cudnn.usable(q.reshape(*q.shape[:2], K * G, -1), own.keys):
            fixed = cudnn.attend_layer(q, tree.keys[layer], tree.values[layer])  # no row is padding
        else:
            listed = tree.order[layer] >= 0
            fixed = back(attend_all(rows, tree.cache, listed, layer, chunk=_chunk(rows.shape[2] * B * K)))
    fixed = merge_shards(fixed[0], fixed[1], context) if context else fixed
    out, lse = merge(fixed, *map(back, attend_window(tree, rows, layer)), _attend_own(q, own))
    return Attended(out, lse, jnp.ones(B, jnp.float32))


def _attend_own(q, own: Own):
    """Tokens q [B T K G H] over the users' tokens up to themselves -> (out f32[B T K G H], lse f32[B T K G])."""
    B, T, K, G, H = q.shape
    tokens_and_heads = q.reshape(B, T, K * G, H)
    if cudnn.usable(tokens_and_heads, own.keys):
        with jax.named_scope("attend_user_tokens"):
            return cudnn.attend_own(tokens_and_heads, own.keys, own.values, own.start)
    block = min(T, max(1, SCORE_BYTES // (4 * B * K * G * own.keys.shape[1])))
    q = jnp.pad(q, ((0, 0), (0, -T % block), (0, 0), (0, 0), (0, 0)))
    found = jax.lax.map(lambda first: own_block(q, own, first, block, T)[2], jnp.arange(0, T, block))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T] for x in found)


def step_bytes(tree, group: int, users: int) -> int:
    """Temporaries of a decode step that selects, at most, and what its program derives of the tree beforehand."""
    L, K, R, H = tree.keys.shape
    q = jax.ShapeDtypeStruct((users, 1, K, group, H), tree.dtype)
    affordable = [room_bytes(P, group, H) for P in rooms(users * K, R)]
    largest = max((size for size in affordable if size <= MOST_BYTES), default=0)
    return 4 * L * K * R + select.temporaries(tree, q) + largest


def _chunk(rows: int) -> int:
    """Keys whose scores for so many query rows may be held at once."""
    return max(512, SCORE_BYTES // (4 * rows))
