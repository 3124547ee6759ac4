"""Our rule, calibrated: every query of the window by itself, as decoding selects, on the scale of one denominator.

Three things come of the window's queries (docs/method.md, Calibration):

- for every query head, how the denominator that clusters give has to be corrected, log true ≈ a + b · log estimated;
- the thresholds of the levels above, by that of the finest: so low that they lose no more than `config.coarse_loss` of
  what the finest would keep;
- the finest level's threshold for every sparsity: a quantile, over all keys and queries, of the highest threshold at
  which the key would be kept, by all levels together. That takes a second pass;
- what that costs: the share of these queries' exact attention that goes to keys not kept, at every sparsity.

Scores are counted in bins, so that memory does not grow with the context; a bin is far narrower than 1e-3 of a score.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.mesh import sharding
from squeezejax.offline.thresholds import GRID
from squeezejax.pallas_kernels import codes
from squeezejax.pallas_kernels.xla import common_scale
from squeezejax.pallas_kernels.xla.lists import cluster_of_rows
from squeezejax.pallas_kernels.xla.softmax import MASKED
from squeezejax.tree import Tree

LOWEST, HIGHEST = -64.0, 16.0  # log A that are told apart; lower ones are never wanted, save by sparsity 0
FINE = 2048  # bins a nat
COARSE = 8  # bins a nat of the joint counts, of scores of two levels
CHUNK = 4096  # rows scored at once
PULL = 0.02  # towards b = 1, as a variance of log denominators


class _Counts(NamedTuple):
    """Keys by score, over all heads of a layer: twice, to every query by itself, and to the mean of all.

    The first pass counts pairs of scores, the second one the finest alone; with one threshold there is but the first.
    """

    finest: jax.Array | None = None  # f32[2 bins]
    joint: jax.Array | None = None  # f32[2, levels above, bins of the finest level, bins of that level]
    mass: jax.Array | None = None  # f32[bins of the finest level, bins of the one above], attention of single queries


class _Known(NamedTuple):
    """What the first pass has found for the second."""

    fitted: jax.Array  # f32[K G 2], denominators of the layer
    # f32[2, levels above, bins of the finest level], log T of levels above, ascending, by that of the finest
    limits: jax.Array


def table(tree: Tree, queries) -> dict[str, jax.Array]:
    """The fields of a calibrated tree: sparsities, thresholds and denominators; queries [L N W H]."""
    config = tree.config
    denominators, total = _count_layers(tree, queries)
    above = np.stack([_above(joint, config.coarse_loss) for joint in total.joint])
    finest = total.finest
    if finest is None:
        limits = jnp.asarray(above, jnp.float32)
        finest = _count_layers(tree, queries, [_Known(fitted, limits) for fitted in denominators])[1].finest
    one, block = (_thresholds(*of, GRID.astype(np.float64)) for of in zip(finest, above, strict=True))
    all_mass = queries.shape[0] * queries.shape[1] * queries.shape[2]
    return {
        "sparsities": jnp.asarray(GRID),
        "thresholds": jnp.asarray(one, jnp.float32),
        "block_thresholds": jnp.asarray(block, jnp.float32),
        "denominators": jnp.stack(denominators),
        "missed_masses": jnp.asarray(_missed(total.mass / all_mass, one), jnp.float32),
    }


def _count_layers(tree: Tree, queries, known: list[_Known] | None = None):
    """([denominators f32[K G 2] of each layer], `_Counts` of all, f64); queries [L N W H]; known, of each layer."""
    denominators, total = [], None
    for layer in range(tree.num_layers):
        of_layer = None if known is None else known[layer]
        fitted, counts = _count_layer(tree, queries[layer], jnp.int32(layer), of_layer)
        denominators.append(fitted)
        counts = jax.tree.map(lambda x: np.asarray(x, np.float64), counts)
        total = counts if total is None else jax.tree.map(np.add, total, counts)
    return denominators, total


@jax.jit
def _count_layer(tree: Tree, queries, layer, known: _Known | None):
    """(denominators f32[K G 2], `_Counts`) of one layer, whole on every device; queries [N W H]."""
    mesh = sharding.mesh_of(tree)
    if mesh is None:
        return _count_here(tree, queries, layer, known)
    whole, heads = sharding.spec(mesh, ""), sharding.spec(mesh, "K")
    axes = tuple(axis for axis in ("model", "context") if sharding.size_of(mesh, axis) > 1)

    def count_shard(*args):
        fitted, counts = _count_here(*args, context=sharding.context_axis(mesh))
        return fitted, jax.tree.map(lambda x: jax.lax.psum(x, axes), counts) if axes else counts

    of_known = None if known is None else _Known(heads, whole)
    in_specs = (sharding.specs(mesh, tree), heads, whole, of_known)
    call = sharding.map_shards(count_shard, mesh, in_specs, (heads, whole))
    fitted, counts = call(sharding.local_numbers(tree), queries, layer, known)
    return sharding.constrain(tree, fitted, ""), counts


def _count_here(tree: Tree, queries, layer, known: _Known | None, context: str | None = None):
    """`_count_layer` on one device; `context` is the axis of an enclosing shard_map that splits the context."""
    K = tree.num_kv_heads
    H = queries.shape[-1]
    q = queries.reshape(K, -1, *queries.shape[1:])  # [K G W H]

    def one_head(head):
        here = jax.tree.map(lambda leaf: leaf[layer, head], _read_by(tree))
        plain = q[head].reshape(-1, H).astype(jnp.float32) / math.sqrt(H)
        of_head = None if known is None else _Known(known.fitted[head], known.limits)
        return _count_head(tree.config, here, plain, q.shape[1:3], of_head, context)

    # One head after another, also on accelerators: a head's scores of all queries are large.
    fitted, counts = jax.lax.map(one_head, jnp.arange(K))
    return fitted, jax.tree.map(lambda x: jnp.sum(x, axis=0), counts)


class _Head(NamedTuple):
    """What calibration reads of a head."""

    levels: tuple
    rows: "_Rows"
    always: jax.Array  # [s+W H], sinks and window


class _Rows(NamedTuple):
    """And of its rows."""

    keys: jax.Array  # [R H]
    order: jax.Array  # i32[R], −1 = padding
    key_codes: jax.Array | None
    key_steps: jax.Array | None


def _read_by(tree: Tree) -> _Head:
    return _Head(tree.levels, _Rows(tree.keys, tree.order, tree.key_codes, tree.key_steps), tree.window_keys)


def _count_head(config, here: _Head, plain, shape: tuple[int, int], known: _Known | None, context: str | None):
    """(denominators f32[G 2], `_Counts`) of one head; plain f32[G·W H], queries over √H; shape (G, W).

    In the second pass the finest scores are counted no higher than the threshold at which levels above would drop the
    key.
    """
    G, W = shape
    turned = codes.rotate(plain)
    half_square = jnp.sum(plain * plain, axis=1) / 2
    product = functools.partial(jnp.einsum, "RH,MH->RM", precision=jax.lax.Precision.HIGHEST)
    always_scores = product(here.always.astype(jnp.float32), plain)
    sink_scores = always_scores[: config.sinks]
    dots = [common_scale.cluster_dots(level, plain, turned) for level in here.levels]
    scores = [
        dots + level.spreads.astype(jnp.float32)[:, None] * half_square[None, :]
        for dots, level in zip(dots, here.levels, strict=True)
    ]
    finest = here.levels[-1]
    cluster = cluster_of_rows(finest.starts, finest.counts, len(here.rows.order))
    rows, cluster = _in_chunks(here.rows, -1), _in_chunks(jnp.maximum(cluster, 0), 0)

    lse = common_scale.denominator(scores[0], here.levels[0].counts, sink_scores, context)
    if known is None:
        # What makes the denominator from clusters the true one, and all that a query attends to.
        true = _true_denominator(product, rows, plain, sink_scores, context)
        fitted = _fit(lse.reshape(G, W).T, true.reshape(G, W).T)
        everything = jnp.logaddexp(true, _log_sum(_seen_scores(always_scores[config.sinks :], G, W)))
    else:
        fitted = known.fitted
    lse = common_scale.correct(lse.reshape(G, W), fitted[:, None]).reshape(-1)

    # log A of every level's clusters, then of keys, to one query at a time, [items W], and to all of them, [items 1].
    def log_mean(scores):
        # Queries last: XLA's CPU backend reduces over a last axis of a few heads at a third of the speed.
        each = jax.nn.logsumexp((scores - lse[None, :]).reshape(-1, G, W), axis=1) - math.log(G)
        return each, jax.nn.logsumexp(each, axis=1, keepdims=True) - math.log(W)

    log_A = [log_mean(of_level) for of_level in scores]
    depths = config.num_thresholds - 1

    def count(total: _Counts, chunk) -> tuple[_Counts, None]:
        rows, cluster = chunk
        if config.key_bits:
            residual = product(codes.unpack(rows.key_codes, plain.shape[1]), turned)
            of_rows = log_mean(dots[-1][cluster] + residual * rows.key_steps.astype(jnp.float32)[:, None])
        else:
            of_rows = [x[cluster] for x in log_A[-1]]
        owners = [cluster]  # of the rows, by level
        for level in here.levels[:0:-1]:
            owners.insert(0, level.parents[owners[0]])
        above = list(zip(log_A, owners, strict=True))[:depths]
        live = (rows.order >= 0).astype(jnp.float32)[:, None]
        found = {}
        if total.finest is not None:
            finest = []
            for i, x in enumerate(of_rows):
                if known is not None:
                    caps = [_cap(A[i], known.limits[i, depth])[owner] for depth, (A, owner) in enumerate(above)]
                    x = functools.reduce(jnp.minimum, caps, x)
                finest.append(_count(x, live))
            found["finest"] = total.finest + jnp.stack(finest)
        if known is None:
            joint = [[_count_pairs(x, A[i][owner], live) for A, owner in above] for i, x in enumerate(of_rows)]
            mass = jnp.exp(product(rows.keys.astype(jnp.float32), plain) - everything[None, :])
            mass = live * jnp.sum(mass.reshape(-1, G, W), axis=1)
            highest = above[-1][0][0][above[-1][1]] if above else jnp.full(mass.shape, HIGHEST)
            found["joint"] = total.joint + (jnp.array(joint) if above else 0.0)
            found["mass"] = total.mass + _count_pairs(of_rows[0], highest, mass)
        return _Counts(**found), None

    size, zeros = _num_bins(COARSE), functools.partial(jnp.zeros, dtype=jnp.float32)
    finest = zeros((2, _num_bins(FINE))) if known is not None or not depths else None
    joint, mass = (zeros((2, depths, size, size)), zeros((size, size))) if known is None else (None, None)
    return fitted, jax.lax.scan(count, _Counts(finest, joint, mass), (rows, cluster))[0]


def _true_denominator(product, rows: _Rows, plain, sink_scores, context: str | None):
    """Of all rows, in chunks, and the sinks: f32[M]."""

    def mass(rows: _Rows):
        exact = jnp.where((rows.order >= 0)[:, None], product(rows.keys.astype(jnp.float32), plain), MASKED)
        return jax.nn.logsumexp(exact, axis=0)

    by_chunk = jax.lax.map(mass, rows)
    return common_scale.denominator(by_chunk, jnp.ones(len(by_chunk), jnp.int32), sink_scores, context)


def _seen_scores(scores, G: int, W: int):
    """Scores [W' G·W] of the window by its last W queries: the last one sees all of it, the one before all but one."""
    seen = jnp.arange(len(scores))[:, None] - (len(scores) - W) <= jnp.arange(W)[None, :]
    return jnp.where(jnp.tile(seen, (1, G)), scores, MASKED)


def _log_sum(scores):
    """log Σ exp over the leading axis, which may be empty: f32[M]."""
    return jax.nn.logsumexp(jnp.pad(scores, ((0, 1), (0, 0)), constant_values=MASKED), axis=0)


def _in_chunks(rows, order: int):
    """Arrays [R …] as [R/CHUNK CHUNK …], filled up with zeros; an array of integers with `order`."""

    def cut(x):
        size = min(CHUNK, x.shape[0])
        filling = order if x.dtype == jnp.int32 else 0
        widths = ((0, -x.shape[0] % size),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, widths, constant_values=jnp.asarray(filling, x.dtype)).reshape(-1, size, *x.shape[1:])

    return jax.tree.map(cut, rows)


def _fit(estimated, true):
    """(a, b) f32[G 2] by least squares, b pulled towards 1; estimated, true f32[W G]."""
    mean_x, mean_y = jnp.mean(estimated, axis=0), jnp.mean(true, axis=0)
    x, y = estimated - mean_x[None], true - mean_y[None]
    b = (jnp.mean(x * y, axis=0) + PULL) / (jnp.mean(x * x, axis=0) + PULL)
    return jnp.stack([mean_y - b * mean_x, b], axis=1)


def _num_bins(per_nat: int) -> int:
    return int((HIGHEST - LOWEST) * per_nat)


def _bin(log_A, per_nat: int):
    return jnp.clip(jnp.floor((log_A - LOWEST) * per_nat), 0, _num_bins(per_nat) - 1).astype(jnp.int32)


def _count(log_A, weights):
    """Weights f32[J 1] summed by the bin of log A f32[J n]."""
    return jnp.zeros(_num_bins(FINE), jnp.float32).at[_bin(log_A, FINE)].add(jnp.broadcast_to(weights, log_A.shape))


def _count_pairs(finest, above, weights):
    """The same by pairs of bins, of the finest level and of one above."""
    n = _num_bins(COARSE)
    pairs = _bin(finest, COARSE) * n + _bin(above, COARSE)
    return jnp.zeros(n * n, jnp.float32).at[pairs].add(jnp.broadcast_to(weights, pairs.shape)).reshape(n, n)


def _missed(mass, log_T) -> np.ndarray:
    """The mass f64[P] of keys not kept at log T f64[levels P]; mass as in `_Counts`, as a share of all attention."""
    kept = np.cumsum(np.cumsum(mass[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]  # at or above a bin of both
    kept = np.pad(kept, ((0, 1), (0, 1)))
    bins = lambda row: np.clip(np.ceil((np.clip(row, LOWEST, HIGHEST) - LOWEST) * COARSE).astype(int), 0, len(mass))
    finest = bins(log_T[-1])
    above = bins(log_T[-2]) if len(log_T) > 1 else np.zeros_like(finest)
    return np.where(np.isneginf(log_T[-1]), 0.0, mass.sum() - kept[finest, above])


def _cap(log_A, limits):
    """The highest threshold of the finest level at which `limits` f32[bins] keep clusters of log A f32[…]."""
    # They keep it in so many bins, the lowest ones: up to an edge, and just below it to count as not reaching it.
    edges = LOWEST + np.arange(len(limits) + 1) / COARSE - 0.5 / FINE
    edges[0], edges[-1] = -np.inf, np.inf
    return jnp.asarray(edges, jnp.float32)[jnp.searchsorted(limits, log_A.reshape(-1))].reshape(log_A.shape)


def _above(joint, loss: float) -> np.ndarray:
    """log T f64[levels above, bins of the finest level], ascending, from the counts [levels above, bins, bins]."""
    edges = LOWEST + np.arange(_num_bins(COARSE)) / COARSE
    found = np.full((len(joint), len(edges)), -np.inf)
    for row, counts in zip(found, joint, strict=True):
        kept = np.cumsum(counts[::-1], axis=0)[::-1]  # by bin of the level above, keys in or above a bin of the finest
        all_kept = np.sum(kept, axis=1)
        # No more than a part of what is dropped anyway: a low sparsity could not be met otherwise.
        dropped = (all_kept[0] - all_kept) / np.maximum(all_kept, 1)
        lost = np.cumsum(kept, axis=1)
        below = np.argmax(lost > (np.minimum(loss, dropped / (2 * len(joint))) * all_kept)[:, None], axis=1)
        row[:] = np.where((below == 0) | (all_kept == 0), -np.inf, edges[below])
        beyond = all_kept == 0  # no key scores so high
        if not beyond.all():
            row[beyond] = row[~beyond].max(initial=-np.inf)
        row[:] = np.minimum.accumulate(row[::-1])[::-1]
    return found


def _thresholds(finest, above, grid) -> np.ndarray:
    """log T f64[levels P] at the sparsities of a grid; finest [bins] counts keys by when they are dropped."""
    edges = LOWEST + np.arange(_num_bins(FINE) + 1) / FINE
    reach = np.concatenate([np.cumsum(finest[::-1])[::-1], [0.0]])  # keys at or above each edge
    total = max(reach[0], 1.0)
    wanted = (1 - grid) * total
    # The lowest edge with no more than that at or above it, or the one below if that comes closer: where levels above
    # drop clusters, many keys go at once. −∞ for everything.
    at = np.argmax(reach[None, :] <= wanted[:, None] * (1 + 1e-12), axis=1)
    closer = reach[np.maximum(at - 1, 0)] - wanted < wanted - reach[at]
    at = np.where(closer, np.maximum(at - 1, 0), at)
    everything = (wanted >= total) | (at == 0)
    bins = np.minimum(at * COARSE // FINE, above.shape[1] - 1)
    return np.where(everything[None], -np.inf, np.stack([*(row[bins] for row in above), edges[at]]))
