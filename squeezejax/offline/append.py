"""More fixed context behind a squeezed one, without clustering the old part again: a chapter, a finished chat turn.

The new tokens read everything before them (every old key, not a selection); the keys of the old window and the new ones
but for the new window are clustered by themselves; their clusters join the old ones, as a tree built from its parts
would have them; thresholds are calibrated anew. Readers notice nothing: clusters lie where `starts` says.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from squeezejax.arguments import check_context, check_model
from squeezejax.config import FALLBACK_QUERIES
from squeezejax.offline.build import check_context_length, padding_rows
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
    sinks = tree.config.sinks
    clustering = clustering_for(params, config, tree.context_length + length)
    report = Reporter(L, layer_work(params.config, length, config, tree), progress)

    x = embed_chunked(params, tokens)
    grown, queries = None, []
    for i in range(L):
        x, keys, values, q = prefill_layer(params, i, x, length, num_queries, report, before=tree)
        with report.spend("clustering"):
            keys, values = (
                jnp.concatenate([old[i], new], axis=1)
                for old, new in ((tree.window_keys[:, :, sinks:], keys), (tree.window_values[:, :, sinks:], values))
            )
            offset = tree.levels[-1].offset
            offset = None if offset is None else offset[i]
            part = cluster_layer(keys, values, i, config, seeds[i], clustering, implementation, first_row, offset)
            layer = jax.block_until_ready(_join(tree, i, part))
            del keys, values, part
        grown = write_layer(grown, layer, i, L)
        queries.append(q)
        report.layer(i, layer_work(params.config, length, config, tree), grown)
        del layer
    digest = None if tree.context_hash is None else hash_tokens(tokens, before=tree.context_hash)
    grown = dataclasses.replace(grown, fingerprint=tree.fingerprint, context_hash=digest)
    return finish(grown, queries, report)


@jax.jit
def _join(tree: Tree, index, part: TreeLayer) -> TreeLayer:
    """Layer `index` of a tree with the clusters of `part` after its own.

    The keys of `part` follow those of the tree in the context, and its window is the new one.
    """
    old, new = _packed(tree.layer(index)), _packed(part)
    S = old.num_keys + new.num_keys
    padding = padding_rows(S, old.keys.dtype)
    pad = lambda x, filling: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=filling)
    new_rows = new.row_arrays() | {"order": new.order + old.num_keys}
    rows = {
        name: pad(jnp.concatenate([x, new_rows[name]], axis=1), jnp.asarray(-(name == "order"), x.dtype))
        for name, x in old.row_arrays().items()
    }
    s = tree.config.sinks
    always = lambda old, new: jnp.concatenate([old[:, :s], new], axis=1)
    sizes = [1, *(level.counts.shape[1] for level in old.levels), 0]
    levels = [
        _join_levels(a, b, starts=old.num_keys, parents=sizes[i] if i else 0, child_starts=sizes[i + 2])
        for i, (a, b) in enumerate(zip(old.levels, new.levels, strict=True))
    ]
    return dataclasses.replace(
        new,
        **rows,
        window_keys=always(old.window_keys, new.window_keys),
        window_values=always(old.window_values, new.window_values),
        levels=tuple(levels),
        num_keys=S,
        config=tree.config,
    )


def _packed(layer: TreeLayer) -> TreeLayer:
    """One layer without padding rows, wherever they lay: kernels expect them at the end."""
    live = layer.order >= 0  # [K R]
    rows = jnp.argsort(~live, axis=1, stable=True)[:, : layer.num_keys]
    row_of = jnp.cumsum(live, axis=1, dtype=jnp.int32) - live.astype(jnp.int32)
    take = lambda x: jnp.take_along_axis(x, rows.reshape(rows.shape + (1,) * (x.ndim - 2)), axis=1)
    # An empty cluster may start behind the last row.
    move = lambda starts: jnp.take_along_axis(row_of, jnp.minimum(starts, live.shape[1] - 1), axis=1)
    return dataclasses.replace(
        layer,
        **{name: take(x) for name, x in layer.row_arrays().items()},
        levels=tuple(dataclasses.replace(level, starts=move(level.starts)) for level in layer.levels),
    )


def _join_levels(old: Level, new: Level, **shifts: int) -> Level:
    """One level's clusters [K C …] side by side; `shifts`: how far the new ones' rows, parents and children move."""

    def join(name: str):
        a, b = getattr(old, name), getattr(new, name)
        if name == "offset":  # of a head; the codes of both leave out the same
            return a
        return None if a is None or b is None else jnp.concatenate([a, b + shifts.get(name, 0)], axis=1)

    return Level(**{field.name: join(field.name) for field in dataclasses.fields(Level)})
