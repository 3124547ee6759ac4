"""Kinds of numbers on the command line, each with the sentence that refuses others (argparse names the option)."""

import argparse
import math

MESH_AXES = ("data", "model", "context")  # those of `squeezejax.shardings`, here without waiting for JAX


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = number(text)
    if not 0 <= value <= 1:
        hint = f"; for {value:g} % write {value / 100:g}" if 1 < value <= 100 else ""
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}{hint}")
    return value


def fractions(text: str) -> tuple[float, ...]:
    """Numbers from 0 to 1 with commas between them."""
    return tuple(fraction(part) for part in text.split(","))


def not_negative(text: str) -> float:
    """A number of at least 0."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def at_least(least: int):
    """The kind "whole number, no less than `least`"."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return parse


def count_or_none(text: str) -> int | None:
    """A whole number of at least 1, or None for the word `none`."""
    return None if text.lower() == "none" else at_least(1)(text)


def mesh(text: str) -> tuple[tuple[str, int], ...]:
    """Axes of a mesh and their sizes, `data=1,model=8`."""
    axes = []
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or name in dict(axes):
            raise argparse.ArgumentTypeError(f"must be axes {', '.join(MESH_AXES)} with sizes, model=8, got {text!r}")
        axes.append((name, at_least(1)(size)))
    return tuple(axes)
