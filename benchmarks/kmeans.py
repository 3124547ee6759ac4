"""K-means on CPU: time and inertia of squeezejax, scikit-learn and faiss on the same rows; by distance and segments.

    python -m benchmarks.kmeans [--python PYTHON] [--cases 4096x64 ...] [--rounds 3]

scikit-learn and faiss-cpu are optional; --python names an interpreter that has them, if it is not this one. Every
library has a process of its own (two OpenMP runtimes in one process wait for each other) and all run in turn.
Then squeezejax by itself: 5 % by cosine, and 10 % by distance of all rows at once and by segments, in turn as well.
--segments leaves the other libraries out. Writes benchmarks/results/kmeans-<date>.json (or segments-), prints tables.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import timing

HEADS = 4
FRACTION = 0.05
CASES = ("4096x128", "16384x128", "4096x64", "16384x64")
SEGMENT_CASES = ("4096x64", "16384x64", "32768x64")
SHORT = {"max_iterations": 4, "swap_rounds": 2}
WAYS = {  # fraction of clusters and options of `cluster`; the first Euclidean one is what the others are compared with
    "cosine": (0.05, {}),
    "euclidean": (0.1, {"metric": "euclidean"}),
    "euclidean, short": (0.1, {"metric": "euclidean"} | SHORT),
    "segments of 4096, short": (0.1, {"metric": "euclidean", "segment": 4096} | SHORT),
    "segments of 2048, short": (0.1, {"metric": "euclidean", "segment": 2048} | SHORT),
}
ROOT = Path(__file__).resolve().parent.parent
# scikit-learn is fastest with a single-threaded BLAS beside its own threads.
ENVIRONMENT = {"scikit-learn": {"OPENBLAS_NUM_THREADS": "1"}, "faiss": {}, "squeezejax": {"JAX_PLATFORMS": "cpu"}}


def mixture(heads: int, rows: int, dim: int, seed: int = 0, drift: float | None = None):
    """rows / 40 Gaussians with uneven weights and spreads, 2 % outliers -> f32[heads rows dim].

    Rows are in random order, or those of a Gaussian lie about a place of its own, within `drift` of all rows.
    """
    out = np.empty((heads, rows, dim), np.float32)
    for head in range(heads):
        rng = np.random.default_rng([seed, head, rows, dim])
        num = max(1, rows // 40)
        centres, spread = rng.standard_normal((num, dim)), rng.uniform(0.2, 1.0, num)
        share = rng.gamma(1.0, size=num)
        of = rng.choice(num, rows, p=share / share.sum())
        out[head] = centres[of] + spread[of, None] * rng.standard_normal((rows, dim))
        outlier = rng.random(rows) < 0.02
        out[head, outlier] = 2 * rng.standard_normal((outlier.sum(), dim))
        if drift is not None:
            out[head] = out[head, np.argsort(rng.random(num)[of] + drift * rng.standard_normal(rows))]
    return out


def inertia(rows, labels, num_clusters: int) -> float:
    """Mean over heads of the mean 1 − cosine to the cluster's mean direction, in float64: one measure for all."""
    total = 0.0
    for head, of in zip(rows, labels, strict=True):
        unit = head / np.linalg.norm(head.astype(np.float64), axis=1, keepdims=True)
        sums = np.zeros((num_clusters, head.shape[1]))
        np.add.at(sums, of, unit)
        total += 1 - np.linalg.norm(sums, axis=1).sum() / len(head)
    return total / len(rows)


def variance(rows, labels, num_clusters: int) -> float:
    """Mean over heads of the variance within clusters by that of the rows, in float64."""
    total = 0.0
    for head, of in zip(rows, labels, strict=True):
        centred = head - head.mean(axis=0, dtype=np.float64)
        sums = np.zeros((num_clusters, head.shape[1]))
        np.add.at(sums, of, centred)
        counts = np.bincount(of, minlength=num_clusters)
        total += 1 - (np.sum(sums**2, axis=1) / counts).sum() / np.sum(centred**2)
    return total / len(rows)


def ways(case: str, rounds: int) -> dict:
    """Seconds and variance of every one of WAYS, in turn, each round with a seed of its own."""
    import jax

    from squeezejax.offline.kmeans import Clustering, cluster

    if case.endswith(".npy"):
        rows = np.load(case).astype(np.float32)
    else:
        # Segments live by neighbours being alike, as they are in a text; in random order they lose several times more.
        rows = mixture(HEADS, *map(int, case.split("x")), drift=0.05)
    size = rows.shape[1]
    x, runs, found = jax.numpy.asarray(rows), {}, {}
    for name, (fraction, options) in WAYS.items():
        one = partial(cluster, num_clusters=int(fraction * size), options=Clustering(**options))
        runs[name] = jax.jit(lambda x, keys, one=one: jax.vmap(lambda x, key: one(x, key=key).labels)(x, keys))
        timing.once(partial(runs[name], x, jax.random.split(jax.random.key(0), len(rows))))  # compiles
        found[name] = {"seconds": [], "variances": []}
    for seed in range(rounds):
        keys = jax.random.split(jax.random.key(seed), len(rows))
        for name, run in runs.items():
            seconds, labels = timing.once(partial(run, x, keys))
            found[name]["seconds"].append(seconds)
            found[name]["variances"].append(variance(rows, np.asarray(labels), int(WAYS[name][0] * size)))
    return found


def ways_table(results: dict) -> str:
    """One line a case and way: time and variance against those of all rows at once by distance."""
    lines = [
        "| case | way | clusters | seconds | spread | time / that of all at once | variance | against all at once |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for case, of in results.items():
        base = of["euclidean"]
        for name, found in of.items():
            time = timing.Timing(tuple(found["seconds"]))
            variances = statistics.mean(found["variances"])
            cells = (
                case if case.endswith(".npy") else f"{HEADS} × {case.replace('x', ' × ')}",
                name,
                f"{WAYS[name][0]:.0%}",
                f"{time.median:.3f}",
                f"{time.spread:.0%}",
                f"{time.ratio(timing.Timing(tuple(base['seconds']))):.2f}",
                f"{variances:.4f}",
                f"{100 * (variances / statistics.mean(base['variances']) - 1):+.1f} %",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def squeezejax_runner(rows, num_clusters):
    import jax

    from squeezejax import kmeans

    x = jax.numpy.asarray(rows)
    run = jax.jit(jax.vmap(lambda x, key: kmeans(x, num_clusters, key=key)))
    return lambda seed: run(x, jax.random.split(jax.random.key(seed), len(rows))).labels


def scikit_learn_runner(rows, num_clusters):
    from sklearn.cluster import KMeans

    unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return lambda seed: [
        KMeans(num_clusters, n_init=1, random_state=seed + i).fit(u).labels_ for i, u in enumerate(unit)
    ]


def faiss_runner(rows, num_clusters):
    import faiss

    unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    def one(u, seed):
        # All rows train, however few or many there are to a centroid.
        limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(u)}
        found = faiss.Kmeans(u.shape[1], num_clusters, niter=20, spherical=True, seed=seed + 1, **limits)
        found.train(u)
        return found.index.search(u, 1)[1][:, 0]

    return lambda seed: [one(u, seed + i) for i, u in enumerate(unit)]


RUNNERS = {"squeezejax": squeezejax_runner, "scikit-learn": scikit_learn_runner, "faiss": faiss_runner}


def work(library: str):
    """Answer requests on stdin, one JSON object a line, until it closes: {case, seed} -> {seconds, inertia}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    case, run, rows, num_clusters = None, None, None, 0
    print(json.dumps(timing.machine("scikit-learn", "faiss-cpu", "threadpoolctl")), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["case"] != case:
            case = request["case"]
            size, dim = map(int, case.split("x"))
            rows, num_clusters = mixture(HEADS, size, dim), int(FRACTION * size)
            run = RUNNERS[library](rows, num_clusters)
            if library == "squeezejax":
                timing.once(partial(run, 0))  # compiles
        seconds, labels = timing.once(partial(run, request["seed"]))
        answer = {"seconds": seconds, "inertia": inertia(rows, np.asarray(labels), num_clusters)}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A library in its own process."""

    def __init__(self, library: str, python: str):
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.kmeans", "--worker", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT[library],
        )
        self.machine = self._answer()

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a benchmark worker ended with status {self.process.wait()}; its error is above")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def available(library: str, python: str) -> bool:
    module = {"scikit-learn": "sklearn", "faiss": "faiss"}[library]
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0:
        return True
    print(
        f"{library} is not installed for {python} and is left out: pip install scikit-learn faiss-cpu", file=sys.stderr
    )
    return False


def measure(workers: dict[str, Worker], case: str, rounds: int) -> dict:
    runs = {library: [] for library in workers}
    for seed in range(rounds):
        for library, worker in workers.items():
            runs[library].append(worker.ask(case=case, seed=100 * seed))
    return {
        library: {
            "seconds": [run["seconds"] for run in of],
            "inertia": statistics.mean(run["inertia"] for run in of),
        }
        for library, of in runs.items()
    }


def table(results: dict) -> str:
    """One line a case and library: seconds (spread), speed and inertia against scikit-learn where it ran."""
    lines = ["| case | library | seconds | spread | scikit-learn's time / this | inertia | against scikit-learn's |"]
    lines.append("|---|---|---|---|---|---|---|")
    for case, of in results.items():
        base = of.get("scikit-learn")
        for library, found in of.items():
            time = timing.Timing(tuple(found["seconds"]))
            speed, worse = "", ""
            if base:
                speed = f"{timing.Timing(tuple(base['seconds'])).ratio(time):.1f}×"
                worse = f"{100 * (found['inertia'] / base['inertia'] - 1):+.2f} %"
            cells = (
                f"{HEADS} × {case.replace('x', ' × ')}",
                library,
                f"{time.median:.3f}",
                f"{time.spread:.0%}",
                speed,
                f"{found['inertia']:.5f}",
                worse,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has scikit-learn and faiss")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="ROWSxDIM")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each library, a seed each (default: 3)")
    parser.add_argument("--worker", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--segments", action="store_true", help="squeezejax alone: by distance and by segments")
    message = "rows of a mixture, or a file of real keys [heads rows dim]"
    parser.add_argument("--segment-cases", nargs="+", default=SEGMENT_CASES, metavar="ROWSxDIM|FILE.npy", help=message)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker)
    pythons = {"squeezejax": sys.executable}
    if not arguments.segments:
        pythons |= {x: arguments.python for x in ("scikit-learn", "faiss") if available(x, arguments.python)}
    workers = {library: Worker(library, python) for library, python in pythons.items()}
    cases = () if arguments.segments else arguments.cases
    results = {case: measure(workers, case, arguments.rounds) for case in cases}
    machines = {library: worker.machine for library, worker in workers.items()}
    load = {"start": machines["squeezejax"]["load"], "end": timing.machine()["load"]}
    for worker in workers.values():
        worker.close()
    segments = {case: ways(case, arguments.rounds) for case in arguments.segment_cases}
    path = (
        ROOT
        / "benchmarks"
        / "results"
        / f"{'segments' if arguments.segments else 'kmeans'}-{datetime.now(UTC):%Y-%m-%d}.json"
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"machines": machines, "load": load, "cases": results, "segments": segments}, indent=1) + "\n"
    )
    if results:
        print(table(results) + "\n")
    print(ways_table(segments))
    print(f"\nload {load['start']:.1f} at the start, {load['end']:.1f} at the end; {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
