"""A build that is interrupted goes on at the last finished layer, to the same tree; other builds are refused."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from squeezejax import SqueezeConfig, squeeze
from squeezejax.offline import unfinished
from squeezejax.storage import files as storage

LAYERS = 3
CONFIG = SqueezeConfig.paper(cluster_fractions=(0.07, 0.2), observation_window=6, kmeans_iterations=1)
TOKENS = np.random.default_rng(0).integers(0, 31, 66)


@pytest.fixture(scope="module", params=[jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def params(request):
    return oracle.make_model(num_layers=LAYERS, dtype=request.param)


@pytest.fixture(scope="module")
def whole(params):
    return squeeze(params, TOKENS, CONFIG)


def interrupt(params, folder, after=2, tokens=TOKENS):
    """A build into `folder` that ends when `after` layers are finished."""

    def stop(progress):
        if progress.stage == f"layer {after + 1}/{LAYERS}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        squeeze(params, tokens, CONFIG, progress=stop, checkpoint=folder)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_build_goes_on_to_the_same_tree(params, whole, tmp_path, after):
    folder, seen = tmp_path / "build", []
    interrupt(params, folder, after)
    assert sorted(path.name for path in folder.glob("layer*")) == [f"layer-000{i}.tree" for i in range(after)]
    tree = squeeze(params, TOKENS, CONFIG, progress=seen.append, checkpoint=folder)
    assert jax.tree.structure(tree) == jax.tree.structure(whole)
    chex.assert_trees_all_equal(tree, whole)
    assert not os.listdir(tmp_path)
    assert seen[0].stage == f"layer {after + 1}/{LAYERS}"
    # What the first run did counts as done, but says nothing of this one's speed.
    assert seen[0].skipped == pytest.approx(seen[0].total * after / LAYERS)
    assert seen[0].remaining > 0
    assert seen[-1].seconds["checkpoints"] > 0


CHILD = """
import os, signal, sys
import numpy as np
import oracle
from squeezejax import SqueezeConfig, squeeze

folder, sync = sys.argv[1], os.fsync
def sync_or_die(descriptor):
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if name.endswith(".tmp") and os.path.exists(f"{folder}/layer-0001.tree"):
        finished = np.load(f"{folder}/state.npz")["num_layers"]
        if finished == 2:  # a third layer's file is written, and does not have its name yet
            os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = sync_or_die
config = SqueezeConfig.paper(cluster_fractions=(0.07, 0.2), observation_window=6, kmeans_iterations=1)
squeeze(oracle.make_model(num_layers=3), np.random.default_rng(0).integers(0, 31, 66), config, checkpoint=folder)
"""


def test_a_killed_build_goes_on_to_the_same_tree(tmp_path):
    """SIGKILL while the third layer's file is being written: two are finished, and half a file is left behind."""
    folder = tmp_path / "build"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.path.dirname(oracle.__file__)}
    command = [sys.executable, "-c", CHILD, str(folder)]
    child = subprocess.run(command, env=environment, timeout=300, check=False)
    assert child.returncode == -signal.SIGKILL
    layers = sorted(path.name for path in folder.glob("layer*"))
    assert layers == ["layer-0000.tree", "layer-0001.tree"]
    assert list(folder.glob(".squeezejax-*.tmp"))
    params = oracle.make_model(num_layers=LAYERS)
    tree = squeeze(params, TOKENS, CONFIG, checkpoint=folder)
    chex.assert_trees_all_equal(tree, squeeze(params, TOKENS, CONFIG))
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """(params, a folder with an interrupted build)."""
    folder = tmp_path_factory.mktemp("half") / "build"
    params = oracle.make_model(num_layers=LAYERS)
    interrupt(params, folder, 1)
    return params, folder


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("part", ["context", "configuration", "seeds", "model", "dtype"])
def test_another_build_is_refused(half, part):
    params, folder = half
    kept = listing(folder)
    tokens, config, key = TOKENS, CONFIG, None
    if part == "context":
        tokens = TOKENS[::-1]
    if part == "configuration":
        config = dataclasses.replace(CONFIG, kmeans_iterations=2)
    if part == "seeds":
        key = jax.random.key(9)
    if part in ("model", "dtype"):
        params = oracle.make_model(seed=1, num_layers=LAYERS, dtype=jnp.float16 if part == "dtype" else jnp.float32)
    with pytest.raises(ValueError, match=f"unfinished build that differs in .*{part}"):
        squeeze(params, tokens, config, key=key, checkpoint=folder)
    assert listing(folder) == kept


@pytest.mark.parametrize("name", ["layer-0000.tree", "state.npz"])
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_damage_is_refused(half, tmp_path, name, damage):
    params, folder = half
    shutil.copytree(folder, tmp_path / "build")
    file = tmp_path / "build" / name
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-300])
    elif damage == "altered":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    if (name, damage) == ("state.npz", "missing"):  # killed before the first layer was finished: from the start
        tree = squeeze(params, TOKENS, CONFIG, checkpoint=tmp_path / "build")
        chex.assert_trees_all_equal(tree, squeeze(params, TOKENS, CONFIG))
    else:
        with pytest.raises(ValueError, match=r"build: remove|remove .* to build anew"):
            squeeze(params, TOKENS, CONFIG, checkpoint=tmp_path / "build")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ValueError, match="something else than an unfinished build"):
        squeeze(oracle.make_model(num_layers=LAYERS), TOKENS, CONFIG, checkpoint=tmp_path)
    assert os.listdir(tmp_path) == ["precious"]


def test_only_what_the_build_wrote_is_removed(half, tmp_path):
    params, folder = half
    shutil.copytree(folder, tmp_path / "build")
    (tmp_path / "build" / "notes").write_text("x")
    squeeze(params, TOKENS, CONFIG, checkpoint=tmp_path / "build")
    assert os.listdir(tmp_path / "build") == ["notes"]


# ---- Builds that are mixed up


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(params, {name: folder with 2 of 3 layers finished}): two contexts of one length."""
    params, folders = oracle.make_model(num_layers=LAYERS), {}
    for name, tokens in (("one", TOKENS), ("other", TOKENS[::-1])):
        folders[name] = tmp_path_factory.mktemp(name) / "build"
        interrupt(params, folders[name], 2, tokens)
    return params, folders


@pytest.mark.parametrize("source", ["another build", "another layer", "a tree"])
def test_layers_of_another_build_are_refused(two, tmp_path, source):
    params, folders = two
    folder = shutil.copytree(folders["one"], tmp_path / "build")
    if source == "another build":
        shutil.copy(folders["other"] / "layer-0001.tree", folder)
    elif source == "another layer":
        shutil.copy(folder / "layer-0000.tree", folder / "layer-0001.tree")
    else:
        storage.save(folder / "layer-0001.tree", storage.load(folder / "layer-0001.tree"), {"layer": "1"})
    with pytest.raises(ValueError, match=r"layer-0001.tree is of another build, or another layer: remove .*build to"):
        squeeze(params, TOKENS, CONFIG, checkpoint=folder)
    assert (folder / "state.npz").exists()


@pytest.mark.parametrize("forgery", ["fewer layers", "more layers", "no layers", "too few queries", "other states"])
def test_forged_states_are_refused(two, tmp_path, forgery):
    params, folders = two
    folder = shutil.copytree(folders["one"], tmp_path / "build")
    with np.load(folder / "state.npz") as state:
        content = dict(state)
    if forgery.endswith("layers"):
        content["num_layers"] = {"fewer": 1, "more": LAYERS + 1, "no": 0}[forgery.split()[0]]
    if forgery in ("fewer layers", "too few queries"):
        content["queries"] = content["queries"][:1]
    if forgery == "other states":
        with np.load(folders["other"] / "state.npz") as state:
            content["x"] = state["x"]
    np.savez(folder / "state.npz", **content)
    with pytest.raises(ValueError, match=r"state.npz is damaged: remove .*build to build anew"):
        squeeze(params, TOKENS, CONFIG, checkpoint=folder)


def test_one_build_at_a_time(two, tmp_path):
    params, _ = two
    refusals = []

    def start_another(_):
        with pytest.raises(ValueError, match=r"another build is running in .*build: wait for it") as error:
            squeeze(params, TOKENS, CONFIG, checkpoint=tmp_path / "build")
        refusals.append(error)
        with pytest.raises(ValueError, match="another build is running"):
            unfinished.check_free(tmp_path / "build")

    tree = squeeze(params, TOKENS, CONFIG, progress=start_another, checkpoint=tmp_path / "build")
    assert refusals
    chex.assert_trees_all_equal(tree, squeeze(params, TOKENS, CONFIG))
    assert not os.listdir(tmp_path)


def test_the_folder_stays_until_the_tree_is_saved(two, tmp_path):
    params, folders = two
    folder = shutil.copytree(folders["one"], tmp_path / "build")

    def fail(_):
        assert len(list(folder.glob("layer-*.tree"))) == LAYERS
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        squeeze(params, TOKENS, CONFIG, checkpoint=folder, finished=fail)
    unfinished.check_free(folder)
    seen, stages = [], []
    tree = squeeze(params, TOKENS, CONFIG, checkpoint=folder, finished=seen.append, progress=stages.append)
    assert seen == [tree]
    assert [progress.stage for progress in stages] == ["calibrating", "done"]  # no layer was built again
    assert stages[0].remaining == 0
    chex.assert_trees_all_equal(tree, squeeze(params, TOKENS, CONFIG))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("where", ["layer-0000.tree", "state.npz"])
def test_a_full_disk_leaves_no_empty_folder(two, tmp_path, monkeypatch, where):
    sync = os.fsync

    def fail(descriptor):
        if (where == "state.npz") == (tmp_path / "build" / "layer-0000.tree").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"No space left on device: .*{where}"):
        squeeze(two[0], TOKENS, CONFIG, checkpoint=tmp_path / "build")
    assert not os.listdir(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(two, tmp_path):
    (tmp_path / "build").write_text("x")
    with pytest.raises(ValueError, match="is a file where the folder"):
        squeeze(two[0], TOKENS, CONFIG, checkpoint=tmp_path / "build")


def test_models_in_memory_are_told_apart_by_their_weights():
    one, other = oracle.make_model(0), oracle.make_model(1)
    assert unfinished._identity(one) == unfinished._identity(oracle.make_model(0)) != unfinished._identity(other)
