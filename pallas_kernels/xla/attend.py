"""Plain XLA for every kernel: the oracle that kernels are tested against, and the path of CPU, TPU and older GPUs.

A *lane* is one set of query rows that share one selection and one key/value head; U lanes of M rows each. A lane names
its layer and head in the cache and its kept rows by runs, so no key is ever copied but into the chunk at hand.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a fully masked row stays free of NaN: its lse is about MASKED, and a merge gives it no weight.
MASKED = -1e30


def score_clusters(q, centroids, counts, alive, valid, *, context: str | None = None, block: int = 128):
    """log A of every cluster: its softmax-normalised score, averaged over query rows (spec.md, Offline 4 and Online 5).

    q [M H]; centroids f32[C H]; counts i32[C]; alive bool[C], clusters that take part; valid bool[M], rows that do.
    Gives f32[C]: log A over alive clusters, −∞ for the others. Rows are taken in blocks whose scores stay in cache:
    memory is block · C floats, however many rows there are. `context` is the axis of an enclosing shard_map over which
    the clusters are distributed.
    """
    M, H = q.shape
    add = lambda mean, q, valid: mean.add(log_scores(centroid_dots(q, centroids), counts, alive, context), valid)
    mean = LogMean.start(counts.shape)
    if block >= M:
        return add(mean, q, valid).end(alive)
    padding = -M % block
    blocks = jnp.pad(q, ((0, padding), (0, 0))).reshape(-1, block, H), jnp.pad(valid, (0, padding)).reshape(-1, block)
    return jax.lax.scan(lambda mean, rows: (add(mean, *rows), None), mean, blocks)[0].end(alive)


def centroid_dots(q, centroids) -> jax.Array:
    """s(q, c) = q·c/√H in float32: q [M H], centroids f32[C H] -> f32[M C]."""
    # HIGHEST: accelerators would otherwise round both operands, which moves scores by up to 3 % (spec.md, traps).
    dots = jnp.einsum("MH,CH->MC", q.astype(jnp.float32), centroids, precision=jax.lax.Precision.HIGHEST)
    return dots / math.sqrt(q.shape[-1])


def log_scores(dots, counts, alive, context: str | None = None):
    """log S of every cluster for every query row: f32[M C], s(q, c) -> f32[M C], normalised over alive clusters.

    Maximum and sum run over alive clusters only, so that a dead cluster, however high it scores, changes nothing.
    """
    # One order of operations, here and in calibration: (s − max) − log Σ n exp(s − max), then log-mean-exp over rows.
    live = jnp.where(alive[None, :], dots, MASKED)
    top = jnp.max(live, axis=1, keepdims=True)
    top = jax.lax.pmax(top, context) if context else top
    shifted = live - top
    weights = jnp.where(alive, counts, 0).astype(jnp.float32)
    total = jnp.sum(weights[None, :] * jnp.exp(shifted), axis=1, keepdims=True)
    total = jax.lax.psum(total, context) if context else total
    return shifted - jnp.log(jnp.maximum(total, 1.0))  # ≥ 1 wherever a cluster is alive: its maximum adds n ≥ 1


class LogMean(NamedTuple):
    """A mean over query rows, in log space: rows seen so far."""

    top: jax.Array  # f32[C]
    total: jax.Array  # f32[C], Σ exp(log S − top)
    num_rows: jax.Array  # f32[]

    @classmethod
    def start(cls, shape):
        """No row yet."""
        return cls(jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.float32))

    def add(self, scores, valid) -> "LogMean":
        """Adds rows of log S f32[M C] where valid bool[M]."""
        scores = jnp.where(valid[:, None], scores, MASKED)
        top = jnp.maximum(self.top, jnp.max(scores, axis=0))
        here = jnp.sum(jnp.where(valid[:, None], jnp.exp(scores - top[None, :]), 0.0), axis=0)
        num_rows = self.num_rows + jnp.sum(valid.astype(jnp.float32))
        return LogMean(top, self.total * jnp.exp(self.top - top) + here, num_rows)

    def end(self, alive):
        """log A f32[C], −∞ for clusters not alive and where there was no row."""
        # log 1 − log 1 = 0: equal scores stay bit-equal.
        log_mean = self.top + (jnp.log(self.total) - jnp.log(self.num_rows))
        return jnp.where(alive & (self.num_rows > 0), log_mean, -jnp.inf)


class Runs(NamedTuple):
    """The rows of one lane's kept clusters: runs of consecutive rows, listed one after another."""

    starts: jax.Array  # i32[C], first row of each run in the list, the list's unused end being anything
    offsets: jax.Array  # i32[C], position in the list of rows at which the run begins; unused: past every row
    num_rows: jax.Array  # i32[], rows in all


def kept_runs(kept, starts, counts) -> Runs:
    """Compacts the kept clusters bool[C], which are disjoint runs given by starts, counts i32[C] in any order."""
    C = kept.shape[0]
    lengths = jnp.where(kept, counts, 0)
    live = lengths > 0
    slot = jnp.where(live, jnp.cumsum(live) - 1, C)
    offsets = jnp.cumsum(lengths, dtype=jnp.int32) - lengths
    return Runs(
        starts=jnp.zeros(C, jnp.int32).at[slot].set(starts, mode="drop"),
        offsets=jnp.full(C, jnp.iinfo(jnp.int32).max, jnp.int32).at[slot].set(offsets, mode="drop"),
        num_rows=jnp.sum(lengths, dtype=jnp.int32),
    )


def expand(runs: Runs, first, size: int):
    """The rows at positions [first, first + size) of one lane's list, i32[size]; past its end they mean nothing."""
    run = jnp.searchsorted(runs.offsets, first, side="right") - 1
    # A run has at least one row, so no more than `size` of them matter.
    window = lambda x: jax.lax.dynamic_slice_in_dim(jnp.pad(x, (0, size), mode="edge"), run, size)
    offsets = window(runs.offsets)
    # Position j of a run holds row j + shift, so rows are positions plus a running sum of the changes of shift.
    shifts = window(runs.starts) - offsets
    at = jnp.where(offsets < first + size, jnp.maximum(offsets - first, 0), size)
    jumps = jnp.zeros(size, jnp.int32).at[at].add(jnp.diff(shifts, prepend=0), mode="drop")
    return first + jnp.arange(size, dtype=jnp.int32) + jnp.cumsum(jumps)


class _Softmax(NamedTuple):
    """A softmax over keys seen so far, not yet divided."""

    top: jax.Array  # f32[U M]
    total: jax.Array  # f32[U M]
    out: jax.Array  # f32[U M H]


def _softmax_start(U, M, H):
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    return _Softmax(jnp.full((U, M), MASKED, jnp.float32), zeros(U, M), zeros(U, M, H))


def _softmax_step(state: _Softmax, q, k, v, mask) -> _Softmax:
    """Adds keys k, values v [U J H] where mask bool[U J], for queries q [U M H]."""
    scores = jnp.einsum("UMH,UJH->UMJ", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = jnp.where(mask[:, None, :], scores, MASKED)
    top = jnp.maximum(state.top, jnp.max(scores, axis=-1))
    weights = jnp.where(mask[:, None, :], jnp.exp(scores - top[:, :, None]), 0.0)
    keep = jnp.exp(state.top - top)
    out = jnp.einsum("UMJ,UJH->UMH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return _Softmax(top, state.total * keep + jnp.sum(weights, axis=-1), state.out * keep[:, :, None] + out)


def _softmax_add(state: _Softmax, part: _Softmax, lane) -> _Softmax:
    """Adds partial softmaxes, each over some keys of lane[i], to those of the lanes."""
    member = lane[None, :] == jnp.arange(lane.shape[0])[:, None]  # [lane part]
    tops = jnp.where(member[:, :, None], part.top[None], MASKED)
    top = jnp.maximum(state.top, jnp.max(tops, axis=1))
    keep = jnp.exp(state.top - top)
    # A sum over one-hot weights, not a scatter: its order is fixed, so results repeat bit for bit on every device.
    weights = jnp.where(member[:, :, None], jnp.exp(tops - top[:, None]), 0.0)
    add = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # accelerators would round both factors
    total = state.total * keep + add("UPM,PM->UM", weights, part.total)
    out = state.out * keep[:, :, None] + add("UPM,PMH->UMH", weights, part.out)
    return _Softmax(top, total, out)


def _softmax_end(state: _Softmax):
    """(out f32[U M H], lse f32[U M]); a lane without keys gives 0 and MASKED."""
    safe = jnp.maximum(state.total, jnp.finfo(jnp.float32).tiny)
    return state.out / safe[:, :, None], jnp.where(state.total > 0, state.top + jnp.log(safe), MASKED)


def _read(take, cache, step):
    """take(cache), rows of a cache, inside a loop that counts `step`."""
    if cache.dtype.itemsize != 2:
        return take(cache)

    def as_integers(cache):
        # Before JAX 0.11 XLA's CPU backend widens all of a 16-bit float cache before the loop that reads rows of it, at
        # many times the cost of the loop. It leaves integers alone, and the barrier keeps it from making them early.
        cache, _ = jax.lax.optimization_barrier((cache, step))
        return jax.lax.bitcast_convert_type(take(jax.lax.bitcast_convert_type(cache, jnp.uint16)), cache.dtype)

    return jax.lax.platform_dependent(cache, cpu=as_integers, default=take)


def attend_runs(q, keys, values, runs: Runs, head, *, chunk: int = 512, block: int = 1024):
    """Exact attention of each lane over the rows of its runs -> (out f32[U M H], lse f32[U M]).

    q [U M H]; keys, values [L·K R H]; runs, every field with a leading axis U; head i32[U], the lane's index in L·K.
    Lists differ much in length, so they are cut into blocks, and U blocks at a time are worked on, whichever lanes
    they belong to. Loops end where the lists do, known on the device only: no row is ever dropped, and no work grows
    with R.
    """
    U, M, H = q.shape
    chunk = min(chunk, keys.shape[1])
    block = -(-min(block, keys.shape[1]) // chunk) * chunk
    blocks = (runs.num_rows + block - 1) // block
    ends = jnp.cumsum(blocks)

    def attend_blocks(i, state):
        number = i * U + jnp.arange(U)  # of each block, counted through all lanes
        lane = jnp.minimum(jnp.sum(ends[None, :] <= number[:, None], axis=1), U - 1)
        first = (number - (ends - blocks)[lane]) * block
        size = jnp.clip(runs.num_rows[lane] - first, 0, block)  # 0 past the last block
        first = jnp.where(size > 0, first, 0)
        rows = jax.vmap(functools.partial(expand, size=block))(jax.tree.map(lambda x: x[lane], runs), first)
        rows = jnp.where(jnp.arange(block)[None, :] < size[:, None], rows, 0)  # the gather promises to stay in bounds
        q_here, head_here = q[lane], head[lane][:, None]

        def step(j, part):
            index = jax.lax.dynamic_slice_in_dim(rows, j * chunk, chunk, axis=1)
            mask = (j * chunk + jnp.arange(chunk))[None, :] < size[:, None]
            take = lambda cache: cache.at[head_here, index].get(mode="promise_in_bounds")
            k, v = (_read(take, cache, j).astype(q.dtype) for cache in (keys, values))
            return _softmax_step(part, q_here, k, v, mask)

        steps = (jnp.max(size) + chunk - 1) // chunk
        part = jax.lax.fori_loop(0, steps, step, _softmax_start(U, M, H))
        return _softmax_add(state, part, lane)

    return _softmax_end(jax.lax.fori_loop(0, (ends[-1] + U - 1) // U, attend_blocks, _softmax_start(U, M, H)))


def attend_all(q, keys, values, valid, layer, *, chunk: int = 512):
    """Dense attention over every valid row of one layer -> (out f32[B K M H], lse f32[B K M]).

    q [B K M H]; keys, values [L K R H]; valid bool[K R]; layer i32[]. Rows are read in contiguous chunks.
    """
    B, K, M, H = q.shape
    R = keys.shape[2]
    chunk = min(chunk, R)
    q = q.transpose(1, 0, 2, 3).reshape(K, B * M, H)

    def step(i, state):
        # The last chunk is moved back to end with the cache; rows already seen are masked.
        first = jnp.minimum(i * chunk, R - chunk)
        take = lambda cache: jax.lax.dynamic_slice(cache, (layer, 0, first, 0), (1, K, chunk, H))[0]
        mask = jax.lax.dynamic_slice_in_dim(valid, first, chunk, axis=1)
        mask = mask & (first + jnp.arange(chunk) >= i * chunk)[None, :]
        k, v = (_read(take, cache, i).astype(q.dtype) for cache in (keys, values))
        return _softmax_step(state, q, k, v, mask)

    out, lse = _softmax_end(jax.lax.fori_loop(0, -(-R // chunk), step, _softmax_start(K, B * M, H)))
    return out.reshape(K, B, M, H).swapaxes(0, 1), lse.reshape(K, B, M).swapaxes(0, 1)
