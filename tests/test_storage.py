"""Tree files: bit-equal round trips, damage of every kind, and saves that fail or are killed."""

import copy
import dataclasses
import errno
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import squeezejax
from squeezejax import SqueezeConfig, TreeFileError, load, read_header, save
from squeezejax.storage import files as storage
from squeezejax.storage import header as storage_header

REASON = re.compile(r"is (cut|altered|not a|of version)|cannot be used")
HASH = np.arange(32, dtype=np.uint8)


def make_tree(dtype=jnp.float32, fractions=(0.1, 0.3), window=3, calibrated=True, tokens=23):
    """A tree of 2 layers and 2 heads; its table of thresholds is a small one, so that files are small."""
    config = SqueezeConfig.paper(cluster_fractions=fractions, observation_window=window, sparsity=0.7)
    keys, values = jax.random.normal(jax.random.key(0), (2, 2, 2, tokens, 4))
    sizes = (*config.num_clusters(tokens - window), tokens - window)
    labels = (np.arange(below) * 7 % above for above, below in itertools.pairwise(sizes))  # K-means is slow to compile
    labels = tuple(np.broadcast_to(entry, (2, 2, len(entry))) for entry in labels)
    tree = squeezejax.build_tree(keys, values, config, labels=labels)
    floats = {name: getattr(tree, name).astype(dtype) for name in ("keys", "values", "window_keys", "window_values")}
    tree = dataclasses.replace(tree, **floats)
    if not calibrated:
        return tree
    return dataclasses.replace(
        tree,
        sparsities=jnp.array([0.0, 0.5, 1.0]),
        thresholds=jnp.tile(jnp.array([-jnp.inf, -3.25, -1.5]), (len(fractions), 1)),
        fingerprint="0123abcd",
        context_hash=jnp.asarray(HASH),
    )


@pytest.fixture(scope="module")
def tree():
    return make_tree()


@pytest.fixture(scope="module")
def saved(tree, tmp_path_factory):
    """The bytes of a saved tree."""
    path = tmp_path_factory.mktemp("saved") / "a.tree"
    save(path, tree, {"model": "a/b"})
    return path.read_bytes()


def assert_same(loaded, tree, static=True):
    """Bit-equal leaves, and equal static fields."""
    assert not static or jax.tree.structure(loaded) == jax.tree.structure(tree)
    leaves = jax.tree.leaves(loaded), jax.tree.leaves(tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(*leaves)
    for one, other in zip(*leaves, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def refusal(path, params=None):
    """The sentence with which a file is refused."""
    with pytest.raises(TreeFileError) as error:
        load(path, params)
    sentence = str(error.value)
    assert sentence.startswith(str(path))
    assert REASON.match(sentence[len(str(path)) + 1 :]), sentence
    assert "\n" not in sentence
    return sentence


def head_of(data):
    return 8 + int.from_bytes(data[:8], "little")


def sealed(text: bytes, data: bytes):
    """A file whose header has a valid checksum, whatever else it says."""
    return storage_header.seal(len(text).to_bytes(8, "little") + text) + data


def edited(saved, edit):
    """The file with `edit` done to its header's content, and sealed again."""
    content = json.loads(saved[8 : head_of(saved)])
    edit(content)
    return sealed(json.dumps(content, separators=(",", ":")).encode(), saved[head_of(saved) :])


# ---- Round trips


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("fractions", [(0.2,), (0.05, 0.2, 0.5)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_round_trip(tmp_path, dtype, fractions, calibrated):
    tree = make_tree(dtype, fractions, calibrated=calibrated)
    save(tmp_path / "a.tree", tree)
    loaded = load(tmp_path / "a.tree")
    assert_same(loaded, tree)
    assert loaded.config == tree.config
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


@pytest.mark.parametrize("window", [0, 1])
def test_round_trip_of_odd_shapes(tmp_path, window):
    """No window or one token of it, and dead clusters (labels that skip numbers), in a str path."""
    keys = jax.random.normal(jax.random.key(1), (1, 1, 5 + window, 3)).astype(jnp.bfloat16)
    config = SqueezeConfig.paper(cluster_fractions=(0.5,), observation_window=window)
    tree = squeezejax.build_tree(keys, keys, config, labels=(np.array([[[0, 6, 6, 2, 0]]]),))
    save(str(tmp_path / "a"), tree)
    assert_same(load(str(tmp_path / "a")), tree)


def test_round_trip_of_squeezed_context(tmp_path):
    """What `calibrate` writes passes the checks, as do padding rows and levels whose runs are not in row order."""
    tree = squeezejax.calibrate(make_tree(calibrated=False), jax.random.normal(jax.random.key(2), (2, 4, 5, 4)))
    pad = lambda rows, value=0: jnp.pad(
        rows, [(0, 0), (0, 0), (2, 3)] + [(0, 0)] * (rows.ndim - 3), constant_values=value
    )
    levels = tuple(dataclasses.replace(level, starts=level.starts + 2) for level in tree.levels)
    coarse, fine = levels
    mirrored = fine.counts.shape[2] - coarse.child_starts - coarse.child_counts
    flipped = [jnp.flip(getattr(fine, name), axis=2) for name in ("centroids", "counts", "starts", "parents")]
    tree = dataclasses.replace(
        tree,
        keys=pad(tree.keys),
        values=pad(tree.values),
        order=pad(tree.order, -1),
        levels=(dataclasses.replace(coarse, child_starts=mirrored), squeezejax.Level(*flipped)),
    )
    save(tmp_path / "a", tree)
    assert_same(load(tmp_path / "a"), tree)


def make_coded_tree(index_bits=4, key_bits=2, score="variance", H=5, parts=1):
    """A calibrated tree of the default index, two levels, in few bits, with padding rows and value centroids."""
    config = SqueezeConfig(
        cluster_fractions=(0.1, 0.3),
        sinks=2,
        observation_window=3,
        index_bits=index_bits,
        key_bits=key_bits,
        score=score,
        query_block=2,
    )
    keys, values = jax.random.normal(jax.random.key(0), (2, 2, 2, 26, H)).astype(jnp.bfloat16)
    sizes = (*config.num_clusters(21), 21)
    labels = (np.arange(below) * 7 % above for above, below in itertools.pairwise(sizes))
    labels = tuple(np.broadcast_to(entry, (2, 2, len(entry))) for entry in labels)
    tree = squeezejax.build_tree(keys, values, config, labels=labels)
    tree = squeezejax.calibrate(tree, jax.random.normal(jax.random.key(1), (2, 4, 3, H)))
    tree = squeezejax.add_value_centroids(tree)
    return squeezejax.split_context(tree, parts)


@pytest.mark.parametrize(
    ("index_bits", "key_bits", "score", "parts"),
    [(32, 0, "variance", 1), (16, 1, "variance", 1), (8, 4, "variance", 2), (4, 2, "variance", 3), (4, 0, "mean", 1)],
)
def test_round_trip_of_codes(tmp_path, index_bits, key_bits, score, parts):
    tree = make_coded_tree(index_bits, key_bits, score, parts=parts)
    save(tmp_path / "a", tree)
    loaded = load(tmp_path / "a")
    assert_same(loaded, tree)
    assert loaded.config == tree.config
    names = set(read_header(tmp_path / "a").tensors)
    assert ("levels.0.centroids" in names) == (index_bits >= 16)
    assert ("levels.1.codes" in names) == ("levels.1.offset" in names) == (index_bits < 16)
    assert ("key_codes" in names) == ("key_steps" in names) == (key_bits > 0)
    assert ("denominators" in names) == ("block_thresholds" in names) == (score == "variance")


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    path = tmp_path_factory.mktemp("coded") / "a.tree"
    tree = make_coded_tree()
    save(path, tree)
    return tree, path.read_bytes()


def test_every_byte_of_codes_is_checked(tmp_path, coded):
    """A bit flipped in any tensor is noticed."""
    _, data = coded
    (tmp_path / "a").write_bytes(data)
    start = head_of(data)
    for name, tensor in read_header(tmp_path / "a").tensors.items():
        flipped = bytearray(data)
        flipped[start + tensor.start + tensor.nbytes // 2] ^= 4
        (tmp_path / "a").write_bytes(flipped)
        assert "is altered" in refusal(tmp_path / "a"), name


def test_trees_whose_arrays_do_not_fit_are_not_saved(tmp_path, coded):
    tree, _ = coded
    coarse, fine = tree.levels
    level = lambda **changes: {"levels": (coarse, dataclasses.replace(fine, **changes))}
    for changes, message in (
        ({"key_codes": None}, "key_codes"),
        ({"key_codes": tree.key_codes[..., :1]}, "key_codes"),
        ({"key_steps": tree.key_steps[..., 1:]}, "key_steps"),
        ({"key_steps": tree.key_steps.astype(jnp.float32)}, "key_steps"),
        ({"denominators": None}, "denominators"),
        ({"denominators": tree.denominators * jnp.nan}, "denominators"),
        ({"block_thresholds": tree.block_thresholds[:, 1:]}, "block_thresholds"),
        (level(codes=None), r"levels\.1\.codes"),
        (level(spreads=None), r"levels\.1\.spreads"),
        (level(offset=fine.offset[:, :, 1:]), r"levels\.1\.offset"),
        (level(steps=fine.steps[..., None]), r"levels\.1\.steps"),
        ({"config": dataclasses.replace(tree.config, index_bits=8)}, "codes"),
        ({"config": dataclasses.replace(tree.config, key_bits=0)}, "key_codes"),
        ({"config": dataclasses.replace(tree.config, sinks=9)}, "sinks"),
    ):
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "b", dataclasses.replace(tree, **changes))
        assert not (tmp_path / "b").exists()


def test_files_of_version_1_read_as_the_papers(tmp_path):
    """A file that the first release wrote, and what it selected and attended then."""
    path = Path(__file__).parent / "data" / "version1.tree"
    tree, then = load(path), np.load(path.with_suffix(".npz"))
    assert read_header(path).version == 1
    assert tree.config == SqueezeConfig.paper(
        cluster_fractions=(0.1, 0.3), observation_window=3, sparsity=0.7, coarse_margin=2.0, query_block=2
    )
    assert (tree.fingerprint, tree.num_keys, tree.context_length) == ("0123abcd", 40, 43)
    assert np.asarray(tree.context_hash).tobytes() == HASH.tobytes()
    np.testing.assert_array_equal(tree.keys, then["keys"])
    log_T = squeezejax.log_thresholds(tree, 0.6)
    np.testing.assert_allclose(log_T, then["log_T"], rtol=1e-6)
    mask = squeezejax.select(tree, then["q"][0, :2], layer=1, log_thresholds=log_T).key_mask(tree)
    np.testing.assert_array_equal(mask, then["mask"])
    q, k, v = (then[name] for name in "qkv")
    out, lse = squeezejax.attend(tree, q, k, v, layer=1, sparsity=0.6, implementation="xla")
    np.testing.assert_allclose(out, then["out"], atol=1e-6)
    np.testing.assert_allclose(lse, then["lse"], atol=1e-6)
    # Written again, it is of the version of today.
    save(tmp_path / "again", tree, read_header(path).notes)
    assert read_header(tmp_path / "again").version == 3
    assert_same(load(tmp_path / "again"), tree)


def test_files_of_version_2_hold_keys_and_values_as_the_model_gave_them(tmp_path):
    """One that was written before there were others, and what it selected and attended then."""
    path = Path(__file__).parent / "data" / "version2.tree"
    tree, then = load(path), np.load(path.with_suffix(".npz"))
    assert read_header(path).version == 2
    assert (tree.config.cache_bits, tree.config.index_bits, tree.config.key_bits) == (16, 4, 2)
    assert (tree.fingerprint, tree.num_keys, tree.key_scales) == ("0123abcd", 21, None)
    np.testing.assert_array_equal(np.asarray(tree.keys).view(np.uint16), then["keys"])
    log_T = squeezejax.log_thresholds(tree, 0.6)
    np.testing.assert_allclose(log_T, then["log_T"], rtol=1e-6)
    mask = squeezejax.select(tree, then["q"][0], layer=1, log_thresholds=log_T).key_mask(tree)
    np.testing.assert_array_equal(mask, then["mask"])
    q, k, v = (then[name] for name in "qkv")
    out, lse = squeezejax.attend(tree, q, k, v, layer=1, sparsity=0.6, implementation="xla")
    np.testing.assert_allclose(out, then["out"], atol=1e-5)
    np.testing.assert_allclose(lse, then["lse"], atol=1e-5)
    save(tmp_path / "again", tree)
    assert_same(load(tmp_path / "again"), tree)


def test_readable_by_safetensors(tmp_path, tree):
    save(tmp_path / "a.safetensors", tree)
    tensors = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(tensors["keys"], tree.keys)
    np.testing.assert_array_equal(tensors["levels.1.centroids"], tree.levels[1].centroids)
    np.testing.assert_array_equal(tensors["thresholds"], tree.thresholds)
    level = {f"levels.{i}.{name}" for i in (0, 1) for name in ("centroids", "counts", "starts", "parents")}
    level |= {"levels.0.child_starts", "levels.0.child_counts"}
    rows = {"keys", "values", "order", "window_keys", "window_values", "sparsities", "thresholds"}
    assert set(tensors) == rows | level
    save(tmp_path / "a.safetensors", make_tree(jnp.bfloat16, calibrated=False))
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata()["version"] == "3"
        assert file.get_slice("keys").get_dtype() == "BF16"
        assert not {"thresholds", "sparsities"} & set(file.keys())


def test_header(tmp_path, tree):
    notes = {"model": "/models/ü", "suffix": '<|eot|>\n"}\\', "": "\ud800"}  # as an undecodable path has them
    config = dataclasses.replace(tree.config, sparsity=np.float32(0.7), kmeans_tolerance=np.float64(0.1))
    save(tmp_path / "a", dataclasses.replace(tree, config=config), notes)
    header = read_header(tmp_path / "a")
    assert header.notes == notes
    assert (header.version, header.config, header.num_keys) == (3, config, 20)
    assert (header.fingerprint, header.context_hash) == ("0123abcd", HASH.tobytes().hex())
    assert header.tensors["keys"].shape == (2, 2, 20, 4)
    assert header.tensors["keys"].dtype == np.float32
    assert header.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) - HASH.nbytes


def test_load_holds_one_copy(tmp_path):
    """NumPy's memory, which tracemalloc sees, peaks at the arrays that JAX takes over: no second copy anywhere."""
    tree = make_tree(fractions=(0.0001,), tokens=100_000)
    save(tmp_path / "a", tree)
    size = os.path.getsize(tmp_path / "a")
    jax.block_until_ready(load(tmp_path / "a"))
    tracemalloc.start()
    loaded = load(tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 14e6
    assert peak < 1.3 * size  # the checks of order, a layer at a time, take their part
    assert_same(loaded, tree)


def test_loaded_tree_is_independent_of_its_file(tmp_path, tree):
    save(tmp_path / "a", tree)
    loaded = load(tmp_path / "a")
    with open(tmp_path / "a", "r+b") as file:
        file.write(bytes(os.path.getsize(tmp_path / "a")))
    assert_same(loaded, tree)


def test_mapped_tensors_reach_jax(tmp_path, tree, monkeypatch):
    """What accelerators do: the map itself is handed over."""
    monkeypatch.setattr(storage, "_aligned_copy", lambda mapped: mapped)
    for dtype in (jnp.float32, jnp.bfloat16):
        save(tmp_path / "a", make_tree(dtype))
        assert_same(load(tmp_path / "a"), make_tree(dtype))


# ---- Damage


def damage(data: bytes, rng) -> bytes:
    """One accident: flipped bits, a lost or doubled piece, zeros, garbage, an end cut off or added."""
    at = int(rng.integers(len(data)))
    end = min(len(data), at + int(rng.integers(1, 200)))
    kind = rng.integers(8)
    if kind == 0:
        flipped = bytearray(data)
        for i in rng.integers(len(data), size=rng.integers(1, 4)):
            flipped[i] ^= 1 << int(rng.integers(8))
        return bytes(flipped)
    other = int(rng.integers(len(data)))
    pieces = {
        1: data[:at],
        2: data[:at] + bytes(end - at) + data[end:],
        3: data[:at] + rng.bytes(end - at) + data[end:],
        4: data[:at] + rng.bytes(end - at) + data[at:],
        5: data[:at] + data[end:],
        6: data[:at] + data[other : other + end - at] + data[at + len(data[other : other + end - at]) :],
        7: data + rng.bytes(end - at),
    }
    return pieces[int(kind)]


def rewrite(path, data):
    """As write_bytes, in place: emptying a file first makes ext4 wait for the disk, thousands of times here."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


def assert_refused_or_same(path, data, tree, saved):
    rewrite(path, data)
    if data == saved:
        assert_same(load(path), tree)
    else:
        refusal(path)


def test_any_flipped_bit_is_found(tmp_path, tree, saved):
    """Every bit of the length and of the header's beginning, one of every header byte and of every third later one."""
    bits = [(i, bit) for i in range(100) for bit in range(8)]
    bits += [(i, i % 8) for i in (*range(100, head_of(saved)), *range(head_of(saved), len(saved), 3))]
    for i, bit in bits:
        flipped = bytearray(saved)
        flipped[i] ^= 1 << bit
        assert_refused_or_same(tmp_path / "a", flipped, tree, saved)


def test_any_cut_is_found(tmp_path, saved):
    for size in (*range(head_of(saved)), *range(head_of(saved), len(saved), 5)):
        rewrite(tmp_path / "a", saved[:size])
        sentence = refusal(tmp_path / "a")
        assert "is cut" in sentence
        if size >= head_of(saved):
            assert f"{len(saved) - size} of its {len(saved)} bytes are missing" in sentence


def test_random_damage_is_found(tmp_path, tree, saved):
    rng = np.random.default_rng(0)
    for _ in range(3000):
        data = saved
        for _ in range(rng.integers(1, 3)):
            data = damage(data, rng) or b"x"
        assert_refused_or_same(tmp_path / "a", data, tree, saved)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random"
    rewrite(path, data)
    refusal(path)


JUNK = [None, True, -1, 0, 7, 2**63, 10**4000, 1e308, float("nan"), "", "x", "7", "é\0", [], [[]], [0], {}, {"a": 1}]


def edit_at_random(content, rng):
    """Replaces, deletes, renames or adds one entry anywhere in the header, inside nested JSON too."""
    metadata = content["__metadata__"]
    inner = {name: json.loads(metadata[name]) for name in ("checksums", "config", "notes")}
    objects = [content, metadata, *inner.values(), *(entry for name, entry in content.items() if name[0] != "_")]
    place = objects[rng.integers(len(objects))]
    kept = ("__metadata__", "format", "version", "header_crc32")  # else the file is foreign or altered, seen above
    names = [name for name in place if name not in kept]
    name = names[rng.integers(len(names))]
    junk = copy.deepcopy(JUNK[rng.integers(len(JUNK))])
    kind = rng.integers(5)
    if kind == 0 and isinstance(place[name], list) and place[name]:
        place[name][rng.integers(len(place[name]))] = junk
    elif kind == 1:
        del place[name]
    elif kind == 2:
        place[name + "_"] = place.pop(name)
    elif kind == 3:
        place["extra"] = junk
    else:
        place[name] = junk
    for name, value in inner.items():
        if name in metadata and isinstance(metadata[name], str) and place is value:
            metadata[name] = json.dumps(value)


def test_sealed_header_edits_change_no_tensor(tmp_path, tree, saved):
    """Valid JSON under a valid checksum: refused, or harmless (a note, another default sparsity)."""
    rng = np.random.default_rng(1)
    refused = harmless = 0
    for _ in range(1500):
        rewrite(tmp_path / "a", edited(saved, lambda content: edit_at_random(content, rng)))
        try:
            loaded = load(tmp_path / "a")
        except TreeFileError as error:
            refused += REASON.search(str(error)) is not None
        else:
            with_hash = dataclasses.replace(loaded, context_hash=tree.context_hash)  # optional: may be edited away
            assert_same(with_hash, tree, static=False)
            harmless += 1
    assert refused + harmless == 1500
    assert refused > 1000


def put(*path, value):
    def edit(content):
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return edit


def test_header_numbers_are_not_trusted(tmp_path, saved):
    keys = {"dtype": "F32", "shape": [2, 2, 20, 4]}
    start = json.loads(saved[8 : head_of(saved)])["keys"]["data_offsets"][0]
    cases = {
        "does not lie": [
            put("keys", "data_offsets", value=[start, 2**62]),
            put("keys", "data_offsets", value=[start + 8, start + 1288]),
            put("values", value={**keys, "data_offsets": [start, start + 1280]}),
            put("keys", "shape", value=[2**40, 2**40, 2**40, 2**40]),
        ],
        "has no shape": [put("keys", "shape", value=[1] * 1000), put("keys", "shape", value=[2, 2, 20, -4])],
        "has a dtype": [put("keys", "dtype", value="F64"), put("keys", "dtype", value=[])],
        "differ in their names": [put("more", value={**keys, "data_offsets": [0, 0]})],
        "rows for 21 keys": [put("__metadata__", "num_keys", value="21")],
        "not a valid squeezejax tree": [
            put("__metadata__", "config", value="[" * 100_000),
            put("__metadata__", "config", value='{"observation_window":1e999,"observation_window":3}'),
            put("__metadata__", "config", value='{"colour":1}'),
            put("__metadata__", "config", value='{"cluster_fractions":[0.5]}'),
        ],
    }
    for sentence, edits in cases.items():
        for edit in edits:
            (tmp_path / "a").write_bytes(edited(saved, edit))
            assert sentence in refusal(tmp_path / "a")


def test_headers_that_are_no_json(tmp_path, saved):
    text, data = saved[8 : head_of(saved)].rstrip(), saved[head_of(saved) :]
    repeated = text[:-1] + b',"keys":{"dtype":"F32","shape":[2,2,20,4],"data_offsets":[0,1280]}}'
    deep = text[:-1] + b',"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    for bad in (
        repeated,
        deep,
        text[:-1],
        text + b"x",
        text[:-1] + b',"\xff":1}',
        text.replace(b"F32", b"\xed\xa0\x80"),
    ):
        (tmp_path / "a").write_bytes(sealed(bad, data))
        assert "not a valid squeezejax tree" in refusal(tmp_path / "a")
    (tmp_path / "a").write_bytes((2**63).to_bytes(8, "little") + saved[8:])
    assert "length" in refusal(tmp_path / "a")


def test_extra_tensors_are_refused(tmp_path, saved, tree):
    """Even complete with a checksum: a later version would have said so in its version."""

    def edit(content):
        size = len(saved) - head_of(saved)
        content["value_centroids"] = {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]}
        checksums = json.loads(content["__metadata__"]["checksums"])
        content["__metadata__"]["checksums"] = json.dumps({**checksums, "value_centroids": "2144df1c"})

    (tmp_path / "a").write_bytes(edited(saved, edit) + bytes(4))
    assert "'value_centroids' is not one of a tree" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("order", (0, 0, 0), 20),
        ("order", (0, 0, 0), -2),
        ("order", (1, 1, 3), -1),
        ("levels.0.starts", (0, 0, 0), -1),
        ("levels.0.starts", (0, 0, 1), 2**31 - 1),
        ("levels.1.counts", (1, 0, 2), 2**31 - 1),
        ("levels.1.counts", (1, 0, 2), -5),
        ("levels.1.parents", (0, 1, 5), 2),
        ("levels.1.parents", (0, 1, 5), 0),
        ("levels.0.child_starts", (0, 1, 0), 1),
        ("levels.0.child_counts", (0, 1, 0), -1),
        ("levels.0.parents", (0, 0, 0), 1),
        ("levels.1.starts", (0, 0, 2), 0),
        ("levels.1.centroids", (0, 0, 0, 0), np.nan),
        ("thresholds", (0, 1), np.nan),
        ("sparsities", (1,), 2.0),
    ],
)
def test_values_out_of_range_are_neither_saved_nor_loaded(tmp_path, tree, monkeypatch, name, index, value):
    leaves, treedef = jax.tree.flatten(tree)
    at = list(storage._named_leaves(tree)).index(name)
    leaves[at] = leaves[at].at[index].set(value)
    broken = jax.tree.unflatten(treedef, leaves)
    with pytest.raises(ValueError, match="cannot save this tree"):
        save(tmp_path / "a", broken)
    assert not os.listdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "check_values", lambda *_: None)
        save(tmp_path / "a", broken)
    assert "not a valid squeezejax tree" in refusal(tmp_path / "a")


def test_foreign_files(tmp_path):
    path = tmp_path / "a"
    for data, reason in ((b"", "is cut"), (b"\0" * 50, "not a squeezejax tree"), (b"%PDF-1.7 long ago", "not a squee")):
        path.write_bytes(data)
        assert reason in refusal(path)
    safetensors.numpy.save_file({"keys": np.zeros(3, np.float32)}, path, metadata={"format": "pt"})
    assert "not a squeezejax tree file" in refusal(path)


def test_rewritten_by_another_program(tmp_path, saved):
    """The safetensors library orders a header as it likes: our checksums do not survive that, nor do they seem to."""
    (tmp_path / "a").write_bytes(saved)
    with safe_open(tmp_path / "a", "numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.numpy.save_file(tensors, tmp_path / "b", metadata=metadata)
    assert "is altered" in refusal(tmp_path / "b")
    safetensors.numpy.save_file(tensors, tmp_path / "b", metadata={**metadata, "version": "4"})
    assert "upgrade squeezejax" in refusal(tmp_path / "b")


def test_newer_version(tmp_path, saved):
    newer = edited(saved, put("__metadata__", "version", value="12"))
    (tmp_path / "a").write_bytes(newer)
    sentence = refusal(tmp_path / "a")
    assert "is of version 12" in sentence
    assert sentence.endswith("upgrade squeezejax")
    (tmp_path / "a").write_bytes(saved.replace(b'"version":"3"', b'"version":"4"'))
    assert "upgrade squeezejax (or it is altered" in refusal(tmp_path / "a")


def model(**changes):
    config = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 4, "fingerprint": "0123abcd"} | changes
    return types.SimpleNamespace(config=types.SimpleNamespace(**config))


def test_wrong_model(tmp_path, saved, tree):
    path = tmp_path / "a"
    path.write_bytes(saved)
    assert_same(load(path, model()), tree)
    assert_same(load(path, params=model(fingerprint=None)), tree)
    for changes in ({"fingerprint": "ffff"}, {"num_layers": 3}, {"head_dim": 8}):
        assert "another model" in refusal(path, model(**changes))
    path.write_bytes(saved[:-1] + b"x")  # refused before the tensors are read
    assert "another model" in refusal(path, model(num_kv_heads=1))


def test_paths_that_cannot_be_read(tmp_path):
    for read in (load, read_header):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
        with pytest.raises(IsADirectoryError):
            read(tmp_path)


# ---- Saves that do not happen


def test_paths_that_cannot_be_written(tmp_path, tree):
    os.mkfifo(tmp_path / "fifo")
    cases = [("none/a", FileNotFoundError), ("", IsADirectoryError), ("fifo", ValueError), ("x" * 300, OSError)]
    for name, error in cases:
        with pytest.raises(error):
            save(tmp_path / name, tree)
    assert os.listdir(tmp_path) == ["fifo"]


def test_trees_that_cannot_be_saved(tmp_path, tree):
    with pytest.raises(ValueError, match="notes must map strings"):
        save(tmp_path / "a", tree, {"a": 1})
    with pytest.raises(ValueError, match="do not fit in a header"):
        save(tmp_path / "a", tree, {"a": "x" * storage_header.MOST_HEADER_BYTES})
    for changes, sentence in (
        ({"context_hash": jnp.zeros(3, jnp.uint8)}, "context_hash"),
        ({"sparsities": None}, "'sparsities' is missing"),
        ({"keys": tree.keys.astype(jnp.int32)}, "dtype"),
        ({"keys": tree.keys.astype(jnp.bfloat16)}, "dtype"),
        ({"levels": tree.levels[:1]}, "'levels.1.centroids' is missing"),
        ({"values": tree.values[:, :, 1:]}, "shape"),
        ({"num_keys": 21}, "21 keys"),
    ):
        with pytest.raises(ValueError, match=sentence):
            save(tmp_path / "a", dataclasses.replace(tree, **changes))
    assert not os.listdir(tmp_path)


def test_saving_over_a_file(tmp_path, tree, saved):
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_bytes(b"something else")
    link.symlink_to(path)
    old = os.umask(0o027)
    try:
        save(link, tree, {"model": "a/b"})
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert path.read_bytes() == saved  # equal trees give equal files
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["a", "link"]


@pytest.mark.parametrize("where", ["write", "fsync", "replace", "interrupt"])
def test_failed_save_leaves_the_old_file(tmp_path, tree, saved, monkeypatch, where):
    path = tmp_path / "a"
    path.write_bytes(saved)

    def fail(*_):
        raise KeyboardInterrupt if where == "interrupt" else OSError(errno.ENOSPC, "No space left on device")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if where == "write":  # the operating system itself refuses, in the middle of the tensors
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) - 1000, hard))
    else:
        names = {"fsync": (os, "fsync"), "replace": (os, "replace"), "interrupt": (storage, "host_layers")}
        monkeypatch.setattr(*names[where], fail)
    try:
        with pytest.raises(KeyboardInterrupt if where == "interrupt" else OSError):
            save(path, make_tree(calibrated=False, tokens=50))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == saved
    assert_same(load(path), tree)


CHILD = """
import sys, time, jax
jax.config.update("jax_num_cpu_devices", 2)
import squeezejax
from squeezejax.storage import files as storage
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

path, copy = sys.argv[1:]
tree = squeezejax.load(path)
mesh = Mesh(jax.devices(), "model")
spread = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P(None, "model") if leaf.ndim > 2 else P()))
squeezejax.save(copy, jax.tree.map(spread, tree), {"model": "a/b"})

layers, calls = storage.host_layers, []
def slowly(leaf):
    for layer in layers(leaf):
        calls.append(layer)
        if len(calls) == 5:
            print("writing", flush=True)
            time.sleep(600)
        yield layer
storage.host_layers = slowly
squeezejax.save(path, tree)
"""


def test_killed_save_leaves_the_old_file_and_shards_are_gathered(tmp_path, tree, saved):
    """One child process: it saves a tree sharded over two devices, and is killed in the middle of a second save."""
    path, copied = tmp_path / "a", tmp_path / "b"
    path.write_bytes(saved)
    command = [sys.executable, "-c", CHILD, str(path), str(copied)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout.readline() == "writing\n"
        finally:
            child.kill()
    assert copied.read_bytes() == saved
    assert path.read_bytes() == saved
    assert_same(load(path), tree)
    (left,) = set(os.listdir(tmp_path)) - {"a", "b"}
    assert re.fullmatch(r"\.squeezejax-[0-9a-f]{16}\.tmp", left)
    refusal(tmp_path / left)
    save(path, tree)  # a leftover is in nobody's way, and goes
    assert_same(load(path), tree)
    assert set(os.listdir(tmp_path)) == {"a", "b"}


def test_temporaries_of_running_saves_stay(tmp_path, tree, monkeypatch):
    """One save in the middle of another, to the same directory: only what nobody writes any more is swept away."""
    names = [f".squeezejax-{digits * 16}.tmp" for digits in "0f"]
    for name in (*names, ".squeezejax-mine.tmp", "squeezejax.tmp"):
        (tmp_path / name).write_bytes(b"half")
    os.mkdir(tmp_path / ".squeezejax-1111111111111111.tmp")
    layers, running = storage.host_layers, []

    def save_another(leaf):
        if not running:
            running.append(leaf)
            save(tmp_path / "b", tree)
            assert len([name for name in os.listdir(tmp_path) if name.startswith(".squeezejax-")]) == 3
        yield from layers(leaf)

    monkeypatch.setattr(storage, "host_layers", save_another)
    save(tmp_path / "a", tree)
    assert_same(load(tmp_path / "a"), tree)
    assert_same(load(tmp_path / "b"), tree)
    kept = {".squeezejax-mine.tmp", "squeezejax.tmp", ".squeezejax-1111111111111111.tmp"}
    assert set(os.listdir(tmp_path)) == {"a", "b"} | kept


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_a_rewritten_file_is_not_open_to_more_people(tmp_path, tree, monkeypatch, mode):
    path, sync, seen = tmp_path / "a", os.fsync, []
    path.write_bytes(b"x")
    path.chmod(mode)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (seen.append(os.fstat(descriptor).st_mode), sync(descriptor)))
    save(path, tree)
    assert path.stat().st_mode & 0o777 == mode
    assert seen[0] & 0o777 == mode  # nor while it is written


def test_a_full_disk_names_the_file(tmp_path, tree, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path}/a'")):
        save(tmp_path / "a", tree)
