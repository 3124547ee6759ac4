"""How a context is squeezed: one frozen, hashable value that validates itself."""

import dataclasses
import itertools
import math
import numbers


@dataclasses.dataclass(frozen=True)
class SqueezeConfig:
    """Everything that decides what a tree looks like and how it is read.

    Raises ValueError, naming the field, for values that make no sense.
    """

    cluster_fractions: tuple[float, ...] = (0.01, 0.05)  # clusters per clustered key, coarse → fine; one entry = flat
    observation_window: int = 100  # W, last tokens of the context: never clustered, always attended, calibrate T
    sparsity: float = 0.9  # default fraction of clustered keys to drop; any other can be asked for at call time
    coarse_margin: float = 4.0  # the coarsest level keeps coarse_margin · (1 − sparsity) of the calibration keys
    query_block: int | None = 128  # user tokens that share one selection in prefill; None = all of them
    kmeans_iterations: int = 7  # Lloyd steps, those between swaps counted
    kmeans_tolerance: float = 0.0  # relative gain in inertia below which Lloyd steps stop early
    kmeans_swap_rounds: int = 5  # how many of the Lloyd steps, the first ones, are followed by swaps
    # Finest clusters end at multiples of so many rows, which kernels fetch together. None = 8 for 16-bit keys, which
    # kernels read, where clusters have 16 keys or more on average; else 1, any size.
    cluster_granule: int | None = None
    cluster_cap: float | None = None  # the largest finest cluster, as a multiple of the mean size; None = any

    def __post_init__(self):
        # Lists come from JSON headers and command lines; a tuple keeps the config hashable.
        object.__setattr__(self, "cluster_fractions", tuple(float(f) for f in self.cluster_fractions))
        fractions = self.cluster_fractions
        least = {"observation_window": 0, "query_block": 1, "kmeans_iterations": 0, "kmeans_swap_rounds": 0}
        for name, smallest in (least | {"cluster_granule": 1}).items():
            value, optional = getattr(self, name), name in ("query_block", "cluster_granule")
            if value is None and optional:
                continue
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if value >= 2**31:
                raise ValueError(f"{name} must be below 2³¹")
            if value < smallest:
                raise ValueError(f"{name} must be at least {smallest}{' or None' if optional else ''}, got {value}")
        if not fractions or not all(0 < f <= 1 for f in fractions):
            raise ValueError(f"cluster_fractions must be fractions in (0, 1], coarse → fine, got {fractions}")
        if any(coarse >= fine for coarse, fine in itertools.pairwise(fractions)):
            raise ValueError(f"cluster_fractions must increase from coarse to fine, got {fractions}")
        for name in ("sparsity", "coarse_margin", "kmeans_tolerance", "cluster_cap"):
            value = getattr(self, name)
            real = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not real and not (value is None and name == "cluster_cap"):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if math.isnan(self.sparsity):
            raise ValueError("sparsity must be a number, got NaN")
        if not 1 <= self.coarse_margin < math.inf:
            raise ValueError(f"coarse_margin must be at least 1 and finite, got {self.coarse_margin}")
        if not self.kmeans_tolerance >= 0:
            raise ValueError(f"kmeans_tolerance must be at least 0, got {self.kmeans_tolerance}")
        if self.cluster_cap is not None and not 1 <= self.cluster_cap < math.inf:
            raise ValueError(f"cluster_cap must be at least 1 and finite, or None, got {self.cluster_cap}")

    @property
    def num_levels(self) -> int:
        """Levels of the centroid hierarchy."""
        return len(self.cluster_fractions)

    def num_clusters(self, num_keys: int) -> tuple[int, ...]:
        """C of each level for S = num_keys clustered keys, coarse → fine: max(1, ⌊fraction · S⌋)."""
        # The guard keeps 0.29 · 100 = 28.999… from losing a cluster to rounding.
        return tuple(max(1, math.floor(fraction * num_keys + 1e-9)) for fraction in self.cluster_fractions)
