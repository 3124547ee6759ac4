"""Dot products of decode queries with the rows that matter to them, for Hopper: of clusters' centroids or keys' codes.

Lanes' lists are split evenly over CTAs, each of which fetches the next tile of 64 rows by TMA, a granule of 8 a copy,
while it computes. What becomes of a tile's dot products is the caller's part of the same kernel.

Precision: everything is float32 in effect. Plain centroids are multiplied on the ordinary units; a query is a vector,
so that reading them takes longer. Codes (codes.py) are small integers, which bfloat16 holds exactly, and so do three
bfloat16 numbers a float32 query: three products of tensor cores add up to a float32 one.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels import codes
from squeezejax.pallas_kernels.hopper.mosaic import (
    ALONG,
    DOWN,
    GRANULE,
    MATRIX,
    TILE,
    columns,
    compiler_params,
    count_ctas,
    full,
    load,
    products,
    rows,
    swizzled,
)
from squeezejax.pallas_kernels.hopper.shares import Shares
from squeezejax.pallas_kernels.hopper.step import Step
from squeezejax.pallas_kernels.hopper.work_list import (
    PER_TILE,
    Lists,
    first_granule,
    granule_of,
    in_order_items,
    listed_items,
)

PARTS = 3  # bfloat16 numbers that make up a float32 one
CODED_HEAD_DIMS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning of the kernel."""

    columns: int = 64  # head entries of a tile of plain rows in registers at once
    bytes: int = 16  # the same, of codes: the fewer, the more CTAs have registers
    heads: int = 4  # query heads, at most, for which plain numbers are used before they are read again
    ctas_a_multiprocessor: int = 2
    ctas_for_codes: int = 3  # the same, where tiles are small

    def __post_init__(self):
        if self.columns % 32 or self.bytes % 16:
            raise ValueError(f"columns must be a multiple of 32 and bytes one of 16, got {self}")


class Query(NamedTuple):
    """The lanes' queries; M is G rounded up to a multiple of 8."""

    plain: jax.Array  # [lanes G H]
    parts: jax.Array | None = None  # bf16[lanes PARTS·M H], over √H and turned as codes are; their sum is the query


def split_query(q) -> Query:
    """For codes, of q [lanes G H]."""
    lanes, G, H = q.shape
    rest, parts = codes.rotate(q) / math.sqrt(H), []
    for _ in range(PARTS):
        # XLA takes a conversion there and back for nothing, and would leave no rest.
        part = lax.reduce_precision(rest, 8, 7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    parts = jnp.pad(jnp.stack(parts, axis=1), ((0, 0), (0, 0), (0, -G % 8), (0, 0)))
    return Query(q, parts.reshape(lanes, -1, H))


@dataclasses.dataclass(frozen=True)
class Tile:
    """In a kernel: a tile of rows that has been multiplied with a lane's queries."""

    lane: object
    tile: object  # its number in the lane's list
    items: tuple
    base: object  # the granule at which the head begins
    dots: object  # f32[TILE M], of codes in units of a row's step
    refs: tuple  # to the operands and outputs of `finish`, then to what it has of shared memory, by name

    @property
    def granules(self) -> list:
        """Which granules the rows are, counted through all heads."""
        return [self.base + granule_of(item) for item in self.items]


def score_tiles(
    name: str, query: Query, numbers, lists: Lists, step: Step, finish, operands, outputs, *, scratch=None,
    config: Config | None = None,
):  # fmt: skip
    """Runs finish(Tile, Step, operands, outputs, scratch) for every tile of the lists, as the kernel `name`.

    numbers f32[L K C H] or codes u8[L K C …] of all layers and heads; L·K·C is a multiple of 8. operands are arrays,
    outputs shapes and dtypes, which it gives.
    """
    lanes, G, H = query.plain.shape
    _, K, C, width = numbers.shape
    config = config or Config()
    coded, listed = numbers.dtype == jnp.uint8, lists.items is not None
    M = -(-G // 8) * 8
    num_ctas = count_ctas(config.ctas_for_codes if coded else config.ctas_a_multiprocessor)
    at_once = config.bytes if coded else config.columns
    pieces = [(c, min(at_once, width - c)) for c in range(0, width, at_once)]
    multiply = _Codes(width, H, M, pieces) if coded else _Plain(G, H, M, pieces, config.heads)
    lists_read = [lists.num_items, lists.items] if listed else []
    scratch = scratch or {}

    def body(q_gm, numbers_gm, offsets_gm, *refs, numbers_sm, arrived, **shared):
        asked, refs = Step(*refs[: len(step)]), refs[len(step) :]
        lists_gm, refs = refs[: len(lists_read)], refs[len(lists_read) :]
        mine = {name: shared.pop(name) for name in scratch}

        def visit(lane, first, end, fetched):
            """Tiles [first, end) of one list; fetched counts the tiles of the whole share."""
            base, before = first_granule(asked.layer[0] * K + lax.rem(lane, jnp.int32(K)), C)
            if listed:
                num_items_gm, items_gm = lists_gm
                num_items = num_items_gm[lane]
                find = lambda tile: listed_items(items_gm, num_items, lane, tile)
            else:
                find = lambda tile: in_order_items(tile, before, before + C)
            multiply.begin(q_gm, lane, **shared)

            def fetch(items, slot):
                plgpu.commit_smem()  # the slot was read by loads, after which TMA, which overwrites it, needs a fence
                for i, item in enumerate(items):
                    target = numbers_sm.at[slot, pl.ds(i * GRANULE, GRANULE)]
                    source = numbers_gm.at[pl.ds((base + granule_of(item)) * GRANULE, GRANULE)]
                    plgpu.copy_gmem_to_smem(source, target, arrived.at[slot])

            def visit_tile(tile, carry):
                fetched, items = carry
                slot = lax.rem(fetched, jnp.int32(2))
                following = find(jnp.minimum(tile + 1, end - 1))
                pl.when(tile + 1 < end)(lambda: fetch(following, 1 - slot))
                plgpu.barrier_wait(arrived.at[slot])
                dots = multiply.dots(q_gm, lane, numbers_sm.at[slot], **shared)
                finish(Tile(lane, tile, items, base, dots, refs), asked, **mine)
                return fetched + 1, following

            items = find(first)
            fetch(items, lax.rem(fetched, jnp.int32(2)))
            return lax.fori_loop(first, end, visit_tile, (fetched, items))[0]

        Shares(offsets_gm, lanes, num_ctas).visit(lax.axis_index("cta"), visit)

    transforms = {} if coded else {"transforms": swizzled(H, 4)}
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*output) for output in outputs],
        scratch_types={
            "numbers_sm": plgpu.SMEM((2, TILE, width), numbers.dtype, **transforms),
            "arrived": plgpu.Barrier(num_arrivals=PER_TILE, num_barriers=2),
        } | multiply.scratch() | scratch,
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=compiler_params(across_warps=True),
        kernel_name=name,
    )(
        query.parts if coded else query.plain, numbers.reshape(-1, width), lists.offsets, *step, *lists_read, *operands
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Plain:
    """In a kernel: products with float32 numbers, over √H."""

    group: int
    head_dim: int
    num_columns: int  # M
    pieces: list
    heads: int

    def scratch(self) -> dict:
        return {}

    def begin(self, q_gm, lane):
        """Nothing to prepare for a lane."""

    def dots(self, q_gm, lane, numbers_sm):
        """f32[TILE M]; columns past G mean nothing."""
        G, shape = self.group, (TILE, self.num_columns)
        together = -(-G // -(-G // self.heads))
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
        scale = 1 / math.sqrt(self.head_dim)

        def score_heads(block, dots):
            heads = [jnp.minimum(block * together + i, G - 1) for i in range(together)]
            dot = [full((TILE,), 0.0, DOWN) for _ in heads]
            for h, width in self.pieces:
                part = load(numbers_sm.at[pl.ds(0, TILE), pl.ds(h, width)], MATRIX)
                for i, g in enumerate(heads):
                    query = load(q_gm.at[lane, g, pl.ds(h, width)], ALONG).astype(jnp.float32)
                    dot[i] = dot[i] + jnp.sum(part * columns(query, part.shape), axis=1)
            for i, g in enumerate(heads):
                dots = jnp.where(column == g, rows(dot[i] * scale, shape), dots)
            return dots

        return lax.fori_loop(0, -(-G // together), score_heads, full(shape, 0.0, MATRIX))


@dataclasses.dataclass(frozen=True)
class _Codes:
    """In a kernel: products with the levels of codes, by tensor cores."""

    width: int  # bytes of a row; each holds numbers that lie so many apart
    head_dim: int
    num_columns: int  # M
    pieces: list

    def scratch(self) -> dict:
        transforms = swizzled(math.gcd(*(size for _, size in self.pieces)))  # whole tiles of levels are written
        return {
            "q_sm": plgpu.SMEM((PARTS * self.num_columns, self.head_dim), jnp.bfloat16, transforms=transforms),
            "levels_sm": plgpu.SMEM((TILE, self.head_dim), jnp.bfloat16, transforms=transforms),
            "q_full": plgpu.Barrier(),
        }

    def begin(self, q_gm, lane, *, q_sm, levels_sm, q_full):
        """Fetches the lane's queries."""
        plgpu.commit_smem()  # a barrier: all warps are done with those before
        plgpu.copy_gmem_to_smem(q_gm.at[lane], q_sm, q_full)
        plgpu.barrier_wait(q_full)

    def dots(self, q_gm, lane, numbers_sm, *, q_sm, levels_sm, q_full):
        """f32[TILE M], in units of each row's step."""
        bits, M = 8 * self.width // self.head_dim, self.num_columns
        most = 2**bits - 1
        for c, width in self.pieces:
            packed = load(numbers_sm.at[pl.ds(0, TILE), pl.ds(c, width)], MATRIX).astype(jnp.int32)
            for i in range(8 // bits):
                levels = (lax.shift_right_logical(packed, i * bits) & most).astype(jnp.float32) - most / 2
                levels_sm[:, pl.ds(i * self.width + c, width)] = levels.astype(jnp.bfloat16)
        plgpu.commit_smem()
        return products((TILE, M), *((levels_sm, q_sm.at[pl.ds(part * M, M)].T) for part in range(PARTS)))
