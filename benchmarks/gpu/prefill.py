"""What `benchmarks.gpu_visit` learns of prefill: kernels checked, then whole layers timed, and selection apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.trees import compare, device_tree, find_thresholds, queries, require, seconds_a_step
from squeezejax.online.attention import attend_user
from squeezejax.pallas_kernels.hopper import block_scores, prefill, self_check, sparse_prefill
from squeezejax.pallas_kernels.hopper.centroid_tiles import Read, split
from squeezejax.pallas_kernels.hopper.mosaic import count_ctas
from squeezejax.pallas_kernels.interface import Own, Reading
from squeezejax.pallas_kernels.oracle import prefill as reference_prefill


@dataclasses.dataclass(frozen=True)
class Prefill:
    """One layer's attention of a user's tokens; heads are of 128."""

    heads: int
    kv_heads: int
    num_keys: int
    tokens: int
    kept: float
    fractions: tuple[float, ...] = (0.05,)

    def __str__(self):
        levels = "" if len(self.fractions) == 1 else f", {len(self.fractions)} levels"
        return f"{self.heads}/{self.kv_heads}, {self.num_keys // 1024}K, {self.tokens} tokens, {self.kept:.2f}{levels}"


CASES = [
    *(Prefill(32, 8, S, T, 0.1) for S in (2**17, 2**19) for T in (1024, 4096)),
    Prefill(32, 8, 2**17, 4096, 0.3),
    *(Prefill(32, 32, 2**17, T, 0.1) for T in (1024, 4096)),
    *(Prefill(32, 8, S, 4096, 0.1, (0.01, 0.05)) for S in (2**17, 2**19)),
]
SCORES_TOLERANCE = 1e-4  # relative, of sums of shares at logits of some ±25


def suites() -> dict:
    """name -> what to run, in order of value."""
    return {f"time prefill {case}": functools.partial(time_prefill, case) for case in CASES}


def checks() -> dict:
    """name -> what has to be right before any time means something."""
    return {"check prefill": check_prefill, "check prefill scores": check_scores}


def check_prefill(dry: bool, seed: int, note):
    """The attention kernel on random lists, in both forms: the largest error, and two runs bit by bit."""
    rng = np.random.default_rng(seed)
    for H, config in list(sparse_prefill.CONFIGS.items())[: 1 if dry else None]:
        U, M, K, R = (2, 70, 2, 256) if dry else (12, 500, 4, 0)
        if not dry:  # 30 tiles a CTA: lanes read half of the rows on average
            R = config.keys * -(-2 * 30 * count_ctas(1) // (U * -(-M // config.unit)))
        random = lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32), jnp.bfloat16)
        q, keys, values = random(U, M, H), random(1, K, R, H), random(1, K, R, H)
        granules = np.stack([rng.permutation(R // 8) for _ in range(U)])
        items = (granules * 256 + rng.integers(1, 256, granules.shape)).astype(np.int32)
        counts = rng.integers(0, R // 8 + 1, U).astype(np.int32)
        counts[0] = 0
        rows = np.arange(0, M, 1 if dry else 7)
        caches = np.asarray(keys), np.asarray(values)
        want, want_lse = reference_prefill.attend_items(np.asarray(q)[:, rows], *caches, items, counts, 0)
        for in_registers in (False,) if dry else (False, True):
            form = dataclasses.replace(config, in_registers=in_registers)
            run = jax.jit(functools.partial(sparse_prefill.attend_items, config=form))
            found, again = (jax.device_get(run(q, keys, values, items, counts, jnp.int32(0))) for _ in range(2))
            what = f"head size {H}, probabilities in {'registers' if in_registers else 'shared memory'}"
            require(all(map(np.array_equal, found, again)), f"two runs differ, {what}")
            error = float(np.abs(found[0][:, rows] - want).max())
            note(f"largest error, {what}", error)
            require(error < 1e-2, f"error {error}, {what}")
            require(np.abs(found[1][:, rows] - want_lse)[counts > 0].max() < 1e-3, f"log-sum-exps, {what}")


def check_scores(dry: bool, seed: int, note):
    """Sums of shares of listed and of all clusters, the largest error relative to float64; then whole selections."""
    rng = np.random.default_rng(seed)
    for H in list(block_scores.CONFIGS)[: 1 if dry else None]:
        worst = 0.0
        for listed in (False, True):
            U, M, C = (2, 128, 256) if dry else (8, 1280, 1536)
            q = jnp.asarray(4 * rng.standard_normal((U, M, H)), jnp.bfloat16)
            centroids = rng.standard_normal((2, C, H)).astype(np.float32)
            valid = rng.random((U, M)) < 0.9
            order = np.stack([rng.permutation(C // 8) for _ in range(U)]).astype(np.int32)
            number = rng.integers(0, C // 8 + 1, U).astype(np.int32) if listed else np.full(U, C // 8, np.int32)
            lists = (order, number) if listed else ()
            if not listed:
                order[:] = np.arange(C // 8)
            rows = (order[:, :, None] * 8 + np.arange(8)).reshape(U, C)  # clusters by position
            weights = rng.integers(0, 40, (U, C)).astype(np.float32)
            weights[np.arange(C)[None, :] >= 8 * number[:, None]] = 0
            read = Read(*split(jnp.asarray(centroids), q.dtype), jnp.asarray(weights), *map(jnp.asarray, lists))
            run = jax.jit(block_scores.sum_scores)
            log_T = jnp.float32(-np.log(weights.sum() / U))
            found, again = (np.asarray(run(q, valid, read, log_T)) for _ in range(2))
            for u in range(U):
                alive = weights[u] > 0
                require(np.array_equal(found[u][:, alive], again[u][:, alive]), f"two runs differ, {H}, {listed=}")
                want = _sums(q[u], valid[u], centroids[u % 2][rows[u]][alive], weights[u][alive], float(log_T))
                worst = max(worst, float(np.max(np.abs(found[u][:, alive] / want - 1), initial=0)))
        note(f"largest relative error, heads of {H}", worst)
        require(worst < SCORES_TOLERANCE, f"relative error {worst}, head size {H}")
        self_check.block_selection(H, "bfloat16")


def _sums(q, valid, centroids, counts, log_T: float):
    """Σ exp(log S − log T) over the valid rows of each 128 of q [M H], in float64: [M/128 C]."""
    scores = np.asarray(q, np.float64) @ np.asarray(centroids, np.float64).T / np.sqrt(q.shape[1])
    top = scores.max(axis=1, keepdims=True, initial=-np.inf)
    shares = np.exp(scores - top)
    shares = shares / (shares @ counts)[:, None] * np.exp(-log_T)
    return np.where(valid[:, None], shares, 0).reshape(len(q) // 128, 128, -1).sum(axis=1)


def time_prefill(case: Prefill, dry: bool, seed: int, note):
    """Everything included (scores, selection, lists, kept keys, window, own tokens), against the best dense."""
    case = dataclasses.replace(case, heads=4, kv_heads=2, num_keys=1280, tokens=130) if dry else case
    K, G, T, S = case.kv_heads, case.heads // case.kv_heads, case.tokens, case.num_keys
    tree = device_tree(S, case.fractions, kv_heads=K, seed=seed)
    H = tree.keys.shape[3]
    q = queries(tree, T, G, seed).reshape(1, T, K * G, H)
    own = queries(tree, T, 1, seed + 1).reshape(1, T, K, H)
    start, lengths = jnp.zeros(1, jnp.int32), jnp.full(1, T, jnp.int32)

    def attend(q, tree, own, log_T, name):
        return attend_user(tree, q, Own(own, own, start, lengths), jnp.int32(0), Reading(log_T, implementation=name))

    kept_fraction = jax.jit(lambda log_T, tree, q, own: attend(q, tree, own, log_T, "xla" if dry else "mosaic").kept[0])
    log_T, kept = find_thresholds(
        lambda log_T: kept_fraction(log_T, tree, q, own), len(case.fractions), case.kept, coarse=dry
    )
    measure = functools.partial(seconds_a_step, steps=1 if dry else 10, rounds=1 if dry else 5)
    ours = lambda q, tree, own, log_T: attend(q, tree, own, log_T, "mosaic").out
    dense = lambda q, tree, own: attend(q, tree, own, None, "mosaic").out

    def select(q, tree, log_T):
        rows = q.reshape(T, K, G * H)  # of one block a user: as many rows as there are, whichever token's
        blocks = jnp.pad(rows, ((0, -T % 128), (0, 0), (0, 0))).reshape(-1, 128, K, G, H).swapaxes(1, 2)
        valid = jnp.ones((blocks.shape[0], 128 * G), bool)
        kept = prefill.select(blocks.reshape(-1, 128 * G, H), valid, tree.levels, jnp.int32(0), log_T)
        return q * jnp.mean(kept.astype(q.dtype))

    note("kept fraction", kept)
    few = min(T, 256)  # tokens, of one block or two: plain XLA is compared there
    some = q[:, :few], own[:, :few]

    def first_tokens(name):
        def run(q, own, tree, log_T):
            lengths = jnp.full(1, few, jnp.int32)
            return attend_user(
                tree, q, Own(own, own, start, lengths), jnp.int32(0), Reading(log_T, implementation=name)
            ).out

        return jax.jit(run)(*some, tree, log_T)

    compare(note, first_tokens("mosaic"), first_tokens("xla"), 2e-2)
    note("ours", measure(ours, q, tree, own, log_T))
    note("selection alone", measure(select, q, tree, log_T))
    dense_times = [measure(dense, q, tree, own)]
    note("our dense kernel", dense_times[0])
    keys, values = (cache[:, :, :S].swapaxes(1, 2) for cache in (tree.keys, tree.values))
    library = functools.partial(jax.nn.dot_product_attention, implementation="xla" if dry else "cudnn")
    try:
        dense_times.append(measure(lambda q, k, v: library(q, k, v).astype(q.dtype), q, keys, values))
        note("cuDNN, fixed keys only", dense_times[1])
    except Exception as error:  # a missing contender must not hide the others, nor go unsaid
        note("cuDNN, fixed keys only", f"{type(error).__name__}: {error}"[:200])
    note("best dense TFLOP/s", 4 * T * S * case.heads * H / min(dense_times) / 1e12)
