"""Lists of the rows that a lane keeps: as runs of consecutive rows, or one by one; and attention over them.

U lanes of M query rows each. A lane names its layer and head in the cache and its kept rows by a list, so no key is
ever copied but into the chunk at hand.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels.interface import KeysValues
from squeezejax.pallas_kernels.xla.dense import read_rows
from squeezejax.pallas_kernels.xla.softmax import MASKED, Softmax


class Runs(NamedTuple):
    """A list of disjoint runs of consecutive numbers, of rows or of clusters, one after another."""

    starts: jax.Array  # i32[C], first number of each run, the unused end being anything
    offsets: jax.Array  # i32[C], position in the list at which the run begins; unused: past every position
    num_rows: jax.Array  # i32[], numbers in all
    owners: jax.Array  # i32[C], the cluster that each run belongs to

    def take(self, lane, first, size: int):
        """Positions [first, first + size) of the lists of lane i32[U], i32[U size]; past their end they mean nothing.

        Every field has a leading axis of lanes; first i32[U].
        """
        here = jax.tree.map(lambda x: x[lane], self)
        return jax.vmap(functools.partial(expand, size=size))(here, first)


class Rows(NamedTuple):
    """Lists of single rows, with a leading axis of lanes."""

    rows: jax.Array  # i32[U R], the unused end being anything
    num_rows: jax.Array  # i32[U]

    def take(self, lane, first, size: int):
        """As `Runs.take`."""
        at = first[:, None] + jnp.arange(size)[None, :]
        return self.rows.at[lane[:, None], at].get(mode="clip")


class Found(NamedTuple):
    """What one selection a user keeps of one layer; leading axes [B K] unless said otherwise."""

    lists: Runs | Rows  # of the kept rows, leading axis B·K
    num_rows: jax.Array  # i32[B K], kept rows
    clusters: jax.Array  # bool[B K C], finest clusters kept; with codes of keys, those whose keys were looked at
    rest: list = ()  # [(out f32[B K M H] or None, lse f32[B K M]), …]: estimates of all that is not kept, if asked for


def kept_runs(kept, starts, counts) -> Runs:
    """Compacts the kept clusters bool[C], which are disjoint runs given by starts, counts i32[C] in any order."""
    C = kept.shape[0]
    lengths = jnp.where(kept, counts, 0)
    live = lengths > 0
    slot = jnp.where(live, jnp.cumsum(live, dtype=jnp.int32) - 1, C)
    offsets = jnp.cumsum(lengths, dtype=jnp.int32) - lengths
    return Runs(
        starts=jnp.zeros(C, jnp.int32).at[slot].set(starts, mode="drop"),
        offsets=jnp.full(C, jnp.iinfo(jnp.int32).max, jnp.int32).at[slot].set(offsets, mode="drop"),
        num_rows=jnp.sum(lengths, dtype=jnp.int32),
        owners=jnp.zeros(C, jnp.int32).at[slot].set(jnp.arange(C, dtype=jnp.int32), mode="drop"),
    )


def expand(runs: Runs, first, size: int):
    """The numbers at positions [first, first + size) of one list, i32[size]; past its end they mean nothing."""
    return expand_owned(runs, first, size)[0]


def expand_owned(runs: Runs, first, size: int):
    """`expand`, and the cluster that each of these numbers belongs to: i32[size] both."""
    run = jnp.searchsorted(runs.offsets, first, side="right") - 1
    # A run has at least one row, so no more than `size` of them matter.
    window = lambda x: jax.lax.dynamic_slice_in_dim(jnp.pad(x, (0, size), mode="edge"), run, size)
    offsets = window(runs.offsets)
    at = jnp.where(offsets < first + size, jnp.maximum(offsets - first, 0), size)

    def of_run(values):  # values i32[size] of the runs, repeated for each of their positions
        jumps = jnp.zeros(size, jnp.int32).at[at].add(jnp.diff(values, prepend=0), mode="drop")
        return jnp.cumsum(jumps, dtype=jnp.int32)

    # Position j of a run holds row j + shift, so rows are positions plus a running sum of the changes of shift.
    rows = first + jnp.arange(size, dtype=jnp.int32) + of_run(window(runs.starts) - offsets)
    return rows, of_run(window(runs.owners))


def cluster_of_rows(starts, counts, num_rows: int):
    """The cluster of every row of one head, i32[R], −1 for padding; starts, counts i32[C] of disjoint runs."""
    # A row lies in the run that began last, if in any: runs may lie in any order, with padding between them.
    row = jnp.arange(num_rows)
    first = jnp.where(counts > 0, starts, num_rows)
    begins = jnp.full(num_rows, -1).at[first].set(jnp.arange(counts.shape[0]), mode="drop")
    last = jax.lax.cummax(jnp.where(begins >= 0, row, 0))
    cluster = begins[last]
    return jnp.where((cluster >= 0) & (row < last + counts[cluster]), cluster, -1)


def attend_lists(q, cache: KeysValues, lists: Runs | Rows, head, *, chunk: int = 512, block: int = 1024):
    """Exact attention of each lane over the rows of its list -> (out f32[U M H], lse f32[U M]).

    q [U M H]; cache, leading axis L·K; lists, every field with a leading axis U; head i32[U], the lane's index in L·K.
    Lists differ much in length, so they are cut into blocks, and U blocks at a time are worked on, whichever lanes
    they belong to. Loops end where the lists do, known on the device only: no row is ever dropped, and no work grows
    with R.

    Reverse-mode gradients go to q alone, over the same lists: the cache is taken for a constant.
    """
    chunk = min(chunk, cache.keys.shape[1])
    return _attend_lists(chunk, -(-min(block, cache.keys.shape[1]) // chunk) * chunk, q, cache, lists, head)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_lists(chunk: int, block: int, q, cache: KeysValues, lists: Runs | Rows, head):
    def attend(lane):
        here = q[lane]
        return lambda part, rows, mask: part.add(here, rows.keys.astype(q.dtype), rows.values.astype(q.dtype), mask)

    nothing = Softmax.start(*q.shape)
    return _walk(chunk, block, cache, lists, head, attend, Softmax.add_parts, nothing).end()


def _walk(chunk: int, block: int, cache: KeysValues, lists: Runs | Rows, head, step_of, join, nothing):
    """Reads the rows of all lists, U blocks of `block` rows at a time, by chunks, and gives back what they came to.

    From `nothing` on, part = step_of(lane)(part, rows [U chunk H], mask bool[U chunk]) for the chunks of U blocks, of
    the lanes i32[U]; and from `nothing` on, state = join(state, part, lane).
    """
    U = len(head)
    blocks = (lists.num_rows + block - 1) // block
    ends = jnp.cumsum(blocks, dtype=jnp.int32)

    def visit(i, state):
        number = i * U + jnp.arange(U)  # of each block, counted through all lanes
        lane = jnp.minimum(jnp.sum(ends[None, :] <= number[:, None], axis=1), U - 1)
        first = (number - (ends - blocks)[lane]) * block
        size = jnp.clip(lists.num_rows[lane] - first, 0, block)  # 0 past the last block
        first = jnp.where(size > 0, first, 0)
        numbers = lists.take(lane, first, block)
        listed = jnp.arange(block)[None, :] < size[:, None]
        numbers = jnp.where(listed, numbers, 0)  # the gather promises to stay in bounds
        head_here, step_here = head[lane][:, None], step_of(lane)

        def step(j, part):
            index = jax.lax.dynamic_slice_in_dim(numbers, j * chunk, chunk, axis=1)
            mask = (j * chunk + jnp.arange(chunk))[None, :] < size[:, None]
            rows = read_rows(lambda array: array.at[head_here, index].get(mode="promise_in_bounds"), cache, j)
            return step_here(part, rows, mask)

        steps = (jnp.max(size) + chunk - 1) // chunk
        return join(state, jax.lax.fori_loop(0, steps, step, nothing), lane)

    return jax.lax.fori_loop(0, (ends[-1] + U - 1) // U, visit, nothing)


def _attend_lists_forward(chunk: int, block: int, q, cache, lists, head):
    found = _attend_lists(chunk, block, q, cache, lists, head)
    return found, (q, cache, lists, head, *found)


def _attend_lists_backward(chunk: int, block: int, saved, cotangents):
    """The gradient of q [U M H] for those of out f32[U M H] and lse f32[U M]; scores are computed anew.

    With weights p = exp(score − lse), the score of a key with value v gets p·(v·d_out − out·d_out + d_lse).
    """
    q, cache, lists, head, out, lse = saved
    d_out, d_lse = cotangents
    scale = 1 / math.sqrt(q.shape[-1])
    common = d_lse - jnp.sum(out * d_out, axis=-1)
    of_lanes = q.astype(jnp.float32), lse, d_out, common
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def step_of(lane):
        plain, lse, d_out, common = (x[lane] for x in of_lanes)

        def step(part, rows: KeysValues, mask):
            k, v = (x.astype(jnp.float32) for x in (rows.keys, rows.values))
            log_p = product("UMH,UJH->UMJ", plain, k) * scale - lse[:, :, None]
            p = jnp.exp(jnp.where(mask[:, None, :], log_p, MASKED))
            d_scores = p * (product("UMH,UJH->UMJ", d_out, v) + common[:, :, None])
            return part + product("UMJ,UJH->UMH", d_scores, k) * scale

        return step

    join = lambda total, part, lane: total.at[lane].add(part)
    d_q = _walk(chunk, block, cache, lists, head, step_of, join, jnp.zeros(q.shape, jnp.float32))
    return d_q.astype(q.dtype), None, None, None


_attend_lists.defvjp(_attend_lists_forward, _attend_lists_backward)
