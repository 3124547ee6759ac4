"""Which scored clusters a decode query keeps, for Hopper: normalised, averaged over the group, compared with log T.

The order of operations is `reference.log_mean_scores`': maximum and log of the sum are subtracted one after the other,
so equal scores stay bit-equal, and logarithms are exact, as in calibration.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.centroid_scores import Scores
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
from squeezejax.pallas_kernels.hopper.shares import Even, Shares
from squeezejax.pallas_kernels.hopper.step import Step
from squeezejax.pallas_kernels.hopper.work_list import (
    AT_ONCE,
    PER_TILE,
    Kept,
    Lists,
    Runs,
    before_each,
    count_items,
    first_granule,
    gather,
    in_order_granules,
    listed_granules,
    padded,
    turn,
)


def keep_clusters(
    scores: Scores, lists: Lists | None, starts, lengths, below: int, step: Step, depth: int, group: int,
    may_skip: bool,
) -> Kept:  # fmt: skip
    """Keeps the clusters of the level `depth` whose log A exceeds log T strictly (docs/method.md, Selection).

    lists are what the lanes read, None being all in order; starts, lengths i32[L K C] say which run of the next level,
    or of the cache, a cluster is, of `below` rows a head; group is G. With may_skip, nothing is marked where every
    threshold is −∞.
    """
    lanes, P, M = scores.dots.shape
    _, K, C = starts.shape
    num_ctas = count_ctas(3)
    shape = (TILE, M)

    def body(dots_gm, stats_gm, starts_gm, lengths_gm, *refs, turn_sm):
        asked, refs = Step(*refs[: len(step)]), refs[len(step) :]
        *listed, run_starts_gm, run_stops_gm, counts_gm, positions_gm, tile_items_gm, tile_rows_gm = refs
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)

        def combine(lane, num_tiles):
            """max of dots and log Σ n·exp(dots − max) over all tiles of a lane, f32[M] both."""

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

        skip = asked.everything() if may_skip else jnp.bool_(False)
        offsets = Lists(*listed).offsets if listed else Even(jnp.where(skip, 0, jnp.int32(P // TILE)))

        def visit(lane, first, end, carry):
            plane = asked.layer[0] * K + lax.rem(lane, jnp.int32(K))
            base, before = first_granule(plane, C)
            before_below = first_granule(plane, below)[1]
            threshold = asked.threshold(depth, lax.div(lane, jnp.int32(K)))
            top, log_total = combine(lane, offsets[lane + 1] - offsets[lane])

            def granules_of(tile):
                if not listed:
                    return in_order_granules(tile, before, before + C)[0]
                items_gm, num_items_gm, _ = listed
                return listed_granules(lambda at: items_gm[lane, at], num_items_gm[lane], tile)[0]

            def numbers_of(ref, tile):
                collect = lambda: gather(ref, [base + granule for granule in granules_of(tile)])
                if listed or ref.shape[0] < TILE:
                    return collect()
                # In order they lie side by side; only the array's last tile may reach past its end.
                begin, last = (base + tile * PER_TILE) * GRANULE, ref.shape[0] - TILE
                beside = load(ref.at[pl.ds(jnp.minimum(begin, last), TILE)], DOWN)
                return lax.fori_loop(0, jnp.where(begin > last, 1, 0), lambda *_: collect(), beside)

            def mark(tile, _):
                here = pl.ds(tile * TILE, TILE)
                start, length = (numbers_of(ref, tile) for ref in (starts_gm, lengths_gm))
                dots = load(dots_gm.at[lane, here], MATRIX)
                alive = plgpu.layout_cast(jnp.max(dots, axis=1), DOWN) > MASKED / 2
                log_scores = (dots - columns(top, shape)) - columns(log_total, shape)
                log_scores = jnp.where(column < group, log_scores, MASKED)
                best = plgpu.layout_cast(jnp.max(log_scores, axis=1), DOWN)
                shares = jnp.where(column < group, jnp.exp(log_scores - rows(best, shape)), 0.0)
                mean = plgpu.layout_cast(jnp.sum(shares, axis=1), DOWN) / group
                kept = jnp.logical_and(best + jnp.log(mean) > threshold, alive)
                runs = Runs(start + before_below, jnp.where(kept, length, 0))
                # Runs that all begin with a granule share none, as in trees of whole granules: comparing them all would
                # be half of the work here.
                counts = lax.shift_right_logical(runs.length + (GRANULE - 1), 3)
                inside = jnp.sum(jnp.where(runs.length > 0, runs.start & (GRANULE - 1), 0))
                compare = lambda _, counts: count_items(runs, turn(runs, turn_sm), result=DOWN)[0]
                counts = lax.fori_loop(0, jnp.minimum(inside, 1), compare, counts)
                run_starts_gm[lane, here] = runs.start
                run_stops_gm[lane, here] = runs.start + runs.length
                counts_gm[lane, here] = counts
                positions_gm[lane, here] = before_each(counts)
                tile_items_gm[tile, lane] = jnp.sum(counts)
                tile_rows_gm[lane, tile] = jnp.sum(runs.length)

            lax.fori_loop(first, end, mark, None)
            return carry

        Shares(offsets, lanes, num_ctas).visit(lax.axis_index("cta"), visit)

    by_position = jax.ShapeDtypeStruct((lanes, P), jnp.int32)
    of_tiles = [(-(-P // TILE // TILE) * TILE, padded(lanes)), (lanes, P // TILE)]
    operands = (*scores, starts.reshape(-1), lengths.reshape(-1), *step, *(lists or ()))
    kept = plgpu.kernel(
        body,
        out_type=[*[by_position] * 4, *(jax.ShapeDtypeStruct(tiles, jnp.int32) for tiles in of_tiles)],
        scratch_types={"turn_sm": plgpu.SMEM((len(Runs._fields), TILE), jnp.int32)},
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=compiler_params(across_warps=True, approx_math=False),
        kernel_name="keep_clusters",
    )(*operands)
    return Kept(*kept, None if lists is None else lists.num_items)
