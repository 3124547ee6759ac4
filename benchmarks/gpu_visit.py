"""Everything to learn from a visit to a Hopper GPU: `python -m benchmarks.gpu_visit [--dry-run] [--minutes 8]`.

Correctness first (every kernel, fresh random inputs, twice, against float64), then times, in order of value. Results
go to benchmarks/results/gpu_visit.json after every suite; a second run continues with what is missing. It stops by
itself when its time is over, says of every suite whether it passed, failed or was not reached, and exits with 1 unless
all passed.

A time is that of one layer's whole decode step: public `attend` with T = 1 (scores, selection, attention, window and
user tokens, merge), repeated on the device inside one jitted loop, every step depending on the one before. `--dry-run`
goes the same way on a CPU, with tiny shapes and the interpreter; its times mean nothing and are marked so.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime

import jax
import jax.numpy as jnp
import numpy as np

import squeezejax
from benchmarks import gpu_offline
from benchmarks.synthetic import synthetic_tree
from squeezejax.pallas_kernels import decode, dispatch, mosaic, reference_decode, sparse_decode

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}
# head size, query heads a key/value head, key/value heads, users, dtype
SHAPES = [(128, 4, 8, 1, "bfloat16"), (64, 4, 4, 2, "float16"), (96, 9, 2, 1, "bfloat16"), (192, 2, 2, 1, "float16"),
          (256, 16, 2, 2, "bfloat16"), (128, 1, 32, 1, "bfloat16"), (128, 8, 1, 40, "bfloat16")]  # fmt: skip
# name: query heads, key/value heads, keys, kept fraction, levels' fractions, users
STEPS = {
    "32/8, 128K, 0.10": (32, 8, 2**17, 0.10, (0.05,), 1),
    "32/8, 512K, 0.10": (32, 8, 2**19, 0.10, (0.05,), 1),
    "32/8, 512K, 0.05, hierarchical": (32, 8, 2**19, 0.05, (0.01, 0.05), 1),
    "32/32, 128K, 0.10": (32, 32, 2**17, 0.10, (0.05,), 1),
    "32/8, 32K, 0.10": (32, 8, 2**15, 0.10, (0.05,), 1),
    "32/8, 8K, 0.10": (32, 8, 2**13, 0.10, (0.05,), 1),
    "32/8, 128K, 0.10, 8 users": (32, 8, 2**17, 0.10, (0.05,), 8),
    "32/8, 128K, 0.10, 32 users": (32, 8, 2**17, 0.10, (0.05,), 32),
    "32/8, 128K, 0.10, hierarchical": (32, 8, 2**17, 0.10, (0.01, 0.05), 1),
}
TINY = {
    "dry flat": (4, 2, 1280, 0.10, (0.05,), 1),
    "dry hierarchical": (4, 2, 1280, 0.10, (0.05, 0.2), 2),
}


def check_attention(dry: bool, seed: int) -> dict:
    """The attention kernel on random lists: the largest error, and whether two runs agree to the last bit."""
    worst, rng = 0.0, np.random.default_rng(seed)
    for H, G, K, B, dtype in SHAPES[:1] if dry else SHAPES:
        K, R = (2, 256) if dry else (K, 4096)
        random = lambda *shape, dtype=dtype: jnp.asarray(rng.standard_normal(shape), dtype)
        q, keys, values = random(B, K, G, H), random(2, K, R, H), random(2, K, R, H)
        counts = rng.integers(0, R // 8 + 1, (B, K)).astype(np.int32)
        counts.flat[0] = 0
        granules = np.stack([[rng.permutation(R // 8) for _ in range(K)] for _ in range(B)])
        items = (granules * 256 + rng.integers(1, 256, granules.shape)).astype(np.int32)
        run = jax.jit(sparse_decode.attend_items)
        results = [jax.device_get(run(q, keys, values, items, counts, jnp.int32(1))) for _ in range(2)]
        for first, second in zip(*results, strict=True):
            require(np.array_equal(first, second), f"two runs differ: H {H}, G {G}, {dtype}")
        want, want_lse = reference_decode.attend_items(q, keys, values, items, counts, 1)
        error = float(np.abs(results[0][0] - want).max())
        lse_error = float(np.abs(results[0][1] - want_lse)[counts > 0].max())
        require(error < TOLERANCE[dtype], f"error {error}: H {H}, G {G}, {dtype}")
        require(lse_error < 1e-3, f"error {lse_error} in lse: H {H}, G {G}, {dtype}")
        worst = max(worst, error)
    return {"largest error": worst}


def check_step(dry: bool, seed: int) -> dict:
    """A whole step of the kernels on synthetic trees: kept clusters and output against float64, twice."""
    mismatches, worst = 0, 0.0
    for fractions in ((0.05,),) if dry else ((0.05,), (0.01, 0.05)):
        K, G, B, S = (2, 2, 1, 1280) if dry else (8, 4, 2, 2**15)
        tree = synthetic_tree(S, num_layers=2, num_kv_heads=K, fractions=fractions, dtype=jnp.bfloat16, seed=seed)
        q = queries(tree, B, G, seed)
        levels = [jax.tree.map(lambda x: np.asarray(x[1]), level) for level in tree.levels]
        log_T, kept = [], None
        for level in levels:
            alive = np.broadcast_to(level.counts > 0, (B, *level.counts.shape))
            if kept is not None:
                alive = np.take_along_axis(kept, np.broadcast_to(level.parents, (B, *level.parents.shape)), axis=2)
            counts = np.where(alive, level.counts, 0)
            centroids = np.asarray(level.centroids)
            scores = np.array(
                [[reference_decode.log_scores(np.asarray(q[b, k], np.float64), centroids[k], counts[b, k])
                  for k in range(K)] for b in range(B)]
            )  # fmt: skip
            log_T.append(np.quantile(scores[np.isfinite(scores)], 0.6))
            kept = scores > np.float32(log_T[-1])
        run = jax.jit(lambda tree, q, log_T: attend_kept(tree, q, log_T, 1))
        results = [jax.device_get(run(tree, q, jnp.asarray(log_T, jnp.float32))) for _ in range(2)]
        for first, second in zip(*results, strict=True):
            require(np.array_equal(first, second), "two runs differ")
        fine, keys, values = levels[-1], np.asarray(tree.keys[1], np.float64), np.asarray(tree.values[1], np.float64)
        for b, k in np.ndindex(B, K):
            rows = reference_decode.kept_rows(kept[b, k], fine.starts[k], fine.counts[k])
            mismatches += abs(int(results[0].num_kept[b, k]) - rows.size)
            if rows.size and int(results[0].num_kept[b, k]) == rows.size:
                want, _ = reference_decode.attend_rows(np.asarray(q[b, k], np.float64), keys[k, rows], values[k, rows])
                worst = max(worst, float(np.abs(results[0].out[b, k] - want).max()))
    # A score within rounding of the threshold may fall on either side: a few clusters of 20 keys.
    require(mismatches <= 100, f"{mismatches} keys kept by one side only")
    require(worst < 2e-2, f"error {worst}")
    return {"keys kept by one side only": mismatches, "largest error": worst}


def queries(tree, B: int, G: int, seed: int):
    """q [B K G H] that point at some clusters, as real queries do."""
    K, C, H = tree.levels[-1].centroids.shape[1:]
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, C, (B, K, G))
    aim = np.asarray(tree.levels[-1].centroids[-1])[np.arange(K)[None, :, None], chosen]
    return jnp.asarray(aim + 0.5 * rng.standard_normal((B, K, G, H)), tree.keys.dtype)


def attend_kept(tree, q, log_T, layer):
    active = jnp.ones(q.shape[0], bool)
    return decode.attend_kept(q, tree.keys, tree.values, tree.levels, active, layer, log_T)


def find_thresholds(tree, q, fraction: float):
    """log T f32[levels] at which q keeps `fraction` of the keys: coarser levels first, at four times it."""
    share = jax.jit(lambda tree, q, log_T: jnp.mean(attend_kept(tree, q, log_T, 0).num_kept / tree.num_keys))
    log_T = np.full(len(tree.levels), -np.inf, np.float32)
    for depth in range(len(tree.levels)):
        wanted = fraction if depth == len(tree.levels) - 1 else min(1.0, 4 * fraction)
        low, high = -60.0, 0.0
        for _ in range(12):
            log_T[depth] = (low + high) / 2
            low, high = (log_T[depth], high) if float(share(tree, q, log_T)) > wanted else (low, log_T[depth])
    return jnp.asarray(log_T), float(share(tree, q, log_T))


def seconds_a_step(step, q, *arguments, steps: int, rounds: int) -> float:
    """Median time of a step q -> out [B … H] of q's shape, repeated inside one program."""

    @jax.jit
    def repeat(q, *arguments):
        again = lambda _, q: q + (step(q, *arguments) * 1e-30).astype(q.dtype)
        return jax.lax.fori_loop(0, steps, again, q)

    repeat(q, *arguments).block_until_ready()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        repeat(q, *arguments).block_until_ready()
        times.append((time.perf_counter() - start) / steps)
    return float(np.median(times))


def time_copy(dry: bool, seed: int) -> dict:
    """Bandwidth of a device copy, bytes read and written: the limit that steps are held against."""
    x = jnp.ones((2**20 if dry else 2**30,), jnp.bfloat16)
    seconds = seconds_a_step(lambda x: x, x, steps=2 if dry else 20, rounds=3)
    return {"seconds": seconds, "bytes a second": 2 * x.nbytes / seconds}


def time_step(name: str, dry: bool, seed: int) -> dict:
    """One row of the table: our step, our dense step, cuDNN's dense attention over unpadded keys and values."""
    N, K, S, fraction, fractions, B = (TINY if dry else STEPS)[name]
    measure = functools.partial(seconds_a_step, steps=1 if dry else 50, rounds=1 if dry else 5)
    tree = synthetic_tree(S, num_kv_heads=K, fractions=fractions, dtype=jnp.bfloat16, seed=seed)
    H, room = tree.keys.shape[3], 64
    q = queries(tree, B, N // K, seed)
    log_T, kept = find_thresholds(tree, q, fraction)
    own = jnp.zeros((B, room, K, H), q.dtype)

    def ours(q, tree, log_T):
        q = q.reshape(B, 1, N, H)
        out, _ = squeezejax.attend(tree, q, own, own, layer=0, log_thresholds=log_T, implementation="mosaic")
        return out.reshape(B, K, N // K, H)

    found = {"kept fraction": kept, "ours": measure(ours, q, tree, log_T)}
    dense = lambda q, tree: decode.attend_all(q, tree.keys, tree.values, S, 0)[0]
    found["our dense kernel"] = measure(dense, q, tree)
    by_token = lambda cache: jnp.broadcast_to(cache[0].swapaxes(0, 1)[None], (B, S, K, H))
    keys, values = (by_token(cache) + jnp.zeros((), cache.dtype) for cache in (tree.keys, tree.values))

    def library(q, keys, values):
        attend = functools.partial(jax.nn.dot_product_attention, implementation="xla" if dry else "cudnn")
        return attend(q.reshape(B, 1, N, H), keys, values).reshape(B, K, N // K, H)

    if B == 1:  # for more users it would need a copy of the context for each
        found["cuDNN"] = measure(library, q, keys, values)
    best = min(seconds for contender, seconds in found.items() if contender in ("our dense kernel", "cuDNN"))
    centroid_bytes = sum(level.centroids.nbytes for level in tree.levels)  # an upper bound below the coarsest level
    kept_bytes = B * kept * (tree.keys.nbytes + tree.values.nbytes)
    found |= {"times over best dense": best / found["ours"], "kept and centroid bytes": kept_bytes + centroid_bytes}
    return found


def require(condition, message: str):
    if not condition:
        raise AssertionError(message)


def suites(dry: bool):
    """name -> what to run, in order of value."""
    steps = {f"time {name}": functools.partial(time_step, name) for name in (TINY if dry else STEPS)}
    checks = {"check attention": check_attention, "check step": check_step, "time copy": time_copy}
    return checks | steps | gpu_offline.suites()


def describe() -> dict:
    """Date, device, versions, commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": jax.devices()[0].device_kind,
        "jax": jax.__version__, "commit": commit or "unknown",
    }  # fmt: skip


def table(results: dict) -> str:
    """The results as Markdown; byte limits are held against the copy measured in the same visit."""
    bandwidth = results["suites"].get("time copy", {}).get("bytes a second")
    lines = [f"{key}: {value}" for key, value in results.items() if key != "suites"]
    for name, found in results["suites"].items():
        found = dict(found)
        if bandwidth and "ours" in found:
            found["of the byte limit"] = found["kept and centroid bytes"] / bandwidth / found["ours"]
        show = lambda value: f"{value:.4g}" if isinstance(value, float) else value
        numbers = ", ".join(f"{key} {show(value)}" for key, value in found.items())
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--suites", nargs="*", help="only these")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    path = options.out / ("gpu_visit_dry_run.json" if options.dry_run else "gpu_visit.json")
    options.out.mkdir(parents=True, exist_ok=True)
    here = describe() | ({"dry run": "on a CPU: times mean nothing"} if options.dry_run else {})
    before = json.loads(path.read_text()) if path.exists() else {}
    same = all(before.get(key) == here[key] for key in ("device", "jax", "commit"))
    results = {**here, "suites": before.get("suites", {}) if same else {}}
    seed, complete, slowest = int(time.time()) % 2**16, True, 0.0
    for name, suite in suites(options.dry_run).items():
        if options.suites and name not in options.suites:
            continue
        if results["suites"].get(name, {}).get("status") == "passed":
            continue
        start = time.monotonic()
        if start + slowest > deadline:  # the next one may take as long as the slowest so far
            results["suites"][name] = {"status": "not reached"}
        else:
            try:
                with interpreted() if options.dry_run else contextlib.nullcontext():
                    results["suites"][name] = {"status": "passed", "seed": seed, **suite(options.dry_run, seed)}
            except Exception as error:
                results["suites"][name] = {
                    "status": "failed",
                    "seed": seed,
                    "error": f"{type(error).__name__}: {error}"[:500],
                }
                traceback.print_exc()
            slowest = max(slowest, time.monotonic() - start)
        complete &= results["suites"][name]["status"] == "passed"
        path.write_text(json.dumps(results, indent=1))
        print(name, results["suites"][name], flush=True)
    path.with_suffix(".md").write_text(table(results))
    return not complete


@contextlib.contextmanager
def interpreted():
    with mosaic.interpret(), dispatch.force_mosaic():
        yield


if __name__ == "__main__":
    sys.exit(main())
