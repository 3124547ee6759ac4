"""Which scored clusters a decode query keeps, for Hopper: normalised, averaged over the group, compared with log T.

With the paper's rule the order of operations is that of calibration: maximum and log of the sum are subtracted one
after the other, so equal scores stay bit-equal, and logarithms are exact.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.centroid_scores import AT_ONCE, Scores, Terms
from squeezejax.pallas_kernels.hopper.mosaic import (
    ALONG,
    DOWN,
    GRANULE,
    MASKED,
    MATRIX,
    TILE,
    columns,
    compiler_params,
    count_ctas,
    full,
    load,
    rows,
)
from squeezejax.pallas_kernels.hopper.shares import Shares
from squeezejax.pallas_kernels.hopper.step import Step
from squeezejax.pallas_kernels.hopper.work_list import (
    PER_TILE,
    Kept,
    Lists,
    first_granule,
    gather,
    granule_of,
    granules_touched,
    in_order_items,
    listed_items,
)


def log_mean(log_scores, group: int):
    """In a kernel: log of the mean over the first `group` columns of exp(f32[TILE M]), f32[TILE] down the rows."""
    column = plgpu.broadcasted_iota(jnp.int32, log_scores.shape, 1, layout=MATRIX)
    log_scores = jnp.where(column < group, log_scores, MASKED)
    best = plgpu.layout_cast(jnp.max(log_scores, axis=1), DOWN)
    shares = jnp.where(column < group, jnp.exp(log_scores - rows(best, log_scores.shape)), 0.0)
    return best + jnp.log(plgpu.layout_cast(jnp.sum(shares, axis=1), DOWN) / group)


def keep_clusters(
    scores: Scores, lists: Lists, level, terms: Terms | None, lse, below: int, step: Step, depth: int, group: int,
) -> tuple[Kept, jax.Array]:  # fmt: skip
    """Keeps the clusters of the level `depth` whose log A exceeds log T strictly (docs/method.md, Selection).

    lists are what the lanes read; level has the fields of the tree's `Level`, whose clusters are runs of the next
    level, or of the cache, of `below` rows a head; group is G. terms are those of our rule, None for the paper's. lse
    f32[lanes M] are log denominators; where None, they come of what was scored. Also gives those of our rule.
    """
    lanes, P, M = scores.dots.shape
    starts, lengths = (
        (level.starts, level.counts) if level.child_starts is None else (level.child_starts, level.child_counts)
    )
    _, K, C = starts.shape
    num_ctas = count_ctas(3)
    shape = (TILE, M)
    listed = lists.items is not None
    ours = [level.spreads.reshape(-1), *terms] if terms else []
    given = [lse] if lse is not None else []
    lists_read = [lists.num_items, lists.items] if listed else []

    def body(dots_gm, stats_gm, starts_gm, lengths_gm, offsets_gm, *refs):
        asked, refs = Step(*refs[: len(step)]), refs[len(step) :]
        lists_gm, refs = refs[: len(lists_read)], refs[len(lists_read) :]
        ours_gm, refs = refs[: len(ours)], refs[len(ours) :]
        given_gm, (*runs_gm, tile_items_gm, tile_rows_gm, lse_gm) = refs[: len(given)], refs[len(given) :]
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)

        def combine(lane, num_tiles):
            """max of scores and log Σ n·exp(scores − max) over all tiles of a lane, f32[M] both."""

            def add(block, state):
                top, total = state
                begins = [(block * AT_ONCE + i) * TILE for i in range(AT_ONCE)]
                has = [row + begin < num_tiles for begin in begins]
                read = lambda which, begin: load(stats_gm.at[lane, which, pl.ds(begin, TILE)], MATRIX)
                tops = [jnp.where(h, read(0, begin), MASKED) for h, begin in zip(has, begins, strict=True)]
                totals = [jnp.where(h, read(1, begin), 0.0) for h, begin in zip(has, begins, strict=True)]
                new_top = top
                for found in tops:
                    new_top = jnp.maximum(new_top, plgpu.layout_cast(jnp.max(found, axis=0), ALONG))
                total = total * jnp.exp(top - new_top)
                for found, weight in zip(tops, totals, strict=True):
                    part = jnp.sum(weight * jnp.exp(found - columns(new_top, shape)), axis=0)
                    total = total + plgpu.layout_cast(part, ALONG)
                return new_top, total

            blocks = lax.div(num_tiles + (AT_ONCE * TILE - 1), jnp.int32(AT_ONCE * TILE))
            top, total = lax.fori_loop(0, blocks, add, (full((M,), MASKED, ALONG), full((M,), 0.0, ALONG)))
            return top, jnp.log(jnp.maximum(total, 1.0))  # ≥ 1 wherever a cluster is alive: its maximum adds n ≥ 1

        def denominators(lane):
            """(max, log of the sum divided by it) of a lane's softmax, f32[M] both."""
            if given:
                return load(given_gm[0].at[lane], ALONG), None
            top, log_total = combine(lane, offsets_gm[lane + 1] - offsets_gm[lane])
            if not ours:
                return top, log_total
            sinks, shift, slope = (load(ref.at[lane], ALONG) for ref in ours_gm[3:])
            clusters, top = top + log_total, jnp.maximum(top + log_total, sinks)
            lse = top + jnp.log(jnp.exp(clusters - top) + jnp.exp(sinks - top))
            return shift + slope * lse, None

        def visit(lane, first, end, carry):
            plane = asked.layer[0] * K + lax.rem(lane, jnp.int32(K))
            base, before = first_granule(plane, C)
            before_below = first_granule(plane, below)[1]
            threshold = asked.threshold(depth, lax.div(lane, jnp.int32(K)))
            top, log_total = denominators(lane)
            if ours and not given:

                @pl.when(first == 0)
                def _():
                    lse_gm[lane] = top

            def numbers_of(ref, tile):
                def collect():
                    if listed:
                        num_items_gm, items_gm = lists_gm
                        items = listed_items(items_gm, num_items_gm[lane], lane, tile)
                    else:
                        items = in_order_items(tile, before, before + C)
                    return gather(ref, [base + granule_of(item) for item in items])

                if listed or ref.shape[0] < TILE:
                    return collect()
                # In order they lie side by side; only the array's last tile may reach past its end.
                begin, last = (base + tile * PER_TILE) * GRANULE, ref.shape[0] - TILE
                beside = load(ref.at[pl.ds(jnp.minimum(begin, last), TILE)], DOWN).astype(
                    jnp.int32 if ref.dtype == jnp.int32 else jnp.float32
                )
                return lax.fori_loop(0, jnp.where(begin > last, 1, 0), lambda *_: collect(), beside)

            def mark(tile, _):
                here = pl.ds(tile * TILE, TILE)
                start, length = (numbers_of(ref, tile) for ref in (starts_gm, lengths_gm))
                scores = load(dots_gm.at[lane, here], MATRIX)
                alive = plgpu.layout_cast(jnp.max(scores, axis=1), DOWN) > MASKED / 2
                if ours:
                    spread = rows(numbers_of(ours_gm[0], tile), shape)
                    scores = scores + spread * columns(load(ours_gm[2].at[lane], ALONG), shape)
                log_scores = scores - columns(top, shape)
                if log_total is not None:
                    log_scores = log_scores - columns(log_total, shape)
                kept = jnp.logical_and(log_mean(log_scores, group) > threshold, alive)
                start = start + before_below
                stop = start + jnp.where(kept, length, 0)
                for ref, vector in zip(runs_gm, (start, stop), strict=True):
                    ref[lane, here] = vector
                tile_items_gm[lane, tile] = jnp.sum(granules_touched(start, stop))
                tile_rows_gm[lane, tile] = jnp.sum(stop - start)

            lax.fori_loop(first, end, mark, None)
            return carry

        Shares(offsets_gm, lanes, num_ctas).visit(lax.axis_index("cta"), visit)

    out = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
    *runs, tile_items, tile_rows, found = plgpu.kernel(
        body,
        out_type=[*[out(lanes, P)] * 2, *[out(lanes, P // TILE)] * 2, out(lanes, M, dtype=jnp.float32)],
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=compiler_params(across_warps=True, approx_math=False),
        kernel_name="keep_clusters",
    )(*scores, starts.reshape(-1), lengths.reshape(-1), lists.offsets, *step, *lists_read, *ours, *given)
    return Kept(tuple(runs), tile_items, tile_rows), lse if given else found
