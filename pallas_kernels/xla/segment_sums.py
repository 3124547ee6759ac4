"""Sums by label that repeat bit for bit on every device: plain XLA.

A scatter-add runs in order on a CPU, and there it is the fastest way. A GPU adds by atomics, in whatever order threads
arrive. Elsewhere than on a CPU, rows are therefore sorted by label and each run of equal labels is added in pieces of
a fixed number of rows, then the pieces' sums in the same way, until one is left: as even for one cluster of all rows
as for clusters of one row each.
"""

import jax
import jax.numpy as jnp

PIECE = 16  # rows added at once: larger pieces read more padding, smaller ones need more rounds


def segment_sum(values, labels, num_segments: int):
    """Σ of values [S …] of equal label, [num_segments …]; labels i32[S] in 0 … num_segments − 1, in any order."""
    in_turn = lambda values, labels: jax.ops.segment_sum(values, labels, num_segments)
    in_pieces = lambda values, labels: sum_in_pieces(values, labels, num_segments)
    return jax.lax.platform_dependent(values, labels, cpu=in_turn, default=in_pieces)


def sum_in_pieces(values, labels, num_segments: int):
    """`segment_sum` without a scatter of floats."""
    counts = jax.ops.segment_sum(jnp.ones_like(labels), labels, num_segments)  # integers: the order does not matter
    starts = jnp.cumsum(counts) - counts
    return _sum_runs(values[jnp.argsort(labels)], starts, counts, values.shape[0])


def _sum_runs(values, starts, counts, longest: int):
    """Sums of runs of consecutive values [J …], given by starts, counts i32[C], none longer than `longest`."""
    if longest <= PIECE:
        return _sum_few(values, starts, counts)
    pieces = jnp.maximum(-(-counts // PIECE), 1)
    ends = jnp.cumsum(pieces)
    most = counts.shape[0] + values.shape[0] // PIECE
    run = jnp.repeat(jnp.arange(counts.shape[0]), pieces, total_repeat_length=most)
    passed = (jnp.arange(most) - (ends - pieces)[run]) * PIECE  # rows of the run before this piece
    # Past the last piece, `run` repeats the last run, of which nothing is left.
    sums = _sum_few(values, starts[run] + passed, counts[run] - passed)
    return _sum_runs(sums, ends - pieces, pieces, -(-longest // PIECE))


def _sum_few(values, starts, counts):
    """Sums of runs of which only the first PIECE values count."""
    offset = jnp.arange(PIECE)[None, :]
    rows = values[jnp.minimum(starts[:, None] + offset, values.shape[0] - 1)]  # [C PIECE …]
    listed = (offset < counts[:, None]).reshape(*rows.shape[:2], *[1] * (rows.ndim - 2))
    return jnp.sum(jnp.where(listed, rows, jnp.zeros((), rows.dtype)), axis=1)
