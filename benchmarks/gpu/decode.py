"""What `benchmarks.gpu_visit` learns of decode: kernels checked, then steps timed against dense attention.

A time is that of one layer's whole step: the public `attend` with T = 1 (scores, selection, attention to kept keys,
window and user tokens, merge), at thresholds that keep the wanted fraction, ± 5 % of it.
"""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import squeezejax
from benchmarks.gpu.trees import (
    cache_of,
    compare,
    device_tree,
    find_thresholds,
    queries,
    require,
    seconds_a_step,
    step_of,
)
from squeezejax.pallas_kernels.hopper import decode, self_check, sparse_decode
from squeezejax.pallas_kernels.hopper.mosaic import count_ctas
from squeezejax.pallas_kernels.hopper.scores import CODED_HEAD_DIMS
from squeezejax.pallas_kernels.hopper.sources import InOrder, Listed
from squeezejax.pallas_kernels.oracle import decode as reference_decode

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}
# head size, query heads a key/value head, key/value heads, users, dtype
SHAPES = [(128, 4, 8, 1, "bfloat16"), (64, 4, 4, 2, "float16"), (96, 9, 2, 1, "bfloat16"), (192, 2, 2, 1, "float16"),
          (256, 16, 2, 2, "bfloat16"), (128, 1, 32, 1, "bfloat16"), (128, 8, 1, 40, "bfloat16")]  # fmt: skip
ROOM = 64  # own tokens of every user
CACHED = 250e6  # bytes: four times an H200's second-level cache
SAME = 2e-2  # largest difference of outputs from plain XLA's


@dataclasses.dataclass(frozen=True)
class Step:
    """Shapes of one decode step; heads are of 128."""

    num_keys: int = 2**17
    kept: float = 0.10
    fractions: tuple[float, ...] = (0.05,)
    heads: int = 32
    kv_heads: int = 8
    users: int = 1

    def __str__(self):
        levels = f", {len(self.fractions)} levels" if len(self.fractions) > 1 else ""
        users = f", {self.users} users" if self.users > 1 else ""
        return f"{self.heads}/{self.kv_heads}, {self.num_keys // 1024}K, {self.kept:.2f}{levels}{users}"

    def layers(self) -> int:
        """Layers that come in turn, so that what they keep is a few times what the device's cache holds."""
        if self.num_keys < 2**13:
            return 2  # shrunk
        kept = 2 * 2 * self.users * self.kept * self.num_keys * self.kv_heads * 128
        return int(min(32, max(2, -(-CACHED // kept))))

    def shrunk(self) -> "Step":
        """A step of the same kind that the interpreter can do."""
        fractions = (0.02, 0.05, 0.2)[-len(self.fractions) :]
        users = min(self.users, 2)
        return Step(1280, max(self.kept, 0.2), fractions, 2 * self.heads // self.kv_heads, 2, users)


TWO, THREE = (0.01, 0.05), (0.002, 0.01, 0.05)
# In order of value: the figures, users, then sweeps of context and of the kept fraction.
STEPS = (
    Step(), Step(2**19), Step(heads=32, kv_heads=32), Step(2**19, 0.05, TWO), Step(2**15), Step(2**13),
    Step(users=8), Step(users=32), Step(fractions=TWO),
    Step(2**20), Step(2**21), Step(2**20, 0.05, TWO), Step(2**21, 0.05, THREE), Step(2**14),
    *(Step(kept=kept) for kept in (0.02, 0.05, 0.2, 0.3)), Step(2**19, heads=32, kv_heads=32),
)  # fmt: skip
LOOK_UPS = tuple((keys, levels) for keys in (2**13, 2**15, 2**17, 2**19, 2**21) for levels in ((0.05,), TWO, THREE))
SDPA = sorted({(step.heads, step.kv_heads, step.num_keys) for step in STEPS if step.users == 1}, key=lambda x: x[2])


def suites() -> dict:
    """name -> what to run, in order of value."""
    ceilings = {"ceilings": time_ceilings, "time SDPA of PyTorch": time_torch}
    times = {f"time {step}": functools.partial(time_step, step) for step in STEPS}
    look_ups = {
        f"look up {keys // 1024}K, {len(levels)} levels": functools.partial(look_up, keys, levels)
        for keys, levels in LOOK_UPS
    }
    return ceilings | times | look_ups


def checks() -> dict:
    """name -> what has to be right before any time means something."""
    return {
        "check attention": check_attention, "check selection": check_selection, "check step": check_step,
        "check ties": check_ties,
    }  # fmt: skip


def check_attention(dry: bool, seed: int, note):
    """The attention kernel on random lists, windows and own tokens: the largest error, and two runs bit by bit."""
    rng = np.random.default_rng(seed)
    for shape in SHAPES[:1] if dry else SHAPES:
        note(f"largest error of {'/'.join(map(str, shape))}", _attention_error(rng, dry, *shape))


def _attention_error(rng, dry: bool, H: int, G: int, K: int, B: int, dtype: str) -> float:
    # A full machine, 30 tiles a CTA: half of the lanes' rows in half of the places, a few lanes with hardly any.
    K, R = (2, 256) if dry else (K, 64 * -(-4 * 30 * count_ctas(1) // (B * K)))
    # On the device: the host would take longer to draw than the kernels to run.
    random = lambda *shape: jax.random.normal(jax.random.key(int(rng.integers(2**31))), shape, dtype)
    q, keys, values, window, own = (
        random(*shape) for shape in ((B, K, G, H), (2, K, R, H), (2, K, R, H), (2, K, 100, H), (B, 70, K, H))
    )
    own_rows = jnp.asarray(rng.integers(0, 71, B), jnp.int32)
    step = decode.Step(jnp.ones(1, jnp.int32), jnp.zeros(1), own_rows - 1, own_rows)
    density = rng.uniform(0.3, 1.0, (B * K, 1)) * np.where(np.arange(B * K)[:, None] % 5 == 4, 0.001, 1.0)
    masks = rng.random((B * K, R)) < density  # runs of a few rows, which share granules
    masks &= np.repeat(rng.random((B * K, R // 64)) < 0.5, 64, axis=1)  # and gaps
    masks[0] &= B * K < 3
    arguments = q, keys, values, window, own, jax.tree.map(jnp.asarray, reference_decode.lists_of(masks, rng)), step

    def attend(function, q, keys, values, window, own, lists, step):
        in_order = InOrder(window, window, 100), InOrder(own, own, None)
        return function(q, in_order, Listed(keys, values, lists), step)

    run = jax.jit(functools.partial(attend, sparse_decode.attend))
    first, second = (jax.device_get(run(*arguments)) for _ in range(2))
    require(all(map(np.array_equal, first, second)), f"two runs differ: H {H}, G {G}, {dtype}")
    want, want_lse = attend(reference_decode.attend, *arguments)
    error = float(np.abs(first[0] - want).max())
    require(error < TOLERANCE[dtype], f"error {error}: H {H}, G {G}, {dtype}")
    require(np.abs(first[1] - want_lse).max() < 1e-3, f"lse is wrong: H {H}, G {G}, {dtype}")
    return error


def check_selection(dry: bool, seed: int, note):
    """What is kept of a three-level tree of 32K keys, head by head, against float64."""
    step = Step(2**15, 0.3, THREE, users=2)
    step = step.shrunk() if dry else step
    tree = _tree(step, seed)
    q = queries(tree, step.users, step.heads // step.kv_heads, seed)
    log_T, _ = find_thresholds(_kept_fraction(tree, q), len(step.fractions), step.kept, coarse=dry)
    run = jax.jit(
        lambda tree, q, log_T: decode.select(q, decode.Index.of(tree), step_of(log_T, len(q)), tree.keys.shape[2])
    )
    first, second = (jax.device_get(run(tree, q, log_T)) for _ in range(2))
    require(np.array_equal(first.num_kept, second.num_kept), "two runs differ")
    differing = 0
    for b, k in np.ndindex(q.shape[:2]):
        heads = [jax.tree.map(lambda x, k=k: np.asarray(x[0, k]), level) for level in tree.levels]
        kept = reference_decode.descend(np.asarray(q[b, k], np.float64), heads, np.asarray(log_T))[-1][1]
        want = reference_decode.kept_rows(kept, heads[-1].starts, heads[-1].counts)
        lane = b * step.kv_heads + k
        rows = [reference_decode.rows_of(run.lists, lane) for run in (first, second)]
        require(np.array_equal(*rows), "two runs keep different rows")
        differing += np.setxor1d(rows[0], want).size
    # A score within rounding of the threshold may fall on either side: a few clusters of 20 keys.
    require(differing <= 200, f"{differing} keys kept by one side only")
    note("keys kept by one side only", differing)
    note("keys kept", int(first.num_kept.sum()))


def check_step(dry: bool, seed: int, note):
    """The check that lets `None` choose the kernels: both rules, every head size, some groups, both dtypes."""
    bits = lambda H: (4, 2) if H in CODED_HEAD_DIMS else ()  # of the default index, where the kernels take it
    sizes = [(64, 4, "bfloat16", 4, 2)] if dry else [(H, G, dtype, *bits(H)) for H, G, _, _, dtype in SHAPES]
    for size in sizes:
        self_check.decode_step(*size)
        note(f"{'/'.join(map(str, size))} is right", True)


def check_ties(dry: bool, seed: int, note):
    """Whether logarithms here are those of the CPU that may have calibrated a tree, to the last bit."""
    if not dry:
        self_check.TIES = 1000
    differing = self_check.differing_ties(128, 4, "bfloat16")
    note("counts that tie otherwise", differing[:20])
    require(not differing, f"{len(differing)} of {self_check.TIES} counts tie otherwise than on the CPU")


def time_ceilings(dry: bool, seed: int, note):
    """What this device can do: bytes a second of a copy, read and written, and flops of a bf16 matrix product."""
    x = jnp.ones((2**20 if dry else 2**30,), jnp.bfloat16)
    copy = seconds_a_step(lambda x: x, x, steps=2 if dry else 20)
    note("copy bytes a second", 2 * x.nbytes / copy)
    n = 256 if dry else 8192
    a = jax.random.normal(jax.random.key(seed), (n, n), jnp.bfloat16)
    product = seconds_a_step(lambda a, b: a @ b, a, a, steps=2 if dry else 20)
    note("matmul flops a second", 2 * n**3 / product)


def time_torch(dry: bool, seed: int, note):
    """PyTorch's SDPA, every back end, in a process of its own: {shape: {back end: seconds, or why not}}."""
    shapes = [(4, 2, 256)] if dry else SDPA
    command = [sys.executable, "-m", "benchmarks.gpu.sdpa", json.dumps(shapes)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    require(run.returncode == 0, run.stderr[-500:])
    for name, found in json.loads(run.stdout.splitlines()[-1]).items():
        note(name, found)


def time_step(step: Step, dry: bool, seed: int, note):
    """One step, ours, against dense attention by our kernel and by cuDNN; what it reads at least."""
    step = step.shrunk() if dry else step
    B, K, G, S, L = step.users, step.kv_heads, step.heads // step.kv_heads, step.num_keys, step.layers()
    measure = functools.partial(seconds_a_step, steps=1 if dry else 200, rounds=1 if dry else 5)
    tree = _tree(step, seed, layers=L)
    H = tree.keys.shape[3]
    q = queries(tree, B, G, seed)
    log_T, kept = find_thresholds(_kept_fraction(tree, q), len(step.fractions), step.kept, coarse=dry)
    note("kept fraction", kept)
    note("shape", [step.heads, K, S])
    own = jax.random.normal(jax.random.key(seed + 7), (B, ROOM, K, H), q.dtype)

    def attend(q, tree, own, log_T, layer, implementation="mosaic"):
        found = squeezejax.attend(
            tree, q.reshape(B, 1, K * G, H), own, own, layer=layer, log_thresholds=log_T, implementation=implementation
        )
        return found[0].reshape(q.shape)

    def dense(q, tree, own, layer):
        return decode.attend_all(q, cache_of(tree, own, own), step_of(None, B, ROOM, layer))[0]

    plain = jax.jit(functools.partial(attend, implementation="xla"))
    last = jnp.int32(L - 1)
    compare(note, jax.jit(attend)(q, tree, own, log_T, last), plain(q, tree, own, log_T, last), SAME)
    everything = jnp.full_like(log_T, -jnp.inf)
    wanted = plain(q, tree, own, everything, last)
    compare(note, jax.jit(dense)(q, tree, own, last), wanted, SAME, "plain XLA, all keys")
    note("ours", measure(attend, q, tree, own, log_T, layers=L))
    read = _look_up_bytes(tree, q, log_T) + B * kept * 2 * K * S * H * tree.keys.dtype.itemsize
    note("bytes of kept keys, values and centroids", read)
    note("our dense kernel", measure(dense, q, tree, own, layers=L))
    if B == 1:  # for more users it would need a copy of the context for each
        note("cuDNN", _attempt(lambda: _time_library(tree, q, measure, "xla" if dry else "cudnn")))


def look_up(num_keys: int, fractions: tuple[float, ...], dry: bool, seed: int, note):
    """Finding the kept clusters alone: centroid bytes read and time, a tenth of the keys kept in the end."""
    step = Step(num_keys, 0.10, fractions)
    step = step.shrunk() if dry else step
    L = step.layers()
    tree = _tree(step, seed, cache=False, layers=L)
    q = queries(tree, 1, step.heads // step.kv_heads, seed)
    log_T, kept = find_thresholds(_kept_fraction(tree, q), len(step.fractions), step.kept, coarse=dry)
    note("kept fraction", kept)
    R = -(-tree.num_keys // 8) * 8
    select = jax.jit(
        lambda q, tree, log_T, layer: decode.select(q, decode.Index.of(tree), step_of(log_T, 1, layer=layer), R)
    )
    found = jax.device_get(select(q, tree, log_T, jnp.int32(0)).num_kept)[0, 0]
    head = [jax.tree.map(lambda x: np.asarray(x[0, 0]), level) for level in tree.levels]
    selected = reference_decode.descend(np.asarray(q[0, 0], np.float64), head, np.asarray(log_T))[-1][1]
    wanted = int(head[-1].counts[selected].sum())
    compare(note, found / wanted, 1.0, 0.01, "float64, keys of a head")

    def step_through(q, tree, log_T, layer):
        return q * jnp.sum(select(q, tree, log_T, layer).num_kept).astype(q.dtype)

    note("centroid bytes", _look_up_bytes(tree, q, log_T))
    measure = functools.partial(seconds_a_step, steps=1 if dry else 200, rounds=1 if dry else 5)
    note("seconds", measure(step_through, q, tree, log_T, layers=L))


def _tree(step: Step, seed: int, cache: bool = True, layers: int = 1):
    shape = {"kv_heads": step.kv_heads, "layers": layers}
    return device_tree(step.num_keys, step.fractions, **shape, seed=seed, cache=cache)


def _kept_fraction(tree, q):
    """A function of log T f32[levels]: the mean over the layers."""
    R = -(-tree.num_keys // 8) * 8

    @jax.jit
    def kept(levels, q, log_T, layer):
        found = decode.select(q, decode.Index(levels), step_of(log_T, len(q), layer=layer), R)
        return jnp.mean(found.num_kept / tree.num_keys)

    layers = range(tree.levels[0].counts.shape[0])
    return lambda log_T: np.mean([kept(tree.levels, q, log_T, jnp.int32(layer)) for layer in layers])


def _look_up_bytes(tree, q, log_T) -> int:
    """Bytes of the centroids that a step reads: whole tiles of 64, those of the coarsest level once for all users."""
    R = -(-tree.num_keys // 8) * 8
    read = jax.jit(lambda levels, q: decode.select(q, decode.Index(levels), step_of(log_T, len(q)), R).num_read)(
        tree.levels, q
    )
    tiles = int(read[0][0].sum()) + sum(int(level.sum()) for level in read[1:])
    return tiles * 64 * q.shape[3] * 4


def _time_library(tree, q, measure, implementation: str) -> float:
    """jax.nn.dot_product_attention over unpadded keys and values, by token, as it wants them."""
    B, K, G, H = q.shape
    L = tree.keys.shape[0]
    of_layer = lambda cache, layer: cache[layer : layer + 1, :, : tree.num_keys].swapaxes(1, 2)
    caches = [[of_layer(cache, layer) for cache in (tree.keys, tree.values)] for layer in range(L)]
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)

    def all_layers(q, caches):  # written out: to take one of several arrays would copy it
        for keys, values in caches:
            q = q + (attend(q.reshape(B, 1, K * G, H), keys, values).reshape(q.shape) * 1e-30).astype(q.dtype)
        return q

    return measure(all_layers, q, caches, steps=-(-measure.keywords["steps"] // L)) / L


def _attempt(call):
    """Its result, or why there is none: a missing contender must not hide the others, nor go unsaid."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
