"""What a model, a context and a mesh will take: bytes on each device, bytes that a decode step reads and sends.

Sizes are those of the real structures: shapes from `jax.eval_shape` of the functions that make them, placed by
`shardings`, so that plan and programs cannot drift apart. Estimates are the temporaries of a build and, in a decode
step, the keys kept: as many as the sparsity leaves of the calibration queries, which a decode step seldom exceeds.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from squeezejax.config import SqueezeConfig
from squeezejax.memory import bytes_by_name, bytes_per_device, check_fits, local_bytes, local_device
from squeezejax.mesh.sharding import mesh_of, size_of, spec
from squeezejax.offline.build import build_layer, check_context_length, clustering_of, room_for
from squeezejax.offline.levelwise import MOST_EXACT_CLUSTERS, dropped_fractions
from squeezejax.offline.thresholds import GRID
from squeezejax.online.fallback import why_dense
from squeezejax.online.generate import empty_state
from squeezejax.pallas_kernels.wide.backend import step_bytes
from squeezejax.tree import Level, Tree, stack_layers

# Temporaries of clustering one layer, in float32 copies of its keys, by the bytes of a key (16 bits are widened first):
# unit rows, rows by cluster, their sums, …, as compiled on a CPU.
CLUSTERING_COPIES = {4: 5, 2: 8}
# What a process on a CPU has beside its arrays: Python, JAX, compiled programs and what compiling them leaves behind.
# Resident sets less the arrays, seen with SmolLM2 over 2,000 to 8,000 tokens (benchmarks/notes/prefill_cpu.md).
PROCESS_BUILDING = 950_000_000
PROCESS_ANSWERING = 730_000_000
# Score "variance": a level leaves about so many times the keys that are kept in the end, which the next one looks at.
CANDIDATES = 3.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    weights: int
    keys_values: int
    centroids: int  # or their codes, and spreads
    key_codes: int  # codes of single keys
    index: int  # where clusters and rows lie, thresholds
    window: int  # and sinks
    state: int  # users' own keys and values, logits
    temporaries: int  # of a decode step, estimated: copies of one layer's weights and cache, which XLA makes on a CPU
    # The same where "wide" selects, on a GPU or TPU without kernels of ours: scores of all rows, and the largest room.
    temporaries_wide: int
    build_floor: int  # certainly alive at once during `squeeze`, weights included
    build_peak: int  # the same with temporaries, estimated

    @property
    def tree(self) -> int:
        """A saved tree's size in memory."""
        return self.keys_values + self.centroids + self.key_codes + self.index + self.window

    @property
    def answering(self) -> int:
        """Weights, tree and state: certainly alive at once while questions are answered."""
        return self.weights + self.tree + self.state

    @property
    def resident_building(self) -> int:
        """The largest resident set of a process that builds on a CPU, which has programs and arrays; estimated."""
        return self.build_peak + PROCESS_BUILDING

    @property
    def resident_answering(self) -> int:
        """The same of a process that answers."""
        return self.answering + self.temporaries + PROCESS_ANSWERING


@dataclasses.dataclass(frozen=True)
class Reads:
    """Bytes that one decode step reads on each device."""

    weights: int
    centroids: tuple[int, ...]  # by level, coarse → fine, with what says where their clusters lie
    key_codes: int  # of single keys, those of candidates
    keys_values: int  # of the fixed context
    window: int  # and sinks
    own: int  # users' own keys and values

    @property
    def total(self) -> int:
        """All of it."""
        index = sum(self.centroids) + self.key_codes
        return self.weights + index + self.keys_values + self.window + self.own


@dataclasses.dataclass(frozen=True)
class Collective:
    """What devices along an axis of the mesh tell each other in one decode step."""

    what: str
    axis: str
    count: int  # one after another
    bytes: int  # of all of them together, as one device holds them


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` finds out."""

    num_tokens: int  # of the fixed context
    clusters: tuple[int, ...]  # C of each level, coarse → fine
    axes: tuple[tuple[str, int], ...]  # of the mesh
    users: int
    room: int  # tokens that each user may have
    sparsity: float
    memory: Memory
    dense: Reads
    squeezed: Reads
    collectives: tuple[Collective, ...]  # of a squeezed, greedy step
    dense_because: str | None = None  # why answers will read every key, as `generate` does it; None: they will not


def plan(
    params,
    num_tokens: int,
    config: SqueezeConfig = SqueezeConfig(),  # noqa: B008 - frozen
    *,
    mesh=None,
    users: int = 1,
    room: int = 256,
    sparsity: float | None = None,
) -> Plan:
    """Memory and traffic of a model over a fixed context of num_tokens tokens, for `users` with `room` tokens each.

    params may be shapes only, `jax.eval_shape(lambda: Llama(config, key=…, dtype=…))`: nothing is computed or placed.
    `mesh` is a `Mesh`, or an `AbstractMesh` where there are no such devices, with the axes that `shardings` knows;
    None is one device. `sparsity` is by default the configuration's.

    Raises ValueError for a context no longer than the window, and for a mesh that does not divide heads or users.
    """
    check_context_length(num_tokens, config)
    if users < 1 or room < 1:
        raise ValueError(f"users and room must be at least 1, got {users} and {room}")
    sparsity = config.sparsity if sparsity is None else sparsity
    tree = tree_shapes(params, num_tokens, config, size_of(mesh, "context"))
    state = jax.eval_shape(lambda *made: empty_state(*made, users, room), params, tree)
    return Plan(
        num_tokens=num_tokens,
        clusters=config.num_clusters(tree.num_keys),
        axes=() if mesh is None else tuple(mesh.shape.items()),
        users=users,
        room=room,
        sparsity=sparsity,
        memory=_memory(params, tree, state, mesh),
        dense=_reads(params, tree, state, mesh, sparsity=0.0),
        squeezed=_reads(params, tree, state, mesh, sparsity=sparsity),
        collectives=tuple(_collectives(params, mesh, users, config.num_levels)),
        dense_because=why_dense(tree, sparsity, None),
    )


def dtype_of(params) -> jnp.dtype:
    """Of a model's hidden states, keys and values."""
    return jax.eval_shape(lambda params: params.embed(jnp.zeros((1, 1), jnp.int32)), params).dtype


def tree_shapes(params, num_tokens: int, config: SqueezeConfig, parts: int = 1) -> Tree:
    """The shapes of what `squeeze` makes of num_tokens tokens, were the clusters divided evenly among the parts.

    Parts are as large as the fullest one, so a real tree in more than one part is somewhat larger.
    """
    model, dtype = params.config, dtype_of(params)
    clustering = clustering_of(config)
    num_rows, _ = room_for(num_tokens, config, clustering, dtype)
    rows = jax.ShapeDtypeStruct((model.num_kv_heads, config.always_read + num_rows, model.head_dim), dtype)
    layer = jax.eval_shape(lambda k, v: build_layer(k, v, config, jax.random.key(0), clustering), rows, rows)

    def divide(leaf):  # [K R …] or [K C …]
        return jax.ShapeDtypeStruct((leaf.shape[0], -(-leaf.shape[1] // parts) * parts, *leaf.shape[2:]), leaf.dtype)

    def divide_level(level: Level) -> Level:  # `offset` is of a head, not of a cluster
        return dataclasses.replace(jax.tree.map(divide, dataclasses.replace(level, offset=None)), offset=level.offset)

    layer = dataclasses.replace(
        layer,
        **jax.tree.map(divide, layer.row_arrays()),
        levels=tuple(map(divide_level, layer.levels)),
        num_keys=num_tokens - config.always_read,
        parts=parts,
    )
    stack = lambda leaves: jax.ShapeDtypeStruct((model.num_layers, *leaves[0].shape), leaves[0].dtype)
    tree = stack_layers([layer], stack)
    clusters = math.prod(tree.levels[-1].counts.shape)
    ours = config.score == "variance"
    # The paper's flat table of thresholds holds its steps beside the grid; see `levelwise.table`.
    steps = 2 * min(clusters, MOST_EXACT_CLUSTERS) if config.num_levels == 1 and not ours else 0
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    table = f32(config.num_thresholds, len(GRID) + steps)
    group = model.num_heads // model.num_kv_heads
    return dataclasses.replace(
        tree,
        sparsities=f32(len(GRID) + steps),
        thresholds=table,
        block_thresholds=table if ours else None,
        missed_masses=f32(len(GRID)) if ours else None,
        denominators=f32(model.num_layers, model.num_kv_heads, group, 2) if ours else None,
        context_hash=jax.ShapeDtypeStruct((32,), jnp.uint8),
    )


def _memory(params, tree: Tree, state, mesh) -> Memory:
    sizes = bytes_by_name(tree, mesh)
    weights, state_bytes = bytes_per_device(params, mesh), bytes_per_device(state, mesh)
    keys_values = _keys_values(sizes)
    window = sizes["window_keys"] + sizes["window_values"]
    of_means = ("centroids", "codes", "steps", "offset", "spreads")
    centroids = sum(size for name, size in sizes.items() if name.startswith("levels.") and name.endswith(of_means))
    key_codes = sizes.get("key_codes", 0) + sizes.get("key_steps", 0)
    floor = sum(build_needs(params, tree, mesh).values())
    clustering = (
        CLUSTERING_COPIES[tree.dtype.itemsize] * 4 * sizes["keys"] // (tree.num_layers * tree.keys.dtype.itemsize)
    )
    return Memory(
        weights=weights,
        keys_values=keys_values,
        centroids=centroids,
        key_codes=key_codes,
        index=sum(sizes.values()) - keys_values - window - centroids - key_codes,
        window=window,
        state=state_bytes,
        temporaries=(weights + state_bytes) // tree.num_layers,
        temporaries_wide=_temporaries_wide(params, tree, state, mesh),
        build_floor=floor,
        build_peak=floor + clustering,
    )


def _temporaries_wide(params, tree: Tree, state, mesh) -> int:
    group = params.config.num_heads // params.config.num_kv_heads
    devices = size_of(mesh, "data") * size_of(mesh, "model") * size_of(mesh, "context")
    return step_bytes(tree, group, state.lengths.shape[0]) // devices


def _keys_values(sizes: dict[str, int]) -> int:
    """Bytes of the clustered keys and values, with their scales."""
    return sum(sizes.get(name, 0) for name in ("keys", "values", "key_scales", "value_scales"))


def build_needs(params, tree: Tree, mesh=None) -> dict[str, int]:
    """Bytes on each device of what is certainly alive at the same time while `squeeze` makes a tree of these shapes."""
    L = tree.num_layers
    x = jax.ShapeDtypeStruct((1, tree.context_length, params.config.model_dim), dtype_of(params))
    place = None if mesh is None else NamedSharding(mesh, spec(mesh, "BTE", x.shape))
    later = dict.fromkeys(
        ("sparsities", "thresholds", "block_thresholds", "missed_masses", "denominators", "context_hash")
    )
    sizes = bytes_by_name(dataclasses.replace(tree, **later), mesh)
    # As the model gives them, whatever the tree makes of them.
    given = (sizes["keys"] + sizes["values"]) // tree.keys.dtype.itemsize * tree.dtype.itemsize
    own = (given + sizes["window_keys"] + sizes["window_values"]) // L
    whole = sum(sizes.values())
    return {
        "weights": bytes_per_device(params, mesh),
        "the tree": whole,
        "hidden states": local_bytes(x, place),
        # While the last layer is clustered, its keys and values beside the tree of all layers, if it is not the only
        # one; while it is written into that tree, what it adds.
        "a layer": whole // L + (own if L > 1 else 0),
    }


def check_build_fits(params, num_tokens: int, config: SqueezeConfig):
    """Raises ValueError if the devices of params surely cannot hold what `squeeze` has to of num_tokens tokens."""
    mesh, array = mesh_of(params), jax.tree.leaves(params)[0]
    if not isinstance(array, jax.Array):
        return  # on no device yet
    tree = tree_shapes(params, num_tokens, config, size_of(mesh, "context"))
    advice = "squeeze fewer tokens, or use more devices (squeezejax.shardings) or parameters of 16 bits"
    needed = build_needs(params, tree, mesh)
    check_fits(f"squeezing {num_tokens:,} tokens", needed, local_device(array), advice)


def _reads(params, tree: Tree, state, mesh, *, sparsity: float) -> Reads:
    """One decode step; sparsity 0 is dense attention, which scores no centroids and reads a key once for all users."""
    weights, sizes, own = bytes_by_name(params, mesh), bytes_by_name(tree, mesh), bytes_by_name(state, mesh)
    if not params.config.tie_embeddings:
        weights.pop("embedding")  # of which a row a user is read
    users = state.lengths.shape[0] // size_of(mesh, "data")
    ours, looked_at, centroids = tree.config.score == "variance", 1.0, []
    candidates = min(1.0, CANDIDATES * (1 - sparsity))
    for i in range(len(tree.levels)):
        # Below the coarsest level only children of kept clusters are scored, by every user those of its own.
        level = sum(size for name, size in sizes.items() if name.startswith(f"levels.{i}.") and "parents" not in name)
        centroids.append(math.ceil(level * (looked_at * users if i else 1)))
        looked_at = candidates if ours else 1 - float(dropped_fractions(np.array([sparsity]), i, tree.config)[0])
    chosen = tree.num_keys / tree.keys.shape[2] * users  # never padding
    key_codes = (sizes.get("key_codes", 0) + sizes.get("key_steps", 0)) * candidates * chosen
    keys_values = _keys_values(sizes)
    return Reads(
        weights=sum(weights.values()),
        centroids=tuple(centroids) if sparsity > 0 else (),
        key_codes=math.ceil(key_codes) if sparsity > 0 else 0,
        keys_values=math.ceil(keys_values * (1 - sparsity) * chosen) if sparsity > 0 else keys_values,
        window=sizes["window_keys"] + sizes["window_values"],
        own=own["keys"] + own["values"],
    )


def _collectives(params, mesh, users: int, levels: int):
    """Partial results that are summed or compared; keys, values, centroids and weights stay where they are."""
    model, L = params.config, params.config.num_layers
    heads, parts = size_of(mesh, "model"), size_of(mesh, "context")
    B = users // size_of(mesh, "data")
    lanes, rows = B * -(-model.num_kv_heads // heads), B * model.num_heads // heads
    f32, itemsize = 4, dtype_of(params).itemsize
    if heads > 1:
        hidden = B * model.model_dim * (2 * L * f32 + itemsize)
        yield Collective("hidden states, of embedding, attention and MLP", "model", 2 * L + 1, hidden)
        yield Collective("likeliest tokens and their logits", "model", 2, 2 * B * heads * f32)
        yield Collective("log-probabilities of the tokens", "model", 3, 3 * B * f32)
        yield Collective("kept fractions", "model", L, L * B * f32)
    if parts > 1:
        # The finest level is scored lane by lane, a lane being a user's key/value head; so are those between.
        steps = 2 * L * (lanes if levels == 1 else 1 + (levels - 1) * lanes)
        yield Collective("largest scores and denominators", "context", steps, 2 * L * levels * rows * f32)
        yield Collective("partial attention", "context", 3 * L, L * rows * (model.head_dim + 2) * f32)
        yield Collective("kept fractions", "context", L, L * B * f32)
    if users > B:
        yield Collective("whether anybody goes on", "data", 1, 1)
