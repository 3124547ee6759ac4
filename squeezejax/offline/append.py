"""More fixed context behind a squeezed one, without clustering the old part again: a chapter, a finished chat turn.

The new tokens read everything before them (every old key, not a selection); the keys of the old window and the new ones
but for the new window are clustered by themselves; their clusters join the old ones, as a tree built from its parts
would have them; thresholds are calibrated anew. Readers notice nothing: clusters lie where `starts` says.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from squeezejax import buckets
from squeezejax.arguments import check_context, check_model
from squeezejax.config import FALLBACK_QUERIES
from squeezejax.offline.build import check_context_length, padding_rows, room_for
from squeezejax.offline.progress import Progress, Reporter
from squeezejax.offline.shape import shape_of
from squeezejax.offline.squeeze import (
    cluster_layer,
    clustering_for,
    embed_chunked,
    finish,
    hash_tokens,
    layer_work,
    prefill_layer,
    write_layer,
)
from squeezejax.tree import Level, Tree, TreeLayer


def append(
    params,
    tree: Tree,
    tokens,
    *,
    key=None,
    progress: Callable[[Progress], None] | bool | None = None,
    implementation: str | None = None,
) -> Tree:
    """The tree of a longer fixed context: that of `tree`, followed by `tokens` i32[T].

    The old observation window is clustered with the new keys, as the configuration of `tree` says, and the last W
    tokens are the new window; its queries calibrate, or those of all new tokens where these are fewer. The old clusters
    stay as they are. `key`, `progress` and `implementation` are as for `squeeze`. `context_hash` becomes the SHA-256 of
    the old hash and the new token ids, since the old ids are not in the tree. While it runs, both trees are in memory.
    Clusters do not join keys of different parts: a context of many small parts is selected from less well than one that
    was squeezed at once (benchmarks/notes).

    Raises ValueError for a tree of another model, token ids out of range, no tokens, and keys that are not finite.
    """
    check_model(params, tree)
    tokens = check_context(tokens, params.config.vocab_size)
    length, L = tokens.shape[1], tree.num_layers
    config = dataclasses.replace(tree.config, sinks=0)  # the first tokens of the part are nothing special
    check_context_length(config.observation_window + length, config)
    shape = shape_of(config, length, tree.keys.dtype, tree.num_keys)
    first_row = 0 if shape is None else shape.first_row
    seeds = jax.random.split(jax.random.key(0) if key is None else key, L)
    num_queries = min(config.observation_window or FALLBACK_QUERIES, length)
    clustering = clustering_for(params, tree.config, tree.context_length + length)
    report = Reporter(L, layer_work(params.config, length, config, tree), progress)
    W = config.observation_window
    num_rows, real = room_for(W + length, config, clustering, tree.dtype)
    all_rows, _ = room_for(tree.context_length + length, tree.config, clustering, tree.dtype)
    in_room = buckets.in_room(tree, "xla")

    x = embed_chunked(params, tokens, num_rows)
    grown, queries = None, []
    for i in range(L):
        x, keys, values, q = prefill_layer(params, i, x, length, num_queries, report, before=tree)
        with report.spend("clustering"):
            keys, values = _behind(in_room, i, keys, values)
            offset = tree.levels[-1].offset
            offset = None if offset is None else offset[i]
            options = {"offset": offset, "num_rows": num_rows, "real": real}
            part = cluster_layer(keys, values, i, config, seeds[i], clustering, implementation, first_row, **options)
            layer = jax.block_until_ready(_join(in_room, i, part, all_rows))
            del keys, values, part
        grown = write_layer(grown, layer, i, L)
        queries.append(q)
        report.layer(i, layer_work(params.config, length, config, tree), grown)
        del layer
    digest = None if tree.context_hash is None else hash_tokens(tokens, before=tree.context_hash)
    num_keys = tree.num_keys + length  # the window moves on
    grown = dataclasses.replace(grown, num_keys=num_keys, fingerprint=tree.fingerprint, context_hash=digest)
    return finish(grown, queries, report)


@jax.jit
def _behind(tree: Tree, index, keys, values):
    """Keys and values [K W+T' H] of the window of layer `index` and of what follows it, [K T' H]."""
    s = tree.config.sinks
    join = lambda window, new: jnp.concatenate([window[index, :, s:], new], axis=1)
    return join(tree.window_keys, keys), join(tree.window_values, values)


@functools.partial(jax.jit, static_argnames="num_rows")
def _join(tree: Tree, index, part: TreeLayer, num_rows: int) -> TreeLayer:
    """Layer `index` of a tree with the clusters of `part` after its own, and room for num_rows rows.

    The keys of `part` follow those of the tree in the context, and its window is the new one.
    """
    old = tree.layer(index)
    of_new = part.row_arrays()
    of_new["order"] = jnp.where(part.order < 0, -1, part.order + tree.size)
    rows = {name: jnp.concatenate([x, of_new[name]], axis=1) for name, x in old.row_arrays().items()}
    s = tree.config.sinks
    always = lambda old, new: jnp.concatenate([old[:, :s], new], axis=1)
    sizes = [1, *(level.counts.shape[1] for level in old.levels), 0]
    levels = [
        _join_levels(a, b, starts=old.order.shape[1], parents=sizes[i] if i else 0, child_starts=sizes[i + 2])
        for i, (a, b) in enumerate(zip(old.levels, part.levels, strict=True))
    ]
    joined = dataclasses.replace(
        part,
        **rows,
        window_keys=always(old.window_keys, part.window_keys),
        window_values=always(old.window_values, part.window_values),
        levels=tuple(levels),
        config=tree.config,
    )
    return _packed(joined, num_rows)


def _packed(layer: TreeLayer, num_rows: int) -> TreeLayer:
    """One layer with its num_rows rows, and padding rows at the end, wherever they lay: kernels expect them there."""
    live = layer.order >= 0  # [K R]
    rows = jnp.argsort(~live, axis=1, stable=True)[:, :num_rows]
    row_of = jnp.cumsum(live, axis=1, dtype=jnp.int32) - live.astype(jnp.int32)
    padding = num_rows + padding_rows(num_rows, layer.keys.dtype) - rows.shape[1]

    def take(x, filling):
        taken = jnp.take_along_axis(x, rows.reshape(rows.shape + (1,) * (x.ndim - 2)), axis=1)
        widths = ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(taken, widths, constant_values=jnp.asarray(filling, x.dtype))

    # An empty cluster may start behind the last row.
    move = lambda starts: jnp.take_along_axis(row_of, jnp.minimum(starts, live.shape[1] - 1), axis=1)
    return dataclasses.replace(
        layer,
        **{name: take(x, -(name == "order")) for name, x in layer.row_arrays().items()},
        levels=tuple(dataclasses.replace(level, starts=move(level.starts)) for level in layer.levels),
        num_keys=num_rows,
    )


def _join_levels(old: Level, new: Level, **shifts: int) -> Level:
    """One level's clusters [K C …] side by side; `shifts`: how far the new ones' rows, parents and children move."""

    def join(name: str):
        a, b = getattr(old, name), getattr(new, name)
        if name == "offset":  # of a head; the codes of both leave out the same
            return a
        return None if a is None or b is None else jnp.concatenate([a, b + shifts.get(name, 0)], axis=1)

    return Level(**{field.name: join(field.name) for field in dataclasses.fields(Level)})
