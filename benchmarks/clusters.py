"""What the shape of clusters, the order of a hierarchy and appending cost: counts and attention mass, no times.

    python -m benchmarks.clusters [--tokens 4096] [--texts 3] [--only shapes hierarchies append]

Real keys: the embedded model reads held-out texts, and is asked for facts in them. Measured are the K-means inertia,
and the share of the attention to clustered keys that the kept ones hold (kept mass), for the queries of the replies'
tokens one by one, as decoding has them. It is interpolated at equal numbers of keys kept, of rows read (kernels read
whole granules of 8), and of bytes read (rows, and centroids in float32 beside a 16-bit cache), each as a share of what
dense attention reads. Writes benchmarks/results/clusters-<date>.json and prints the tables.
"""

import argparse
import dataclasses
import functools
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import squeezejax
from benchmarks import timing
from benchmarks.embedded import batches
from squeezejax import SqueezeConfig, Tree, build_tree, calibrate, log_thresholds
from squeezejax.models import embedded
from squeezejax.models.embedded import text
from squeezejax.pallas_kernels.hopper.backend import GRANULE
from squeezejax.pallas_kernels.xla.dense import causal_attention
from squeezejax.pallas_kernels.xla.levelwise import score_heads

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.86, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
FIRST_SEED = 200_000  # held out: training seeds are above a million
QUESTIONS = 16
DEFAULT = SqueezeConfig.paper(cluster_granule=1)
ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Sample:
    """One text as the model sees it, and the queries of questions about it."""

    tokens: np.ndarray  # i32[S+W]
    keys: np.ndarray  # f32[L K S+W H]
    values: np.ndarray  # f32[L K S+W H]
    window_queries: np.ndarray  # f32[L N W H]
    queries: np.ndarray  # f32[L N T H], of the tokens that predict replies
    questions: list  # (ids, reply ids) of each fact

    @functools.cached_property
    def attention(self) -> np.ndarray:
        """Attention of each query to the clustered keys alone, mean over a group's heads: f32[L K T S]."""
        L, K, _, H = self.keys.shape
        clustered = self.keys[:, :, : -DEFAULT.observation_window]
        rows = self.queries.reshape(L, K, -1, *self.queries.shape[2:])
        scores = np.einsum("LKGTH,LKSH->LKGTS", rows, clustered) / np.sqrt(H)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=2)


def make_sample(params, encoder: batches.Encoder, seed: int, num_tokens: int) -> Sample:
    document = text.make_document(seed, num_tokens, min(64, num_tokens // 50))
    ids = [encoder.bos, *encoder.ids(document.text)]
    length, predicting, questions = len(ids), [], []
    for fact in document.facts[:: max(1, len(document.facts) // QUESTIONS)][:QUESTIONS]:
        # One conversation after the text, so that a single pass gives the queries of all questions.
        question, reply = encoder.turn(fact, first=len(ids) == length)
        ids += question
        predicting += range(len(ids) - 1, len(ids) + len(reply) - 1)
        ids += reply
        questions.append(encoder.turn(fact, first=True))
    q, k, v = map(np.asarray, forward(params, jnp.asarray([ids], jnp.int32)))
    window = slice(length - DEFAULT.observation_window, length)
    fixed = np.asarray(ids[:length], np.int32)
    return Sample(fixed, k[:, :, :length], v[:, :, :length], q[:, :, window], q[:, :, predicting], questions)


@jax.jit
def forward(params, tokens):
    """q [L N T H], k, v [L K T H] after RoPE of every layer, by dense attention over tokens i32[1 T]."""
    seen = []

    def attend(q, k, v):
        seen.append([x[0].swapaxes(0, 1) for x in (q, k, v)])
        return None, causal_attention(q, k, v)

    x, positions = params.embed(tokens), jnp.arange(tokens.shape[1])[None]
    for i in range(params.config.num_layers):
        x, _ = params.apply_layer(params.layer(i), x, positions, attend)
    return tuple(jnp.stack(part) for part in zip(*seen, strict=True))


# ---- Measures


@jax.jit
def kept_clusters(tree: Tree, q, layer, log_T) -> list:
    """bool[T K C] of every level: the clusters that each of the queries [T N H] keeps by itself."""
    rows = q.reshape(len(q), tree.num_kv_heads, -1, q.shape[-1])
    valid = jnp.ones(rows.shape[2], bool)
    one = lambda q, depth: score_heads(tree.levels[: depth + 1], layer, q, valid, log_T)[1]
    return [jax.lax.map(functools.partial(one, depth=depth), rows) for depth in range(len(tree.levels))]


def read_and_kept(sample: Sample, tree: Tree, sparsity: float) -> np.ndarray:
    """(keys kept, rows read, bytes read, kept mass), each as a share, means over layers, heads and queries."""
    log_T, S, found = log_thresholds(tree, sparsity), tree.num_keys, []
    for layer in range(tree.num_layers):
        kept = kept_clusters(tree, jnp.asarray(sample.queries[layer].swapaxes(0, 1)), layer, log_T)
        *upper, fine = (np.asarray(level) for level in kept)
        for head in range(tree.num_kv_heads):
            level = jax.tree.map(lambda leaf, at=(layer, head): np.asarray(leaf[at]), tree.levels[-1])
            row = np.zeros(tree.order.shape[2], int)
            for c in np.flatnonzero(level.counts):
                row[level.starts[c] : level.starts[c] + level.counts[c]] = c
            order = np.asarray(tree.order[layer, head])
            rows = fine[:, head][:, row] & (order >= 0)  # [T R]
            granules = np.pad(rows, ((0, 0), (0, -rows.shape[1] % GRANULE))).reshape(len(rows), -1, GRANULE)
            centroids = tree.levels[0].counts.shape[2]
            for depth, above in enumerate(upper):
                centroids = centroids + above[:, head] @ np.asarray(tree.levels[depth].child_counts[layer, head])
            read = granules.any(axis=-1).sum(axis=1) * GRANULE / S
            mass = np.sum(rows * sample.attention[layer, head][:, order], axis=1)
            # A centroid of H floats is as long as a key and a value in 16 bits.
            found.append([np.mean(x) for x in (rows.sum(axis=1) / S, read, read + centroids / S, mass)])
    return np.mean(found, axis=0)


def inertia(tree: Tree, sample: Sample) -> float:
    """Mean of 1 − cosine to the mean direction of a key's cluster, in float64."""
    total = []
    for layer, head in np.ndindex(tree.num_layers, tree.num_kv_heads):
        fine = jax.tree.map(lambda leaf, at=(layer, head): np.asarray(leaf[at]), tree.levels[-1])
        order = np.asarray(tree.order[layer, head])
        unit = sample.keys[layer, head].astype(np.float64)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        runs = (order[start : start + count] for start, count in zip(fine.starts, fine.counts, strict=True))
        total.append(1 - sum(np.linalg.norm(unit[run].sum(axis=0)) for run in runs) / tree.num_keys)
    return float(np.mean(total))


def measure(sample: Sample, tree: Tree) -> dict[str, float]:
    """One line of a table for one text."""
    found = np.array([read_and_kept(sample, tree, sparsity) for sparsity in SPARSITIES])[::-1]
    mass_at = lambda column, share: float(np.interp(share, found[:, column], found[:, 3]))
    counts = np.asarray(tree.levels[-1].counts)
    line = {"inertia": inertia(tree, sample), "largest / mean": float(counts.max() / counts.mean())}
    for column, name in enumerate(("kept", "rows read", "bytes read")):
        for share in (0.05, 0.1, 0.2) if column < 2 else (0.1, 0.15, 0.2):
            line[f"mass at {share:.0%} {name}"] = mass_at(column, share)
    return line


def mean_of(lines: list[dict]) -> dict[str, float]:
    return {name: statistics.mean(line[name] for line in lines) for name in lines[0]}


# ---- Contenders


def by_config(sample: Sample, **options) -> Tree:
    config = dataclasses.replace(DEFAULT, **options)
    return calibrate(build_tree(sample.keys, sample.values, config), sample.window_queries)


def coarse_then_refine(sample: Sample, seed: int = 0) -> Tree:
    """K-means into the coarse clusters, then inside each: as many fine clusters as its share of the keys."""
    clustered = sample.keys[:, :, : -DEFAULT.observation_window]
    L, K, S, _ = clustered.shape
    num_coarse, num_fine = DEFAULT.num_clusters(S)
    run = jax.jit(jax.vmap(lambda x, key: squeezejax.kmeans(x, num_coarse, key=key).labels))
    keys = jax.random.split(jax.random.key(seed), (L, K))
    parents, labels = np.zeros((L, K, num_fine), np.int32), np.zeros((L, K, S), np.int32)
    for layer in range(L):
        coarse = np.asarray(run(clustered[layer], keys[layer]))
        for head in range(K):
            rng = np.random.default_rng([seed, layer, head])
            parents[layer, head], labels[layer, head] = refine(clustered[layer, head], coarse[head], num_fine, rng)
    tree = build_tree(sample.keys, sample.values, DEFAULT, labels=(parents, labels))
    return calibrate(tree, sample.window_queries)


def refine(rows, coarse, num_fine: int, rng):
    """Splits coarse clusters i32[S] of rows [S H] -> (parents i32[C], labels i32[S]) of num_fine clusters in all."""
    unit = rows.astype(np.float64) / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    sizes = np.bincount(coarse)
    share = sizes * num_fine / len(rows)
    pieces = np.maximum(1, np.floor(share)).astype(int)
    while pieces.sum() != num_fine:
        step = np.sign(num_fine - pieces.sum())
        able = (pieces < sizes) if step > 0 else (pieces > 1)
        pieces[np.argmax(np.where(able, step * (share - pieces), -np.inf))] += step
    labels, first = np.zeros(len(rows), np.int32), np.cumsum(pieces) - pieces
    for parent in range(len(sizes)):
        members = np.flatnonzero(coarse == parent)
        labels[members] = first[parent] + lloyd(unit[members], pieces[parent], rng)
    return np.repeat(np.arange(len(sizes)), pieces), labels


def lloyd(unit, num_clusters: int, rng, restarts: int = 4, steps: int = 15):
    """Labels of the best of a few runs of spherical K-means from k-means++; slow and good, for few rows."""
    best = (-1.0, None)
    for _ in range(restarts):
        centres = unit[rng.integers(len(unit), size=1)]
        while len(centres) < num_clusters:
            distance = np.maximum(1 - (unit @ centres.T).max(axis=1), 1e-12)
            centres = np.concatenate([centres, unit[[rng.choice(len(unit), p=distance / distance.sum())]]])
        for _ in range(steps):
            labels = np.argmax(unit @ centres.T, axis=1)
            sums = np.zeros_like(centres)
            np.add.at(sums, labels, unit)
            length = np.linalg.norm(sums, axis=1, keepdims=True)
            centres = np.where(length > 0, sums / np.maximum(length, 1e-12), centres)
        best = max(best, (float(length.sum()), labels), key=lambda found: found[0])
    return best[1]


SHAPES = {
    "as K-means finds them": {},
    "cap 4": {"cluster_cap": 4.0},
    "cap 2": {"cluster_cap": 2.0},
    "cap 1.5": {"cluster_cap": 1.5},
    "balanced (cap 1.1)": {"cluster_cap": 1.1},
    "whole granules": {"cluster_granule": 8},
    "whole granules, cap 2": {"cluster_granule": 8, "cluster_cap": 2.0},
    "flat": {"cluster_fractions": (0.05,)},
    "flat, whole granules": {"cluster_fractions": (0.05,), "cluster_granule": 8},
}
HIERARCHIES = {
    "flat": functools.partial(by_config, cluster_fractions=(0.05,)),
    "fine, then coarse": by_config,
    "fine, then coarse, margin 8": functools.partial(by_config, coarse_margin=8.0),
    "coarse, then refine": coarse_then_refine,
    "three levels (0.25, 1, 5 %)": functools.partial(by_config, cluster_fractions=(0.0025, 0.01, 0.05)),
}


def trees_of(name: str, params, sample: Sample) -> dict:
    """Contenders of one table: a name and a function that builds each one's tree."""
    if name == "shapes":
        return {label: functools.partial(by_config, sample, **options) for label, options in SHAPES.items()}
    if name == "hierarchies":
        return {label: functools.partial(build, sample) for label, build in HIERARCHIES.items()}
    return {
        "at once": lambda: in_parts(params, sample, 1),
        "in 2 parts": lambda: in_parts(params, sample, 2),
        "in 8 parts": lambda: in_parts(params, sample, 8),
    }


# ---- Appending


def in_parts(params, sample: Sample, num_parts: int) -> Tree:
    first, *rest = np.array_split(sample.tokens, num_parts)
    tree = squeezejax.squeeze(params, first, DEFAULT)
    for part in rest:
        tree = squeezejax.append(params, tree, part)
    return tree


def right_answers(params, sample: Sample, tree: Tree, sparsity: float) -> tuple[int, float]:
    """(questions answered with the exact reply, kept fraction)."""
    questions, replies = zip(*sample.questions, strict=True)
    lengths = np.array([len(ids) for ids in questions])
    tokens = np.zeros((len(lengths), lengths.max()), np.int32)
    for row, ids in zip(tokens, questions, strict=True):
        row[: len(ids)] = ids
    longest = max(map(len, replies))
    found = squeezejax.generate(
        params, tree, tokens, lengths=lengths, max_new_tokens=longest, sparsity=sparsity, implementation="xla"
    )
    right = (list(row[: len(reply)]) == reply for row, reply in zip(np.asarray(found.tokens), replies, strict=True))
    return sum(right), float(np.mean(found.kept_fraction))


def table(lines: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(lines.values())))
    rows = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return "\n".join(
        rows + [f"| {label} | {' | '.join(f'{line[name]:.3f}' for name in names)} |" for label, line in lines.items()]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of a text (default: 4096)")
    parser.add_argument("--texts", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--only", nargs="+", default=("shapes", "hierarchies", "append"), metavar="TABLE")
    arguments = parser.parse_args()
    params, encoder = squeezejax.models.load(embedded.PATH), batches.Encoder(embedded.PATH)
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.texts)
    samples = [make_sample(params, encoder, seed, arguments.tokens) for seed in seeds]
    results = {}
    for name in arguments.only:
        found: dict[str, list] = {}
        for sample in samples:
            for label, build in trees_of(name, params, sample).items():
                tree = build()
                line = measure(sample, tree)
                if name == "append":
                    for sparsity in (0.7, 0.9, 0.95):
                        right, kept = right_answers(params, sample, tree, sparsity)
                        line |= {f"right at {sparsity}": right / len(sample.questions), f"kept at {sparsity}": kept}
                found.setdefault(label, []).append(line)
                jax.clear_caches()  # every tree has shapes of its own
        results[name] = {label: mean_of(lines) for label, lines in found.items()}
        print(f"\n{name}, {arguments.texts} texts of {arguments.tokens} tokens\n\n{table(results[name])}", flush=True)
    path = ROOT / "benchmarks" / "results" / f"clusters-{datetime.now(UTC):%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    settings = {"tokens": arguments.tokens, "texts": arguments.texts}
    path.write_text(json.dumps({"machine": timing.machine(), "settings": settings, "tables": results}, indent=1) + "\n")
    print(f"\n{path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
