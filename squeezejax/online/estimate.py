"""What centroids tell of the keys that are not read: the options are `reading.Estimate`'s.

To a query, a cluster of n keys with centroid c weighs about n·exp s(q, c) in the softmax, its *estimated mass*. Where
a coarser level gives a cluster up, its own centroid stands for everything below it. Three options build on that:

- `min_mass`: instead of those above a threshold, keep the fewest clusters that hold min_mass of all clusters' estimated
  mass, for every selection anew (what is attended anyway plays no part: against its exact mass, that of a cluster
  with one outstanding key is estimated far too low, and a head that has to find that key would keep nothing);
- `tail`: clusters that are not kept still contribute their estimated mass times the mean of their values, as in
  RetroInfer (arXiv 2505.02922) and Multipole Attention (arXiv 2506.13059);
- the *missed mass*: the estimated mass of clusters that are not kept, as a fraction of that and all that is attended.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels.xla.lists import cluster_of_rows
from squeezejax.pallas_kernels.xla.softmax import map_over
from squeezejax.tree import Tree


@jax.jit
def add_value_centroids(tree: Tree) -> Tree:
    """The tree with the mean value of every cluster at every level, which `tail=True` needs.

    They take as much memory as the centroids. `save` and `load` keep them.
    """
    L, K, R, _ = tree.values.shape
    flat = lambda x: x.reshape(L * K, *x.shape[2:])

    def one_head(head):  # index in L·K -> [means f32[C H], …], coarse → fine
        values = jax.tree.map(lambda x: flat(x)[head], tree.cache).wide().values
        fine = jax.tree.map(lambda leaf: flat(leaf)[head], tree.levels[-1])
        cluster = cluster_of_rows(fine.starts, fine.counts, R)
        sums = [jax.ops.segment_sum(values, cluster, fine.counts.shape[0])]  # drops padding
        for coarse, level in reversed([*itertools.pairwise(tree.levels)]):
            sums.insert(0, jax.ops.segment_sum(sums[0], flat(level.parents)[head], coarse.counts.shape[2]))
        sizes = [jnp.maximum(flat(level.counts)[head], 1).astype(jnp.float32) for level in tree.levels]
        return tuple(total / size[:, None] for total, size in zip(sums, sizes, strict=True))

    means = map_over(one_head, jnp.arange(L * K))
    levels = tuple(
        dataclasses.replace(level, value_centroids=mean.reshape(L, K, *mean.shape[1:]))
        for level, mean in zip(tree.levels, means, strict=True)
    )
    return dataclasses.replace(tree, levels=levels)
