"""Building, saving and loading on a mesh: what one device gives, and no device is ever handed a whole."""

import sys

import jax
import numpy as np
import oracle
import pytest
from meshes import make_mesh, put, sent

import squeezejax
from squeezejax import SqueezeConfig
from squeezejax.mesh import parts

W, L = 10, 3
CONFIG = SqueezeConfig.paper(cluster_fractions=(0.06, 0.2), observation_window=W, query_block=2, sparsity=0.6)
CONTEXT = np.random.default_rng(5).integers(0, 31, 200)
QUESTIONS = np.random.default_rng(4).integers(0, 31, (4, 3)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return oracle.make_model(num_layers=L, vocab_size=32)


@pytest.fixture(scope="module")
def tree(params):
    return squeezejax.squeeze(params, CONTEXT, CONFIG)


def clusters(tree):
    """The finest clusters of every layer and head, as sets of positions in the context, with their centroids."""
    fine, order = tree.levels[-1], np.asarray(tree.order)
    starts, counts, centroids = (np.asarray(x) for x in (fine.starts, fine.counts, fine.centroids))
    return {
        (at, tuple(sorted(order[at][first : first + n]))): centroid
        for at in np.ndindex(order.shape[:2])
        for first, n, centroid in zip(starts[at], counts[at], centroids[at], strict=True)
        if n
    }


def in_context_order(tree, rows):
    """Rows [L K R H] of the tree as [L K S H] by position in the context."""
    order, rows = np.asarray(tree.order), np.asarray(rows)
    found = np.full((*rows.shape[:2], tree.num_keys, rows.shape[3]), np.nan, rows.dtype)
    for at in np.ndindex(order.shape[:2]):
        found[at][order[at][order[at] >= 0]] = rows[at][order[at] >= 0]
    return found


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)
    assert jax.tree.structure(tree) == jax.tree.structure(other)


def test_squeeze(params, tree, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["squeezejax.offline.squeeze"], "CHUNK", 64)  # the name alone is the function
    mesh = make_mesh(data=2, model=2, context=2)
    widened = []
    widen = parts._widen
    monkeypatch.setattr(parts, "_widen", lambda tree, sizes: widened.append(sizes) or widen(tree, sizes))
    # Just the room that the first layer needs, so that a later one asks for more.
    monkeypatch.setattr(parts, "SPARE", 1 << 30)
    monkeypatch.setattr(parts, "GRANULE", 1)
    params = put(mesh, params)
    found = squeezejax.squeeze(params, CONTEXT, CONFIG)
    assert widened
    assert found.parts == 2
    wanted = squeezejax.shardings(mesh, found)
    jax.tree.map(lambda leaf, to: leaf.sharding.is_equivalent_to(to, leaf.ndim) or pytest.fail(f"{to}"), found, wanted)

    # Sums over devices round otherwise, so keys differ in their last digits, and a key may change its cluster.
    for name in ("keys", "values"):
        ours, theirs = (in_context_order(t, getattr(t, name)) for t in (found, tree))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    ours, theirs = clusters(found), clusters(tree)
    same = ours.keys() & theirs.keys()
    assert len(same) > 0.9 * len(theirs)
    for name in same:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)
    answer = squeezejax.generate(params, found, QUESTIONS, max_new_tokens=2, implementation="xla")
    np.testing.assert_allclose(answer.prefill_kept_fraction, 0.4, atol=0.25)

    squeezejax.save(tmp_path / "tree", found)  # with the checks of a tree's structure
    assert_same(squeezejax.load(tmp_path / "tree"), found)


def test_an_interrupted_build_and_an_append(params, tree, tmp_path):
    """What a build left behind, and a tree to append to, are taken up again where their shares belong."""
    mesh = make_mesh(data=2, model=2, context=2)
    spread = put(mesh, params)

    def stop(progress):
        if progress.stage == f"layer 2/{L}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        squeezejax.squeeze(spread, CONTEXT, CONFIG, progress=stop, checkpoint=tmp_path / "build")
    found = squeezejax.squeeze(spread, CONTEXT, CONFIG, checkpoint=tmp_path / "build")
    assert_same(found, squeezejax.squeeze(spread, CONTEXT, CONFIG))

    more = np.random.default_rng(6).integers(0, 31, len(CONTEXT) - W)
    found, one = (squeezejax.append(*of, more) for of in ((spread, found), (params, tree)))
    assert found.parts == 2
    ours, theirs = (in_context_order(t, t.keys) for t in (found, one))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    answers = [squeezejax.prefill(*of, QUESTIONS, sparsity=0.0).logits for of in ((spread, found), (params, one))]
    np.testing.assert_allclose(*answers, atol=1e-3)


def test_prefill_sends_one_chunk(params):
    """Of the hidden states and of the keys, both as long as the context, a chunk's part moves and no more."""
    squeeze, length, chunk = sys.modules["squeezejax.offline.squeeze"], 256, 64
    params = put(make_mesh(data=2, model=2, context=2), params)
    x = jax.ShapeDtypeStruct(
        (1, length, 16), np.float32, sharding=squeeze.embed_chunked(params, CONTEXT[None]).sharding
    )
    cache = squeeze._empty_cache(params, (2, 1, length, 2, 6), np.float32)
    program = squeeze._prefill_chunk.lower(params, params.layer(0), x, cache, 0, None, 0, chunk).compile()
    sizes = [int(np.prod(shape)) for _, shapes in sent(program) for shape in shapes]
    assert 0 < max(sizes) <= chunk * 16


@pytest.fixture
def shares(monkeypatch):
    """(entries of a device's share, of the whole array) of every array made from a callback."""
    seen, make = [], jax.make_array_from_callback

    def spy(shape, sharding, callback):
        def read(index):
            share = callback(index)
            seen.append((share.size, int(np.prod(shape))))
            return share

        return make(shape, sharding, read)

    monkeypatch.setattr(jax, "make_array_from_callback", spy)
    return seen


@pytest.mark.parametrize("axes", [{"model": 2, "context": 2}, {"context": 4}, {"data": 2, "model": 4}])
def test_load(axes, tree, tmp_path, shares):
    mesh, devices = make_mesh(**axes), axes.get("context", 1)
    squeezejax.save(tmp_path / "tree", tree)
    found = squeezejax.load(tmp_path / "tree", mesh=mesh)
    assert_same(found, squeezejax.split_context(tree, devices))
    cut = min(axes.get("model", 1), 2) * devices
    keys = [share for share, whole in shares if whole == found.keys.size]
    assert len(keys) == 2 * mesh.size
    assert set(keys) == {found.keys.size // cut}

    squeezejax.save(tmp_path / "again", found)
    assert_same(squeezejax.load(tmp_path / "again"), found)
    assert_same(squeezejax.load(tmp_path / "again", mesh=mesh), found)
    assert squeezejax.load(tmp_path / "again", mesh=make_mesh(model=2)).parts == devices
    shares.clear()
    for wrong, reason in (({"rows": 2}, "may have the axes"), ({"model": 3}, "heads cannot be divided")):
        with pytest.raises(ValueError, match=reason):
            squeezejax.load(tmp_path / "again", mesh=make_mesh(**wrong))
    assert not shares


@pytest.mark.parametrize("axes", [{"model": 2, "context": 2}, {"data": 2, "model": 4}])
@pytest.mark.parametrize("slab_bytes", [100, 8 << 20])
def test_load_of_a_model(axes, slab_bytes, tmp_path, shares, monkeypatch):
    torch_models = pytest.importorskip("torch_models", exc_type=ImportError)  # PyTorch is not everywhere
    torch_models.make_model("llama", attention_bias=True, mlp_bias=True).save_pretrained(tmp_path)
    whole = squeezejax.models.load(tmp_path)
    monkeypatch.setattr(squeezejax.models.checkpoint, "_SLAB_BYTES", slab_bytes)
    found = squeezejax.models.load(tmp_path, mesh=make_mesh(**axes))
    if slab_bytes > 100:
        assert_same(found, whole)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(found), jax.tree.leaves(whole))
    mlp = [share for share, size in shares if size == whole.layers.mlp.gate.size]
    assert set(mlp) == {whole.layers.mlp.gate.size // axes["model"]}
    heads = [share for share, size in shares if size == whole.layers.attention.query.size]
    assert whole.layers.attention.query.size // axes["model"] in heads


def test_parts_are_even_and_whole(tree):
    """Every cluster lies in one part with all that is below it, and parts have nearly equal numbers of rows."""
    for n in (2, 3, 8):
        found = squeezejax.split_context(tree, n)
        assert clusters(found).keys() == clusters(tree).keys()
        np.testing.assert_array_equal(in_context_order(found, found.keys), in_context_order(tree, tree.keys))
        rows = np.sum(np.asarray(found.order).reshape(L, 2, n, -1) >= 0, axis=3)
        largest = np.asarray(tree.levels[0].counts).max()
        assert np.all(rows.max(axis=2) - rows.min(axis=2) <= largest)
        again = squeezejax.split_context(found, 1)
        assert clusters(again).keys() == clusters(tree).keys()
