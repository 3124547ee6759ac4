"""Sums by label: the form that accelerators run, against float64."""

import jax
import numpy as np
import pytest

from squeezejax.pallas_kernels.oracle import kmeans as reference_kmeans
from squeezejax.pallas_kernels.xla.segment_sums import PIECE, segment_sum, sum_in_pieces

CASES = {
    "even": (900, 50, lambda rng, S, C: rng.integers(C, size=S)),
    "one label for all, two rounds of pieces": (PIECE**2 + 1, 3, lambda rng, S, C: np.full(S, 1)),
    "mostly one label": (700, 9, lambda rng, S, C: np.where(rng.random(S) < 0.9, 4, rng.integers(C, size=S))),
    "one row a label": (200, 200, lambda rng, S, C: rng.permutation(S)),
    "more labels than rows": (5, 40, lambda rng, S, C: rng.integers(C, size=S)),
    "one row": (1, 1, lambda rng, S, C: np.zeros(S)),
}


in_pieces = jax.jit(sum_in_pieces, static_argnums=2)


@pytest.mark.parametrize("case", CASES)
def test_sums(case):
    S, C, draw = CASES[case]
    rng = np.random.default_rng(0)
    shape = (S,) if case == "even" else (S, 3)
    values, labels = rng.standard_normal(shape).astype(np.float32), draw(rng, S, C).astype(np.int32)
    want = reference_kmeans.segment_sum(values, labels, C)
    np.testing.assert_allclose(in_pieces(values, labels, C), want, atol=1e-4)
    np.testing.assert_allclose(segment_sum(values, labels, C), want, atol=1e-4)


def test_mapped():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((2, 100, 4)).astype(np.float32)
    labels = rng.integers(7, size=(2, 100)).astype(np.int32)
    found = jax.jit(jax.vmap(lambda values, labels: sum_in_pieces(values, labels, 7)))(values, labels)
    for head in range(2):
        want = reference_kmeans.segment_sum(values[head], labels[head], 7)
        np.testing.assert_allclose(found[head], want, atol=1e-5)
