"""Trees of any size made in place on the device, thresholds that keep a wanted fraction, and a timer for steps.

What a step costs depends on shapes and on how many keys are kept, not on where keys come from: clusters of uneven size
around random centres, no K-means. No copy of the cache is ever made.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.config import SqueezeConfig
from squeezejax.pallas_kernels.hopper import decode
from squeezejax.tree import Level, Tree

GRANULE = 8


def device_tree(
    num_keys: int, fractions: tuple[float, ...], *, layers: int = 1, kv_heads: int = 8, head_dim: int = 128,
    window: int = 100, dtype=jnp.bfloat16, seed: int = 0, cache: bool = True,
) -> Tree:  # fmt: skip
    """A tree of num_keys clustered keys; all layers share their clusters' sizes. Without cache it has rows of zeros."""
    L, K, S, H = layers, kv_heads, num_keys, head_dim
    rng = np.random.default_rng(seed)
    config = SqueezeConfig.paper(cluster_fractions=fractions, observation_window=window)
    sizes = config.num_clusters(S)
    levels, members_below, below = [], None, S
    for depth, C in reversed(list(enumerate(sizes))):
        whole = depth == len(sizes) - 1 and S % GRANULE == 0 and S >= 2 * GRANULE * C  # as the builder makes them
        unit = GRANULE if whole else 1
        members = unit * _uneven(rng, K, C, below // unit)  # [K C], of the level below or of rows
        starts = np.cumsum(members, axis=1) - members
        if members_below is None:
            counts, rows, children = members, starts, ()
        else:
            edges = np.pad(np.cumsum(members_below, axis=1), ((0, 0), (1, 0)))
            rows = np.take_along_axis(edges, starts, axis=1)
            counts = np.take_along_axis(edges, starts + members, axis=1) - rows
            children = (starts, members)
            owners = np.stack([np.repeat(np.arange(C), head) for head in members])
            levels[0] = dataclasses.replace(levels[0], parents=_all_layers(owners, L))
        centroids = jax.random.normal(jax.random.key(seed + depth), (L, K, C, H))
        parents = np.zeros((K, C), np.int32)
        numbers = [_all_layers(x, L) for x in (counts, rows, parents, *children)]
        levels.insert(0, Level(centroids, *numbers))
        members_below, below = counts, C
    finest = np.arange(sizes[-1], dtype=np.int32)
    owner = np.stack([np.repeat(finest, head) for head in np.asarray(levels[-1].counts[0])])
    R = S + -S % GRANULE
    R = R if cache else GRANULE
    keys = jax.jit(_rows, static_argnums=(3, 4))(jax.random.key(seed + 100), levels[-1].centroids, owner, R, dtype)
    noise = jax.jit(lambda key, shape: jax.random.normal(key, shape, dtype), static_argnums=1)
    return Tree(
        keys=keys,
        values=noise(jax.random.key(seed + 101), keys.shape),
        order=jnp.broadcast_to(jnp.where(jnp.arange(R) < S, jnp.arange(R), -1), (L, K, R)),
        window_keys=noise(jax.random.key(seed + 102), (L, K, window, H)),
        window_values=noise(jax.random.key(seed + 103), (L, K, window, H)),
        levels=tuple(levels),
        config=config,
        num_keys=S,
    )


def _all_layers(numbers, layers: int):
    return jnp.broadcast_to(jnp.asarray(numbers, jnp.int32), (layers, *numbers.shape))


def _uneven(rng, K: int, C: int, total: int) -> np.ndarray:
    """Positive integers [K C] that sum to total, spread like an exponential distribution."""
    weights = rng.exponential(size=(K, C)) + 0.05
    ends = np.floor(np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True) * (total - C) + 1e-6).astype(int)
    return np.diff(ends, axis=1, prepend=0) + 1


def _rows(key, centroids, owner, R: int, dtype):
    """Keys [L K R H] around centroids f32[L K C H], a head at a time; owner i32[K S]."""
    L, K, C, H = centroids.shape
    rows = min(owner.shape[1], R)

    def head(args):
        key, centroids, owner = args
        near = centroids.astype(dtype)[owner[:rows]]
        return jnp.pad(near + jax.random.normal(key, near.shape, dtype) / 2, ((0, R - rows), (0, 0)))

    owners = jnp.tile(owner, (L, 1))
    return jax.lax.map(head, (jax.random.split(key, L * K), centroids.reshape(L * K, C, H), owners)).reshape(L, K, R, H)


def queries(tree: Tree, users: int, group: int, seed: int):
    """q [B K G H] that point at some clusters of the first layer, as real queries do."""
    _, K, C, H = tree.levels[-1].centroids.shape
    chosen, noise = jax.random.split(jax.random.key(seed))
    chosen = jax.random.randint(chosen, (users, K, group), 0, C)
    aim = tree.levels[-1].centroids[0][jnp.arange(K)[None, :, None], chosen]
    return (aim + jax.random.normal(noise, (users, K, group, H)) / 2).astype(tree.keys.dtype)


def find_thresholds(kept_fraction, num_levels: int, target: float, *, coarse: bool = False):
    """(log T f32[levels], kept fraction) with `kept_fraction(log_T)` within 5 % of the target, by bisection.

    Coarser levels first: the one above the finest keeps four times the target, the one above that sixteen times.
    With `coarse` any fraction between nothing and everything will do: a rehearsal.
    """
    near = 0.9 if coarse else 0.05
    log_T = np.full(num_levels, -np.inf, np.float32)
    for depth in range(num_levels):
        wanted = min(0.9, target * 4 ** (num_levels - 1 - depth))
        low, high = -40.0, 0.0
        for _ in range(40):
            log_T[depth] = (low + high) / 2
            kept = float(kept_fraction(jnp.asarray(log_T)))
            if abs(kept - wanted) <= near * wanted:
                break
            low, high = (log_T[depth], high) if kept > wanted else (low, log_T[depth])
    if abs(kept - target) > near * target:
        raise AssertionError(f"no threshold keeps {target:.1%} of the keys; the nearest found keeps {kept:.2%}")
    return jnp.asarray(log_T), kept


def seconds_a_step(step, q, *arguments, steps: int, rounds: int = 5, layers: int | None = None) -> float:
    """Median time of step(q, …) -> something of q's shape, repeated `steps` times in one program, each after the last.

    With `layers`, step takes one as its last argument, and they come in turn: what is read is then not in the cache of
    the device, as in a model. The trip count is static: a loop whose end is computed would make the host look at every
    turn.
    """

    @jax.jit
    def repeat(q, *arguments):
        turn = lambda i: () if layers is None else (jax.lax.rem(i, jnp.int32(layers)),)
        again = lambda i, q: q + (step(q, *arguments, *turn(i)) * 1e-30).astype(q.dtype)
        return jax.lax.fori_loop(0, steps, again, q)

    repeat(q, *arguments).block_until_ready()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        repeat(q, *arguments).block_until_ready()
        times.append((time.perf_counter() - start) / steps)
    return float(np.median(times))


def cache_of(tree: Tree, own_keys, own_values) -> decode.Cache:
    """A tree and users' own tokens as the decode kernels take them."""
    return decode.Cache(
        tree.keys, tree.values, tree.num_keys, tree.window_keys, tree.window_values, own_keys, own_values
    )


def step_of(log_T, users: int, own_rows: int = 1, layer=0) -> decode.Step:
    """A step of a layer in which every user's token is the last one of so many."""
    end = jnp.full(users, own_rows, jnp.int32)
    return decode.Step(jnp.full(1, layer, jnp.int32), log_T, end - 1, end)


def compare(note, found, wanted, tolerance: float, what: str = "plain XLA"):
    """Notes the largest difference of two arrays, and raises AssertionError if it is above the tolerance."""
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    difference = float(np.abs(found - wanted).max())
    note(f"largest difference from {what}", difference)
    require(difference < tolerance, f"it differs from {what} by {difference}")


def require(condition, message: str):
    """Raises AssertionError(message) unless the condition holds."""
    if not condition:
        raise AssertionError(message)
