"""Meshes of forced devices, and what a compiled program sends between them."""

import re

import jax
import numpy as np

import squeezejax


def make_mesh(**axes):
    """A mesh of as many devices as the axes, name=size, multiply to."""
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:count])


def put(mesh, x):
    return jax.device_put(x, squeezejax.shardings(mesh, x))


def sent(compiled):
    """(operation, shapes of its results) of every exchange between devices that moves arrays whole."""
    pattern = r"= (\(.*?\)|\S+) (all-gather|all-to-all|collective-permute|ragged-all-to-all)(?:-start)?\("
    shapes = lambda text: [tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", text)]
    return [(name, shapes(text)) for text, name in re.findall(pattern, compiled.as_text())]
