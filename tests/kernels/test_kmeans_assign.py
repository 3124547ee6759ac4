"""K-means assignment on a GPU: the kernel interpreted against float64, and a whole clustering by it.

Each check runs in a process of its own (`python test_kmeans_assign.py NAME`): a kernel with a wrong barrier hangs, and
then ends with its timeout.
"""

import importlib.util
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import run_checks, run_python

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

import squeezejax
from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.hopper import kmeans_assign, mosaic, self_check
from squeezejax.pallas_kernels.oracle import kmeans as reference_kmeans

ROUNDING = 6.2e-5  # scores are cut to 2^-15, or 2^-14 where rounding takes them above 1


def unit(rng, *shape):
    """Rows of length one in bfloat16."""
    x = rng.standard_normal(shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.bfloat16)


def check_nearest(rows, centres, with_second=True, config=None):
    """rows [U S H], centres [U C H]: the choice is as good as the best one to rounding, and the scores are right."""
    with mosaic.interpret():
        found = kmeans_assign.nearest(rows, centres, with_second=with_second, config=config)
    for u in range(rows.shape[0]):
        scores = np.asarray(rows[u], np.float64) @ np.asarray(centres[u], np.float64).T
        _, best, _, second = reference_kmeans.nearest(rows[u], centres[u])
        row = np.arange(len(scores))
        labels = np.asarray(found.labels[u])
        np.testing.assert_allclose(scores[row, labels], best, atol=ROUNDING, rtol=0)
        np.testing.assert_allclose(found.best[u], best, atol=ROUNDING, rtol=0)
        if with_second:
            fallback = np.asarray(found.fallback[u])
            np.testing.assert_allclose(found.second[u], second, atol=ROUNDING, rtol=0)
            if centres.shape[1] > 1:
                assert (fallback != labels).all()
                np.testing.assert_allclose(scores[row, fallback], second, atol=ROUNDING, rtol=0)
        else:
            assert found.fallback is None


def head_sizes():
    for H in mosaic.HEAD_DIMS:
        rng = np.random.default_rng(H)
        check_nearest(unit(rng, 1, 70, H), unit(rng, 1, 131, H))
    with pytest.raises(NotImplementedError, match="head sizes"):
        kmeans_assign.nearest(unit(rng, 1, 70, 80), unit(rng, 1, 131, 80))


def deep():
    """A ring that wraps again and again: 31 tiles."""
    rng = np.random.default_rng(5)
    check_nearest(unit(rng, 1, 130, 64), unit(rng, 1, 3900, 64), config=kmeans_assign.Config(64, 3))


def ties():
    """Equal scores go to the first centre, also where equals lie in different tiles; negative ones too."""
    H, C = 64, 300
    rng = np.random.default_rng(0)
    direction = rng.integers(0, 4, C)  # every centre one of four axes, every row one of these or its opposite
    axes = np.eye(H)[:4]
    rows = np.concatenate([axes, -axes, [-np.ones(H) / 8]])
    with mosaic.interpret():
        found = kmeans_assign.nearest(
            jnp.asarray(rows[None], jnp.bfloat16), jnp.asarray(axes[direction][None], jnp.bfloat16), with_second=True
        )
    want = reference_kmeans.nearest(rows, axes[direction])
    np.testing.assert_array_equal(found.labels[0], want[0])
    np.testing.assert_array_equal(found.fallback[0], want[2])
    assert found.best[0, 8] < 0


def mapped():
    """vmap over heads and layers makes one launch; a shared argument is shared."""
    rng = np.random.default_rng(1)
    rows, centres = unit(rng, 2, 2, 40, 64), unit(rng, 2, 2, 9, 64)
    nearest = lambda rows, centres: kmeans_assign.nearest(rows, centres)[:2]
    with mosaic.interpret():
        at_once = jax.vmap(jax.vmap(nearest))(rows, centres)
        shared = jax.vmap(nearest, in_axes=(None, 0))(rows[0, 0], centres[0])
        for layer, head in np.ndindex(2, 2):
            alone = nearest(rows[layer, head], centres[layer, head])
            for a, b in zip(at_once, alone, strict=True):
                np.testing.assert_array_equal(a[layer, head], b)
        np.testing.assert_array_equal(shared[0][0], at_once[0][0, 0])


def not_numbers():
    """Rows that are not numbers get a label all the same."""
    rows = unit(np.random.default_rng(2), 1, 10, 64).at[0, 3].set(jnp.nan)
    with mosaic.interpret():
        found = kmeans_assign.nearest(rows, rows[:, :5], with_second=True)
    for labels in (found.labels, found.fallback):
        assert ((np.asarray(labels) >= 0) & (np.asarray(labels) < 5)).all()
    np.testing.assert_array_equal(found.labels[0, :3], [0, 1, 2])


def drawn():
    """Hypothesis draws shapes and tunings."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def assignment(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        U, S, C = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 300)), data.draw(st.integers(1, 520))
        config = kmeans_assign.Config(data.draw(st.sampled_from((64, 128))), data.draw(st.integers(1, 4)))
        check_nearest(unit(rng, U, S, 64), unit(rng, U, C, 64), data.draw(st.booleans()), config)

    assignment()


def whole():
    """K-means by the kernel finds just the groups that are there, and repeats itself.

    One head: the interpreter's callbacks cannot be mapped inside `jit`; all heads at once are compiled below.
    """
    rng = np.random.default_rng(3)
    groups = 12
    of = rng.integers(0, groups, 500)
    of[:groups] = np.arange(groups)
    x = jnp.asarray(rng.standard_normal((groups, 64))[of] + 0.02 * rng.standard_normal((500, 64)), jnp.float32)
    cluster = lambda: squeezejax.kmeans(
        x, groups, key=jax.random.key(0), max_iterations=3, swap_rounds=2, implementation="mosaic"
    )
    with mosaic.interpret(), registry.force_mosaic():
        found, again = cluster(), cluster()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(set(zip(of.tolist(), np.asarray(found.labels).tolist(), strict=True))) == groups
    unit_rows = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    sums = reference_kmeans.segment_sum(unit_rows, np.asarray(found.labels), groups)
    np.testing.assert_allclose(found.inertia, 1 - np.linalg.norm(sums, axis=1).sum() / 500, atol=1e-6)


def self_checked():
    """The check that lets `None` choose the kernel passes with it, and fails where its answer is a little off."""
    with mosaic.interpret():
        self_check.assignment(64)
        nearest = kmeans_assign.nearest
        kmeans_assign.nearest = lambda rows, centres, **options: nearest(rows, centres[:-1], **options)
        with pytest.raises(ArithmeticError):
            self_check.assignment(64)


CHECKS = ("head_sizes", "deep", "ties", "mapped", "not_numbers", "drawn", "whole", "self_checked")


@pytest.mark.parametrize("checks", [CHECKS[:5], CHECKS[5:]], ids=" ".join)
def test_interpreted(checks):
    run_checks(__file__, *checks, timeout=300)


COMPILE = """
import json, re
from benchmarks.gpu import compile_offline, deviceless
import jax, jax.numpy as jnp
floats_added = lambda program: len(re.findall(r"scatter-add\\S* = f32", program.text))
of_all_heads = lambda program: re.findall(r"\\(s32\\[(\\d+),[^)]*\\) custom-call\\(.*mosaic_gpu", program.text)
program = compile_offline.compile_kmeans(heads=2, num_keys=4000, head_dim=64)
shape = lambda dtype: jax.ShapeDtypeStruct((4000,), dtype)
scatter = lambda x, labels: jax.ops.segment_sum(x, labels, 200)
control = deviceless.compile_program(scatter, *deviceless.on_device((shape(jnp.float32), shape(jnp.int32))))
print(json.dumps([of_all_heads(program), floats_added(program), floats_added(control),
                  sum(kernel.spilled for kernel in program.kernels), program.temporaries]))
"""


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="compiling for an H200 needs jax[cuda13]")
def test_compiled():
    """K-means of two heads for an H200: one launch for both, no float is added by atomics, no matrix of scores."""
    run = run_python("-c", COMPILE)
    assert run.returncode == 0, run.stderr[-3000:]
    heads, floats_added, control, spilled, temporaries = json.loads(run.stdout.splitlines()[-1])
    assert heads == ["2"] * 4  # seeds, rows and offers of a swap round, rows of a Lloyd step
    assert (floats_added, spilled) == (0, 0)
    assert control > 0
    assert temporaries < 2 * 4000 * 200 * 4  # less than the scores of these heads


if __name__ == "__main__":
    warnings.simplefilter("error")
    for name in sys.argv[1:]:
        globals()[name]()
