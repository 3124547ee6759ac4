"""Which clusters a decode query keeps, for Hopper: centroids scored, normalised, averaged, compared with a threshold.

A *lane* is a user and a key/value head. Clusters go in chunks of 64, one CTA each. The first kernel reads a chunk's
centroids once for all users and leaves the scaled dot products and the chunk's (maximum, Σ n·exp); the second one
combines those of a lane's chunks, takes the log-mean over the group and marks what exceeds log T strictly.

Precision: centroids, dot products and statistics are float32 throughout, on the ordinary units, not the tensor cores.
A query is a vector, so the work is bound by reading centroids: 2·G·H operations for 4·H bytes is a quarter of what an
H200 can do meanwhile at G = 4. Rounding centroids to bf16 would halve the bytes and move scores by up to 3 %. The
order of operations is `reference.log_scores`': maximum and log of the sum are subtracted one after the other, so
equal scores stay bit-equal, and the second kernel takes exact logarithms, as calibration does.
"""

import dataclasses
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.mosaic import ALONG, DOWN, MATRIX, columns, compiler_params, full, load, rows
from squeezejax.pallas_kernels.work_list import CHUNK, Runs, count_items, turn

MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning of the scoring kernel."""

    columns: int = 128  # head entries of a chunk of centroids held in registers at once

    def __post_init__(self):
        if self.columns % 8:
            raise ValueError(f"columns must be a multiple of 8, got {self.columns}")


def keep_clusters(q, centroids, starts, counts, log_T, layer, *, config: Config | None = None):
    """Marks the clusters of one level that q keeps: (kept i32[B K C'], items i32[B K chunks], keys i32[B K chunks]).

    q f32[B K G H]; centroids f32[L K C H]; starts i32[K C'] and counts i32[B K C'] padded by `pad_clusters`, count 0
    for a cluster that takes no part; log_T f32[], layer i32[]. A cluster is kept iff the log of its softmax-normalised
    score, averaged over the group, exceeds log T strictly (spec.md, Online 5). `items` and `keys` say how many entries
    of a work list, and how many keys, the kept clusters of a chunk have.
    """
    B, K, G, H = q.shape
    L, _, C, _ = centroids.shape
    check(L * K * C)
    config = config or Config()
    M = -(-G // 8) * 8
    queries = jnp.pad(q, ((0, 0), (0, 0), (0, M - G), (0, 0))).reshape(B * K, M, H)
    counts = counts.reshape(B * K, -1)
    flat = centroids.reshape(L * K * C, H)
    layer = jnp.reshape(layer, 1)
    dots, stats = _score_chunks(queries, flat, counts, layer, G, C, K, config)
    kept, items, keys = _mark_chunks(dots, stats, starts, counts, jnp.reshape(log_T, 1), G, C)
    lanes = lambda x: x.reshape(B, K, -1)
    return lanes(kept), lanes(items), lanes(keys)


def check(num_centroids: int):
    """Raises NotImplementedError for fewer centroids, over all layers and heads, than one tile holds."""
    if num_centroids < CHUNK:
        raise NotImplementedError(f"the kernels need at least {CHUNK} centroids in a level, got {num_centroids}")


def _score_chunks(q, centroids, counts, layer, G: int, C: int, num_heads: int, config: Config):
    """s(q, c) f32[U C' M] and, a chunk, (max, Σ n·exp(s − max)) f32[U 2 chunks' M] over its clusters of count > 0.

    q f32[U M H], rows from G on padding; centroids f32[L·K·C H]; counts i32[U C'].
    """
    U, M, H = q.shape
    chunks = -(-C // CHUNK)
    num_users = U // num_heads
    pieces = [(h, min(config.columns, H - h)) for h in range(0, H, config.columns)]
    scale = 1 / math.sqrt(H)

    def body(q_gm, centroids_gm, counts_gm, layer_gm, dots_gm, stats_gm):
        chunk, head = lax.axis_index("chunk"), lax.axis_index("head")
        wanted = (layer_gm[0] * num_heads + head) * C + chunk * CHUNK
        # The last chunk may reach past the end of the array: it is moved back, and rows of others are masked.
        first = jnp.minimum(wanted, centroids.shape[0] - CHUNK)
        moved = wanted - first
        target = CHUNK + chunk * CHUNK - moved  # `pad_clusters` leaves a chunk of room before cluster 0
        read = lambda h, width: load(centroids_gm.at[pl.ds(first, CHUNK), pl.ds(h, width)], MATRIX)
        held = [read(*pieces[0])] if len(pieces) == 1 else None  # else read again for each user

        def score(user, _):
            lane = user * num_heads + head
            column = plgpu.broadcasted_iota(jnp.int32, (CHUNK, M), 1, layout=MATRIX)
            dots = full((CHUNK, M), 0.0, MATRIX)
            for g in range(G):
                dot = full((CHUNK,), 0.0, DOWN)
                for i, (h, width) in enumerate(pieces):
                    tile = held[i] if held else read(h, width)
                    query = load(q_gm.at[lane, g, pl.ds(h, width)], ALONG)
                    dot = dot + jnp.sum(tile * columns(query, tile.shape), axis=1)
                dots = jnp.where(column == g, rows(dot * scale, dots.shape), dots)
            dots_gm[lane, pl.ds(target, CHUNK)] = dots
            row = plgpu.broadcasted_iota(jnp.int32, (CHUNK, M), 0, layout=MATRIX)
            count = rows(load(counts_gm.at[lane, pl.ds(target, CHUNK)], DOWN), dots.shape)
            alive = jnp.logical_and(count > 0, row >= moved)
            live = jnp.where(alive, dots, MASKED)
            top = jnp.max(live, axis=0)
            weights = jnp.where(alive, count.astype(jnp.float32) * jnp.exp(live - columns(top, live.shape)), 0.0)
            stats_gm[lane, 0, chunk] = top
            stats_gm[lane, 1, chunk] = jnp.sum(weights, axis=0)
            return _

        lax.fori_loop(0, num_users, score, None)

    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((U, counts.shape[1], M), jnp.float32),
            jax.ShapeDtypeStruct((U, 2, -(-chunks // CHUNK) * CHUNK, M), jnp.float32),
        ],
        grid=(chunks, num_heads),
        grid_names=("chunk", "head"),
        compiler_params=compiler_params(),
        kernel_name="centroid_scores",
    )(q, centroids, counts, layer)


def _mark_chunks(dots, stats, starts, counts, log_T, G: int, C: int):
    """kept i32[U C'] (only rows of clusters are written), and a chunk's numbers of items and of keys, i32[U chunks]."""
    U, padded_C, M = dots.shape
    chunks = -(-C // CHUNK)
    num_heads = starts.shape[0]
    blocks = stats.shape[2] // CHUNK

    def body(dots_gm, stats_gm, starts_gm, counts_gm, log_T_gm, kept_gm, items_gm, keys_gm, *, turn_sm):
        chunk, lane = lax.axis_index("chunk"), lax.axis_index("lane")
        head = lax.rem(lane, jnp.int32(num_heads))
        shape = (CHUNK, M)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)

        def read_stats(which, block, otherwise):
            """A block of the lane's chunks; entries past the last chunk were never written."""
            found = load(stats_gm.at[lane, which, pl.ds(block * CHUNK, CHUNK)], MATRIX)
            return jnp.where(row + block * CHUNK < chunks, found, otherwise)

        def highest(block, top):
            return jnp.maximum(top, plgpu.layout_cast(jnp.max(read_stats(0, block, MASKED), axis=0), ALONG))

        top = lax.fori_loop(0, blocks, highest, full((M,), MASKED, ALONG))

        def add(block, total):
            weight = jnp.exp(read_stats(0, block, MASKED) - columns(top, shape))
            return total + plgpu.layout_cast(jnp.sum(weight * read_stats(1, block, 0.0), axis=0), ALONG)

        total = lax.fori_loop(0, blocks, add, full((M,), 0.0, ALONG))
        log_total = jnp.log(jnp.maximum(total, 1.0))  # ≥ 1 wherever a cluster is alive: its maximum adds n ≥ 1
        here = pl.ds(CHUNK + chunk * CHUNK, CHUNK)
        scores = (load(dots_gm.at[lane, here], MATRIX) - columns(top, shape)) - columns(log_total, shape)
        scores = jnp.where(column < G, scores, MASKED)
        best = plgpu.layout_cast(jnp.max(scores, axis=1), DOWN)
        shares = jnp.where(column < G, jnp.exp(scores - rows(best, shape)), 0.0)
        mean = plgpu.layout_cast(jnp.sum(shares, axis=1), DOWN) / G
        count = load(counts_gm.at[lane, here], DOWN)
        kept = jnp.where(jnp.logical_and(best + jnp.log(mean) > log_T_gm[0], count > 0), 1, 0)
        kept_gm[lane, here] = kept
        clusters = Runs(load(starts_gm.at[head, here], DOWN), count, kept)
        items, _ = count_items(clusters, turn(clusters, turn_sm), result=DOWN)
        items_gm[lane, chunk] = jnp.sum(items)
        keys_gm[lane, chunk] = jnp.sum(kept * count)

    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((U, padded_C), jnp.int32),
            jax.ShapeDtypeStruct((U, chunks), jnp.int32),
            jax.ShapeDtypeStruct((U, chunks), jnp.int32),
        ],
        scratch_types={"turn_sm": plgpu.SMEM((3, CHUNK), jnp.int32)},
        grid=(chunks, U),
        grid_names=("chunk", "lane"),
        compiler_params=compiler_params(approx_math=False),
        kernel_name="keep_clusters",
    )(dots, stats, starts, counts, log_T)
