"""What the suite compares: METHODS, and ABLATIONS, each a few methods that differ in one thing."""

import dataclasses

from benchmarks.quality import methods
from benchmarks.quality.methods import CONFIG, squeezed
from benchmarks.quality.rules import SCORES, rule
from squeezejax import SqueezeConfig

FLAT, TWO = methods.METHODS["squeezed_flat"], methods.METHODS["squeezed"]
DEFAULT = methods.METHODS["squeezed_default"]


def _tree(*fractions: float, **changes) -> SqueezeConfig:
    """The paper's method with other clusters."""
    return dataclasses.replace(CONFIG, cluster_fractions=fractions, **changes)


def _default(name: str, **changes) -> methods.Method:
    """The library's default with something changed."""
    return squeezed(name, dataclasses.replace(methods.DEFAULT, **changes))


# Four times as many centroids as usual, in a quarter of the bits, which take as many bytes.
FINE = squeezed("squeezed_fine", _tree(0.2, index_bits=4))
_FINE_LEVELS = _tree(0.05, 0.2, index_bits=4, coarse_margin=8)
FINE_TWO = squeezed("squeezed_fine_two", _FINE_LEVELS)
FINE_TWO_TAIL = squeezed("squeezed_fine_two_tail", _FINE_LEVELS, tail=True)
FINE_TAIL = squeezed("squeezed_fine_tail", FINE.config, tail=True)

METHODS = methods.METHODS | {method.name: method for method in (FINE, FINE_TWO, FINE_TAIL, FINE_TWO_TAIL)}

ABLATIONS = {  # the first is what the others are compared to
    "thresholds": (FLAT, *(rule(f"a threshold a {scope}", scope=scope) for scope in ("layer", "head"))),
    "window": (FLAT, *(squeezed(f"window of {W}", _tree(0.05, observation_window=W)) for W in (0, 16, 50, 200))),
    "selection": (
        FLAT,
        *(squeezed(f"question in blocks of {n}", flat=True, question_block=n) for n in (8, 1)),
    ),
    "centroids": (FLAT, *(squeezed(f"{100 * f:g} % centroids", _tree(f)) for f in (0.0125, 0.025, 0.1))),
    "depth": (TWO, FLAT, squeezed("0.25 % → 1 % → 5 %", _tree(0.0025, 0.01, 0.05))),
    "coarse_margin": (TWO, *(squeezed(f"margin {m}", _tree(0.01, 0.05, coarse_margin=m)) for m in (2, 8, 16))),
    "score": (
        FLAT,
        *(rule(f"score by {name}", score=name) for name in SCORES if name != "centroid"),
        squeezed("score by variance", _tree(0.05, score="variance")),
    ),
    "bits": (
        FLAT,
        *(squeezed(f"5 % centroids in {bits} bits", _tree(0.05, index_bits=bits)) for bits in (8, 4)),
        squeezed("10 % centroids in 8 bits", _tree(0.1, index_bits=8)),
        FINE,
        FINE_TWO,
        FINE_TAIL,
        FINE_TWO_TAIL,
    ),
    "steps": (FLAT, *(squeezed(f"a selection for {n} tokens", flat=True, steps=n) for n in (2, 3))),
    "sinks": (FLAT, squeezed("sinks always kept", _tree(0.05, sinks=methods.SINKS))),
    "default": (
        DEFAULT,
        _default("default, keys in 1 bit", key_bits=1),
        _default("default, keys in 4 bits", key_bits=4),
        methods.METHODS["squeezed_default_clusters"],
        _default("default, centroids in 8 bits", index_bits=8),
        _default("default, 10 % centroids", cluster_fractions=(0.1,)),
        _default("default, 1 % → 5 %", cluster_fractions=(0.01, 0.05)),
        _default("default, no sinks", sinks=0),
        _default("default, clusters by cosine", cluster_metric="cosine"),
        _default("default, clustered all at once", cluster_segment=None),
        *(_default(f"default, coarse levels lose {100 * loss:g} %", coarse_loss=loss) for loss in (0.01, 0.02, 0.1)),
    ),
}
