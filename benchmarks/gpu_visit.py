"""Everything to learn from a visit to a Hopper GPU: `python -m benchmarks.gpu_visit [--dry-run] [--minutes 8]`.

Correctness first (every kernel, fresh random inputs, twice, against float64), then times, in order of value. Results
go to benchmarks/results/gpu_visit.json after every suite; a second run continues with what is missing. It stops by
itself when its time is over, says of every suite whether it passed, failed or was not reached, and exits with 1 unless
all passed. A suite is a function of (dry, seed) -> numbers by name; every module of MODULES has some.

`--dry-run` goes the same way on a CPU, with tiny shapes and the interpreter; its times mean nothing and are marked so.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime

# Trees are large and PyTorch runs beside: memory is taken as it is needed.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks import gpu_decode, gpu_model, gpu_offline, gpu_prefill
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.hopper import mosaic

SLOWEST_START = 25.0  # seconds that the first suite is expected to take; later ones, as long as the slowest so far


def suites() -> dict:
    """name -> what to run, in order of value: what is right, the figures wanted, then the rest."""
    here = gpu_decode, gpu_model, gpu_prefill, gpu_offline
    return gpu_decode.checks() | {name: run for module in here for name, run in module.suites().items()}


def main():
    """Runs what is missing within the time, and writes results and table after every suite."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--suites", nargs="*", help="only these")
    options = parser.parse_args()
    chosen = suites()
    if unknown := set(options.suites or ()) - set(chosen):
        parser.error(f"no suite is called {', '.join(sorted(unknown))}; there are: {', '.join(chosen)}")
    chosen = {name: chosen[name] for name in options.suites or chosen}
    deadline = time.monotonic() + 60 * options.minutes
    path = options.out / ("gpu_visit_dry_run.json" if options.dry_run else "gpu_visit.json")
    options.out.mkdir(parents=True, exist_ok=True)
    results = resume(path, describe(options.dry_run))
    seed, slowest = int(time.time()) % 2**16, SLOWEST_START
    for name, suite in chosen.items():
        if results["suites"].get(name, {}).get("status") == "passed":
            continue
        start = time.monotonic()
        if start + slowest > deadline:
            results["suites"][name] = {"status": "not reached"}
        else:
            results["suites"][name] = run(suite, options.dry_run, seed)
            slowest = max(slowest, time.monotonic() - start)
        print(name, results["suites"][name], flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(results))
    return any(results["suites"][name]["status"] != "passed" for name in chosen)


def resume(path: pathlib.Path, here: dict) -> dict:
    """The results of an earlier run on the same device, versions and commit, to go on with; else none."""
    before = json.loads(path.read_text()) if path.exists() else {}
    same = all(before.get(key) == here[key] for key in ("device", "jax", "commit"))
    return {**here, "suites": before.get("suites", {}) if same else {}}


def run(suite, dry: bool, seed: int) -> dict:
    """Its numbers, or its error: one that fails must not stop the others."""
    start = time.monotonic()
    try:
        with interpreted() if dry else contextlib.nullcontext():
            found = {"status": "passed", **suite(dry, seed)}
    except Exception as error:
        traceback.print_exc()
        found = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
    jax.clear_caches()  # which hold programs, and these constants, of suites that are over
    return found | {"seed": seed, "took, s": round(time.monotonic() - start, 1)}


@contextlib.contextmanager
def interpreted():
    """Kernels on the CPU."""
    with mosaic.interpret(), registry.force_mosaic():
        yield


def describe(dry: bool) -> dict:
    """Date, device, versions, commit."""
    git = lambda *command: subprocess.run(["git", *command], capture_output=True, text=True, check=False).stdout.strip()
    commit = git("rev-parse", "HEAD") or "unknown"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "commit": commit + (" and changes" if git("status", "--porcelain", "--untracked-files=no") else ""),
    } | ({"dry run": "on a CPU: times mean nothing"} if dry else {})


def table(results: dict) -> str:
    """The results as Markdown; steps are held against the best dense attention and the copy of the same visit."""
    suites = results["suites"]
    bandwidth = suites.get("ceilings", {}).get("copy bytes a second")
    torch = suites.get("time SDPA of PyTorch", {})
    lines = [f"{key}: {value}  " for key, value in results.items() if key != "suites"]
    lines += ["", "| suite | found |", "|---|---|"]
    for name, found in suites.items():
        numbers = {key: value for key, value in found.items() if not isinstance(value, dict | list)}
        numbers |= {key: ", ".join(map(str, x.items())) for key, x in found.items() if isinstance(x, dict)}
        numbers |= compared(found, torch, bandwidth)
        show = lambda value: f"{value:.4g}" if isinstance(value, float) else value
        lines.append(f"| {name} | " + ", ".join(f"{key} {show(value)}" for key, value in numbers.items()) + " |")
    return "\n".join(lines) + "\n"


def compared(found: dict, torch: dict, bandwidth: float | None) -> dict:
    """A step against the best dense attention of its shape, and against the bytes that it has to read."""
    ratios = {}
    if "ours" in found:
        one_user = "cuDNN" in found
        sdpa = torch.get("/".join(map(str, found["shape"])), {}) if one_user else {}
        dense = [found["our dense kernel"], found.get("cuDNN"), *sdpa.values()]
        ratios["times over best dense"] = min(x for x in dense if isinstance(x, float)) / found["ours"]
        if bandwidth:
            ratios["of the byte limit"] = found["bytes of kept keys, values and centroids"] / bandwidth / found["ours"]
    if "ours, seconds a token" in found:
        ratios["tokens a second"] = 1 / found["ours, seconds a token"]
        ratios["times over dense"] = found["dense, seconds a token"] / found["ours, seconds a token"]
        if bandwidth:
            needed = found["weight bytes"] + found["kept bytes"] + found["centroid bytes"]
            ratios["of the byte limit"] = needed / bandwidth / found["ours, seconds a token"]
    return ratios


if __name__ == "__main__":
    sys.exit(main())
