"""How clusters should lie in the cache: wasted reads, memory, index size. `python -m benchmarks.layout [TREE QUERIES]…`

Kernels read whole granules of rows, clusters are runs of any length. Synthetic trees have clusters of a given size
distribution; which ones are kept is drawn with a share of clusters kept in whole families (children of one parent), as
a hierarchy's order makes them neighbours. Saved trees (`squeezejax.save`) are measured with the last of their window's
queries, one decode step a token. Counts only: no GPU, no time.
"""

import argparse

import numpy as np

GRANULES = (8, 16, 32)
BYTES_A_ROW = 2 * 128 * 2  # a key and a value of 128 in bfloat16


def cluster_sizes(rng, num_keys: int, mean: float) -> np.ndarray:
    """Sizes of a head's clusters: gamma-distributed weights, as K-means leaves them, summing to num_keys."""
    C = max(1, int(num_keys / mean))
    weights = rng.gamma(1.5, size=C)
    return rng.multinomial(num_keys - C, weights / weights.sum()) + 1


def draw_kept(rng, families: np.ndarray, fraction: float, together: float) -> np.ndarray:
    """bool[C]: clusters kept, a share `together` of them as parts of whole families."""
    C = len(families)
    kept = rng.random(C) < fraction * (1 - together)
    whole = rng.random(families.max() + 1) < fraction * together
    return kept | whole[families]


def fit_order(sizes: np.ndarray, families: np.ndarray) -> np.ndarray:
    """An order of clusters, families kept together, in which as few as possible touch one granule more than they must.

    Greedy: after a run that ends at offset e of a granule, the next sibling is one that fits behind it (e + its last
    part ≤ 8), the tightest fit first; any other if none does.
    """
    order, end = [], 0
    by_family = {}
    for cluster, family in enumerate(families):
        by_family.setdefault(int(family), []).append(cluster)
    for members in by_family.values():
        left = list(members)
        while left:
            # `rest` of a cluster: rows in its last granule if it began on one; 8 rows fill it whole.
            rest = [(int(sizes[c]) - 1) % 8 + 1 for c in left]
            fits = [(8 - end - r, i) for i, r in enumerate(rest) if end + r <= 8]
            _, i = min(fits) if fits else (0, int(np.argmin(rest)))
            cluster = left.pop(i)
            order.append(cluster)
            end = (end + int(sizes[cluster])) % 8
    return np.array(order)


def place(sizes: np.ndarray, aligned: bool) -> tuple[np.ndarray, int]:
    """(first row of each cluster, rows in all); aligned clusters begin on a granule of 8."""
    room = -(-sizes // 8) * 8 if aligned else sizes
    ends = np.cumsum(room)
    return ends - room, int(-(-ends[-1] // 8) * 8)


def rows_read(starts, sizes, kept, granule: int, merged: bool) -> int:
    """Rows of the granules that kept clusters touch; not merged, a granule counts once for each that touches it."""
    first, last = starts[kept] // granule, (starts[kept] + sizes[kept] - 1) // granule
    if not merged:
        return int((last - first + 1).sum()) * granule
    edges = np.zeros((starts + sizes).max() // granule + 2, int)
    np.add.at(edges, first, 1)
    np.add.at(edges, last + 1, -1)
    return int((np.cumsum(edges) > 0).sum()) * granule


def measure(sizes, families, kept) -> list[tuple[str, float, float, float]]:
    """(choice, rows read / rows kept, rows stored / keys, index bytes of a step / bytes of kept keys and values)."""
    kept_rows = sizes[kept].sum()
    orders = {"as built": np.arange(len(sizes)), "fitted": fit_order(sizes, families)}
    found = []
    for aligned, order_name, granule, merged in (
        (False, "as built", 8, False),
        *((False, "as built", granule, True) for granule in GRANULES),
        (False, "fitted", 8, True),
        (True, "as built", 8, True),
    ):
        order = orders[order_name]
        starts, rows = place(sizes[order], aligned)
        read = rows_read(starts, sizes[order], kept[order], granule, merged)
        name = f"{'aligned to 8' if aligned else 'straddling'}, {order_name}, granule {granule}"
        name += "" if merged else ", a list entry a cluster"
        found.append((name, read / kept_rows, rows / sizes.sum(), read / granule * 4 / (kept_rows * BYTES_A_ROW)))
    return found


def synthetic(rng, num_keys: int, mean: float, fraction: float, together: float):
    sizes = cluster_sizes(rng, num_keys, mean)
    families = np.sort(rng.integers(0, max(1, len(sizes) // 5), len(sizes)))
    return measure(sizes, families, draw_kept(rng, families, fraction, together))


def saved(path: str, queries: np.ndarray, sparsity: float, tokens: int = 8):
    """The same for a saved tree: every layer and head, each of the last tokens' queries [L N W H] a decode step."""
    import jax.numpy as jnp

    import squeezejax

    tree = squeezejax.load(path)
    if tree.key_codes is not None:
        raise SystemExit(f"{path} keeps single keys, not clusters: build it with key_bits=0")
    # Explicit thresholds: a sparsity alone may fall back to keeping every key.
    log_T = squeezejax.log_thresholds(tree, sparsity)
    fine, kept_share, totals = tree.levels[-1], [], []
    for layer in range(tree.num_layers):
        counts, starts, parents = (np.asarray(x[layer]) for x in (fine.counts, fine.starts, fine.parents))
        for token in range(-tokens, 0):
            q = jnp.asarray(queries[layer, :, token][None], tree.keys.dtype)
            rows = np.asarray(squeezejax.select(tree, q, layer=layer, log_thresholds=log_T).rows)
            for head in range(tree.num_kv_heads):
                alive = counts[head] > 0
                sizes, kept = counts[head][alive], rows[head][starts[head][alive]]
                kept_share.append(sizes[kept].sum() / sizes.sum())
                if kept.any():
                    totals.append(measure(sizes, parents[head][alive], kept))
    means = [(rows[0][0], *np.mean([row[1:] for row in rows], axis=0)) for rows in zip(*totals, strict=True)]
    return float(np.mean(kept_share)), means


def table(title: str, found):
    print(
        f"\n{title}\n\n| layout | rows read / kept | rows stored / keys | work list / kept bytes |\n|---|---|---|---|"
    )
    for name, *numbers in found:
        print(f"| {name} | " + " | ".join(f"{x:.3f}" if x > 0.05 else f"{x:.4f}" for x in numbers) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trees", nargs="*", help="saved trees, each followed by its window's queries [L N W H], .npy")
    parser.add_argument("--sparsity", type=float, default=0.9)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    for num_keys, fraction, together in ((2**17, 0.1, 0.0), (2**17, 0.1, 0.5), (2**19, 0.1, 0.5), (2**19, 0.05, 0.9)):
        title = f"{num_keys // 1024}K keys, 5 % clusters, {fraction:.0%} kept, {together:.0%} of them in whole families"
        table(title, synthetic(rng, num_keys, 20, fraction, together))
    for path, queries in zip(arguments.trees[::2], arguments.trees[1::2], strict=True):
        kept, found = saved(path, np.load(queries), arguments.sparsity)
        table(f"{path}, sparsity {arguments.sparsity:g}: {kept:.1%} of the keys kept", found)


if __name__ == "__main__":
    main()
