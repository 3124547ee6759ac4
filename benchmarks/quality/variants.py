"""What the suite compares: METHODS, and ABLATIONS, each a few methods that differ in one thing."""

import dataclasses

from benchmarks.quality import methods
from benchmarks.quality.methods import CONFIG
from benchmarks.quality.rules import SCORES, Calibration, rule
from squeezejax import SqueezeConfig

FLAT, TWO = methods.METHODS["squeezed_flat"], methods.METHODS["squeezed"]


def _tree(*fractions: float, window: int = CONFIG.observation_window) -> SqueezeConfig:
    return dataclasses.replace(CONFIG, cluster_fractions=fractions, observation_window=window)


# Four times as many centroids as usual, in a quarter of the bits: they take as many bytes (NOTES.md, Quality).
FINE = rule("squeezed_fine", bits=4, config=_tree(0.2))
_FINE_LEVELS = {"bits": 4, "levels": 2, "config": _tree(0.05, 0.2), "calibration": Calibration(margin=8)}
FINE_TWO = rule("squeezed_fine_two", **_FINE_LEVELS)
FINE_TWO_TAIL = rule("squeezed_fine_two_tail", tail=True, **_FINE_LEVELS)
FINE_TAIL = rule("squeezed_fine_tail", bits=4, tail=True, config=_tree(0.2))

METHODS = methods.METHODS | {method.name: method for method in (FINE, FINE_TWO, FINE_TAIL, FINE_TWO_TAIL)}

ABLATIONS = {  # the first is what the others are compared to
    "thresholds": (
        FLAT,
        rule("a threshold a layer", calibration=Calibration(scope="layer")),
        rule("a threshold a head", calibration=Calibration(scope="head")),
    ),
    "window": (FLAT, *(rule(f"window of {W}", config=_tree(0.05, window=W)) for W in (0, 16, 50, 200))),
    "calibration": (FLAT, rule("calibrated a query", calibration=Calibration(samples="query"))),
    "selection": (FLAT, *(rule(f"question in blocks of {n}", question_block=n) for n in (8, 1))),
    "centroids": (FLAT, *(rule(f"{100 * f:g} % centroids", config=_tree(f)) for f in (0.0125, 0.025, 0.1))),
    "depth": (TWO, FLAT, rule("0.25 % → 1 % → 5 %", levels=3, config=_tree(0.0025, 0.01, 0.05))),
    "coarse_margin": (TWO, *(rule(f"margin {m}", levels=2, calibration=Calibration(margin=m)) for m in (2, 8, 16))),
    "score": (FLAT, *(rule(f"score by {name}", score=name) for name in SCORES if name != "centroid")),
    "bits": (
        FLAT,
        *(rule(f"5 % centroids in {bits} bits", bits=bits) for bits in (8, 4)),
        rule("10 % centroids in 8 bits", bits=8, config=_tree(0.1)),
        FINE,
        FINE_TWO,
        FINE_TAIL,
        FINE_TWO_TAIL,
    ),
    "steps": (FLAT, *(rule(f"a selection for {n} tokens", steps=n) for n in (2, 3))),
    "sinks": (FLAT, rule("sinks always kept", sinks=True)),
}
