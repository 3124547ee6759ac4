"""Everything to learn from a visit to a Hopper GPU: `python -m benchmarks.gpu_visit [--dry-run] [--minutes 8]`.

All checks first (every kernel, fresh random inputs, twice, against float64, deep enough that every ring wraps), then
times, in order of value. Every suite is a process of its own with a time limit, so that a hang or an illegal address
costs no other; every number is written to benchmarks/results/gpu_visit.json as soon as it is there. A second run goes
on with what has not passed, as long as the sources are the same. It stops by itself when its time is over, says of
every suite whether it passed, failed, took too long or was not reached, and exits with 1 unless all passed.

A suite is a function of (dry, seed, note), which calls note(name, number); every module of MODULES has `checks` and
`suites`. One that is timed first compares what it times with plain XLA.

`--dry-run` goes the same way on a CPU, with tiny shapes and the interpreter; its times mean nothing and are marked so.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import traceback
from datetime import UTC, datetime

# Trees are large and PyTorch runs beside: memory is taken as it is needed.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("benchmarks", "models", "pallas_kernels", "squeezejax")
LIMIT = 120.0  # seconds that a suite may take; see `LIMITS`
LIMITS = {"check attention": 240.0, "check step": 240.0, "check prefill": 240.0, "time SDPA of PyTorch": 180.0}
LEAST = 20.0  # seconds with which a suite is still begun
FOUND = "FOUND "  # how a suite's process begins the line of a number


def suites() -> dict:
    """name -> what to run: everything that has to be right, then times in order of value."""
    from benchmarks.gpu import decode, model, offline, prefill  # which start JAX

    modules = decode, model, prefill, offline
    checks = {name: run for module in modules for name, run in module.checks().items()}
    return checks | {name: run for module in modules for name, run in module.suites().items()}


def main():
    """Runs what is missing within the time, one process a suite, and writes results and table after every number."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--suites", nargs="*", help="only these")
    parser.add_argument("--limit", type=float, help="seconds that any suite may take")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one suite, in this process
    parser.add_argument("--seed", type=int, default=int(time.time()) % 2**16)
    options = parser.parse_args()
    if options.run is not None:
        return run(options.run, options.dry_run, options.seed)
    deadline = time.monotonic() + 60 * options.minutes
    here = ask(options, "describe")
    names = here.pop("suites")
    if unknown := set(options.suites or ()) - set(names):
        parser.error(f"no suite is called {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    chosen = [name for name in names if not options.suites or name in options.suites]
    path = options.out / ("gpu_visit_dry_run.json" if options.dry_run else "gpu_visit.json")
    options.out.mkdir(parents=True, exist_ok=True)
    results = resume(path, here)

    def write():
        path.write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(results))

    for name in chosen:
        if results["suites"].get(name, {}).get("status") == "passed":
            continue
        found = results["suites"][name] = {"status": "not reached"}
        left = deadline - time.monotonic()
        if left > LEAST:
            limit = options.limit or LIMITS.get(name, LIMIT) * (10 if options.dry_run else 1)
            follow(options, name, min(limit, left), found, write)
        print(name, found, flush=True)
        write()
    return any(results["suites"][name]["status"] != "passed" for name in chosen)


def ask(options, name: str, limit: float = 600.0) -> dict:
    """The numbers of a process of its own; what it cannot say is an error."""
    found = {}
    follow(options, name, limit, found, lambda: None)
    if found.pop("status") != "passed":
        raise SystemExit(f"the visit cannot even begin: {found}")
    return {key: value for key, value in found.items() if key not in ("seed", "took, s")}


def follow(options, name: str, limit: float, found: dict, write):
    """Runs a suite in a process of its own, for at most `limit` seconds; every number goes to `found` at once."""
    command = [sys.executable, "-m", "benchmarks.gpu_visit", "--run", name, "--seed", str(options.seed)]
    command += ["--dry-run"] if options.dry_run else []
    start = time.monotonic()
    found |= {"status": "begun", "seed": options.seed}
    write()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    ended = threading.Event()

    def end():
        ended.set()
        process.kill()

    timer = threading.Timer(limit, end)
    timer.start()
    for line in process.stdout:
        if line.startswith(FOUND):
            found |= json.loads(line[len(FOUND) :])
            write()
        elif line.strip():
            print(line, end="", flush=True)
            if "RACE DETECTED" in line:
                found["error"] = "a race"
    code = process.wait()
    timer.cancel()
    if ended.is_set():
        found["status"] = f"ended after {limit:.0f} s"
    else:
        found["status"] = "passed" if code == 0 and "error" not in found else "failed"
        if code < 0:
            found["error"] = f"ended by signal {-code}"
    found["took, s"] = round(time.monotonic() - start, 1)


def run(name: str, dry: bool, seed: int) -> int:
    """One suite, in this process: prints its numbers one by one, or its error."""
    note = lambda key, value: print(FOUND + json.dumps({key: value}), flush=True)
    try:
        if name == "describe":
            for key, value in describe(dry).items():
                note(key, value)
            return 0
        with interpreted() if dry else contextlib.nullcontext():
            suites()[name](dry, seed, note)
    except Exception as error:
        traceback.print_exc()
        note("error", f"{type(error).__name__}: {error}"[:500])
        return 1
    return 0


def resume(path: pathlib.Path, here: dict) -> dict:
    """The results of an earlier run on the same device, versions and sources, to go on with; else none."""
    before = json.loads(path.read_text()) if path.exists() else {}
    same = all(before.get(key) == here[key] for key in ("device", "jax", "sources"))
    return {**here, "suites": before.get("suites", {}) if same else {}}


@contextlib.contextmanager
def interpreted():
    """Kernels on the CPU."""
    from squeezejax.pallas_kernels import registry
    from squeezejax.pallas_kernels.hopper import mosaic, self_check

    self_check.TILES, self_check.TIES = 2, 3
    with mosaic.interpret(), registry.force_mosaic():
        yield


def describe(dry: bool) -> dict:
    """Date, device, versions, commit, a hash of all sources, and what there is to run."""
    import jax

    git = lambda *command: subprocess.run(["git", *command], capture_output=True, text=True, check=False).stdout.strip()
    sources = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        sources.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "commit": git("rev-parse", "HEAD") or "unknown",
        "sources": sources.hexdigest()[:16],
        "suites": list(suites()),
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
        sdpa = torch.get("/".join(map(str, found.get("shape", ()))), {}) if one_user else {}
        dense = [found.get(name) for name in ("our dense kernel", "cuDNN", "cuDNN, fixed keys only")]
        dense = [x for x in (*dense, *sdpa.values()) if isinstance(x, float)]
        if dense:
            ratios["times over best dense"] = min(dense) / found["ours"]
        if bandwidth and "bytes of kept keys, values and centroids" in found:
            ratios["of the byte limit"] = found["bytes of kept keys, values and centroids"] / bandwidth / found["ours"]
    if "dense, seconds a token" in found and "ours, seconds a token" in found:
        ratios["tokens a second"] = 1 / found["ours, seconds a token"]
        ratios["times over dense"] = found["dense, seconds a token"] / found["ours, seconds a token"]
        if bandwidth:
            needed = found["weight bytes"] + found["kept bytes"] + found["centroid bytes"]
            ratios["of the byte limit"] = needed / bandwidth / found["ours, seconds a token"]
    return ratios


if __name__ == "__main__":
    sys.exit(main())
