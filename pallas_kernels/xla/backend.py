"""Plain XLA as a backend: it takes every tree on every device, and is what other backends fall back to."""

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import cudnn
from squeezejax.pallas_kernels.interface import Attended, Layout, Own, Reading
from squeezejax.pallas_kernels.layout import from_lanes, to_lanes
from squeezejax.pallas_kernels.xla import common_scale, estimated, levelwise
from squeezejax.pallas_kernels.xla.dense import attend_all, attend_cached
from squeezejax.pallas_kernels.xla.lists import Found, attend_lists
from squeezejax.pallas_kernels.xla.softmax import merge, merge_shards, partial_attention


class Xla:
    """The backend "xla"; see `interface.Backend` for its methods."""

    name = "xla"
    checked = "against float64 in tests, on CPUs; others are compared with it"

    def missing(self) -> str | None:
        """Nothing."""
        return None

    def layout(self, dtype) -> Layout:
        """Any: rows are gathered one by one."""
        return Layout(granule=1, row_multiple=1)

    def check(self, task: str, *arguments):
        """Every task, nothing to prove; but estimates need the whole context on every device."""
        if task in ("decode", "prefill"):
            *_, reading, context = arguments
            if reading.estimates and context is not None:
                raise NotImplementedError("estimates need the whole context on every device of the mesh")

    def prove(self, task: str, sizes):
        """Nothing to prove: it is what others are compared with."""

    def decode(self, tree, q, own: Own, layer, reading: Reading, context: str | None = None) -> Attended:
        """One token a user is a block of one."""
        return self.prefill(tree, q, own, layer, reading, context)

    def prefill(self, tree, q, own: Own, layer, reading: Reading, context: str | None = None) -> Attended:
        """Block by block of query tokens, each with a selection of its own."""
        T = q.shape[1]
        block = min(tree.config.query_block or T, T)
        num_blocks = -(-T // block)
        q = jnp.pad(q, ((0, 0), (0, num_blocks * block - T), (0, 0), (0, 0), (0, 0)))

        def attend_block(index):
            part, valid, attended = own_block(q, own, index * block, block, T)
            found = _attend_block(tree, part, valid, attended, layer, reading, context)
            return found, jnp.sum(valid.astype(jnp.float32), axis=1)

        if num_blocks == 1:
            found, _ = attend_block(0)
        else:
            found = join_blocks(*jax.lax.map(attend_block, jnp.arange(num_blocks)))
        return found._replace(out=found.out[:, :T], lse=found.lse[:, :T])

    def attend_chunk(self, q, k, v, start, before):
        """By cuDNN on a GPU where that has proved itself, else in chunks of keys."""
        attend = cudnn.attend_fused if cudnn.usable(q, k) else attend_cached
        return attend(q, k, v, start, before=before)

    def nearest(self, rows, centres, *, with_second: bool):
        """None: K-means keeps its scores in cache by itself (offline/kmeans.py)."""


def own_block(q, own: Own, first, block: int, T: int):
    """Queries [first, first + block) of q [B T' K G H], which of them take part, and their attention to own tokens.

    T of the T' tokens are real. -> (q [B block K G H], bool[B block], (out f32[B block K G H], lse f32[B block K G]))
    """
    token = first + jnp.arange(block)[None, :]
    row = own.start[:, None] + token
    valid = (row < own.lengths[:, None]) & (token < T)
    part = jax.lax.dynamic_slice_in_dim(q, first, block, axis=1)
    with jax.named_scope("attend_user_tokens"):
        column = jnp.arange(own.keys.shape[1])[None, None, :]
        mask = (column <= row[:, :, None]) & (column < own.lengths[:, None, None])
        return part, valid, partial_attention(part, own.keys, own.values, mask)


def join_blocks(found: Attended, tokens) -> Attended:
    """Blocks of query tokens, a leading axis of every array, in a row; tokens f32[blocks B] is how many were valid."""
    in_a_row = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    mean = lambda share: jnp.sum(share * tokens, axis=0) / jnp.maximum(jnp.sum(tokens, axis=0), 1.0)
    return Attended(in_a_row(found.out), in_a_row(found.lse), *jax.tree.map(mean, found[2:]))


def _attend_block(tree, q, valid, own, layer, reading: Reading, context: str | None) -> Attended:
    """q [B T K G H], one selection a user, over the fixed context; `own` is their attention to the users' tokens."""
    G = q.shape[3]
    rows, row_valid = to_lanes(q), jnp.repeat(valid, G, axis=1)
    own = tuple(to_lanes(x) for x in own)
    if reading.estimates:
        out, lse, kept, missed = _attend_estimated(tree, rows, row_valid, G, own, layer, reading)
    else:
        fixed, kept = _attend_fixed(tree, rows, row_valid, G, layer, reading, context)
        (out, lse), missed = merge(fixed, *attend_window(tree, rows, layer), own), None
    return Attended(from_lanes(out, G), from_lanes(lse, G), kept, missed)


def _attend_fixed(tree, rows, valid, group: int, layer, reading: Reading, context: str | None):
    """rows [B K M H] over the clustered keys -> ((out, lse), kept fraction f32[B])."""

    def every_key():
        with jax.named_scope("attend_every_key"):
            found = attend_all(rows, tree.cache, tree.order[layer] >= 0, layer)
            return *found, jnp.ones(len(rows), jnp.float32)

    def kept_keys():
        found = select(tree, rows, valid, group, layer, reading, context)
        num_rows = jnp.mean(found.num_rows.astype(jnp.float32), axis=1)
        kept = (jax.lax.psum(num_rows, context) if context else num_rows) / jnp.float32(tree.size)
        return *_attend_found(tree, rows, found, layer), kept

    if reading.log_T is None:
        out, lse, kept = every_key()
    else:
        # A threshold of −∞ keeps every key, and reading them in order costs half of reading them by list.
        out, lse, kept = jax.lax.cond(jnp.all(reading.log_T == -jnp.inf), every_key, kept_keys)
    # Merged here, before the window, which every device holds.
    return merge_shards(out, lse, context) if context else (out, lse), kept


def select(tree, rows, valid, group: int, layer, reading: Reading, context: str | None = None) -> Found:
    """What rows [B K M H], of which valid bool[B M] take part, keep of the clustered keys: one selection a user.

    `group` is G: a query token has so many rows. What is kept is piecewise constant, so gradients stop here; those of a
    tail's estimate do not, and JAX refuses them.
    """
    if not reading.tail:
        rows = jax.lax.stop_gradient(rows)
    with jax.named_scope("select"):
        if reading.min_mass is not None:
            return estimated.select(tree, rows, valid, layer, reading)
        if tree.config.score == "variance":
            options = {"estimate": reading.estimates, "tail": reading.tail}
            log_T = reading.log_T_of(jnp.sum(valid.astype(jnp.float32), axis=1) / group, tree.config.calibration_tokens)
            return common_scale.select(tree, rows, valid, layer, log_T, context=context, **options)
        if reading.estimates:
            return estimated.select(tree, rows, valid, layer, reading)
        return levelwise.select(tree, rows, valid, layer, reading.log_T_of_users(len(rows)), context=context)


def _attend_found(tree, rows, found: Found, layer):
    """rows [B K M H] over the kept rows of every user and head -> (out f32[B K M H], lse f32[B K M])."""
    B, K = rows.shape[:2]
    with jax.named_scope("attend_kept_keys"):
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        head = jnp.tile(layer * K + jnp.arange(K), B)
        out, lse = attend_lists(flat(rows), jax.tree.map(flat, tree.cache), found.lists, head)
    return out.reshape(rows.shape), lse.reshape(rows.shape[:-1])


def attend_window(tree, rows, layer) -> list:
    """rows [B K M H] over sinks and observation window -> [(out f32[B K M H], lse f32[B K M])], [] if there is none."""
    num_rows = tree.window.keys.shape[2]
    if not num_rows:
        return []
    with jax.named_scope("attend_window"):
        everything = jnp.ones((rows.shape[1], num_rows), bool)
        return [attend_all(rows, tree.window, everything, layer)]


def _attend_estimated(tree, rows, valid, group: int, own, layer, reading: Reading):
    """`_attend_fixed`, merged with all else that is attended, and the estimates -> (out, lse, kept f32[B], missed)."""
    K = rows.shape[1]
    found = select(tree, rows, valid, group, layer, reading)
    attended = merge(own, *attend_window(tree, rows, layer), _attend_found(tree, rows, found, layer))
    left = jax.nn.logsumexp(jnp.stack([lse for _, lse in found.rest]), axis=0)
    missed = jnp.where(valid[:, None], jax.nn.sigmoid(left - attended[1]), 0.0)
    missed = jnp.sum(missed, axis=(1, 2)) / (K * jnp.maximum(jnp.sum(valid.astype(jnp.float32), axis=1), 1.0))
    if reading.tail:
        attended = merge(attended, *found.rest)
    return *attended, jnp.mean(found.num_rows.astype(jnp.float32), axis=1) / jnp.float32(tree.size), missed
