"""How a context is squeezed: one frozen, hashable value that validates itself."""

import dataclasses
import itertools
import math
import numbers

FALLBACK_QUERIES = 100  # calibration queries when there is no observation window


@dataclasses.dataclass(frozen=True)
class SqueezeConfig:
    """Everything that decides what a tree looks like and how it is read.

    Raises ValueError, naming the field, for values that make no sense.
    """

    cluster_fractions: tuple[float, ...] = (0.05,)  # clusters per clustered key, coarse → fine; one entry = flat
    sinks: int = 4  # first tokens of the context: never clustered, always attended (docs/method.md, Sinks)
    observation_window: int = 100  # W, last tokens of the context: never clustered, always attended, calibrate T
    sparsity: float = 0.9  # default fraction of clustered keys to drop; any other can be asked for at call time
    # What is near in the clustering: "slow" = Euclidean, of centred keys in which dimensions that RoPE turns fast count
    # little; "cosine" = the paper's.
    cluster_metric: str = "slow"
    # How clusters are scored: "variance" = with a term for their spread, all on the scale of one denominator in which
    # sinks count; "mean" = the paper's, every level normalised by itself (docs/method.md, The index).
    score: str = "variance"
    index_bits: int = 4  # 32, 16, 8 or 4: what a number of a centroid is stored and scored in
    key_bits: int = 2  # 1, 2 or 4: codes of single keys are the finest level; 0 = none, whole clusters are kept
    coarse_loss: float = 0.05  # score "variance": share of what the finest level keeps that levels above may lose
    coarse_margin: float = 4.0  # score "mean": the coarsest level keeps margin · (1 − sparsity) of calibration keys
    # 8: clustered keys and values are stored and read in 8 bits, each row with a scale of its own; sinks and window are
    # as the model gives them. 16: all are as the model gives them, also where that is 32 bits.
    cache_bits: int = 16
    query_block: int | None = 128  # user tokens that share one selection in prefill; None = all of them
    # Keys are clustered in runs of about so many tokens, each by itself: time grows with the context, not with its
    # square. None = all at once.
    cluster_segment: int | None = 1024
    kmeans_iterations: int = 4  # Lloyd steps, those between swaps counted
    kmeans_tolerance: float = 0.0  # relative gain in inertia below which Lloyd steps stop early
    kmeans_swap_rounds: int = 2  # how many of the Lloyd steps, the first ones, are followed by swaps
    # Finest clusters end at multiples of so many rows, which kernels fetch together. None = 8 for 16-bit keys, which
    # kernels read, where clusters have 16 keys or more on average; else 1, any size.
    cluster_granule: int | None = None
    cluster_cap: float | None = None  # the largest finest cluster, as a multiple of the mean size; None = any

    @classmethod
    def paper(cls, **changes) -> "SqueezeConfig":
        """The paper's method as it stands, with any field changed: a baseline that stays, whatever becomes the default.

        No sinks, cosine K-means, plain float32 means as centroids, scores without further terms, every level normalised
        by itself, clusters of 1 % and 5 % of the keys, margin 4.
        """
        fields = {
            "cluster_fractions": (0.01, 0.05),
            "sinks": 0,
            "cluster_metric": "cosine",
            "score": "mean",
            "index_bits": 32,
            "key_bits": 0,
            "cluster_segment": None,
            "kmeans_iterations": 7,
            "kmeans_swap_rounds": 5,
        }
        return cls(**{**fields, **changes})

    def __post_init__(self):
        # Lists come from JSON headers and command lines; a tuple keeps the config hashable.
        object.__setattr__(self, "cluster_fractions", tuple(float(f) for f in self.cluster_fractions))
        fractions = self.cluster_fractions
        least = {"sinks": 0, "observation_window": 0, "query_block": 1, "kmeans_iterations": 0, "kmeans_swap_rounds": 0}
        for name, smallest in (least | {"cluster_granule": 1, "cluster_segment": 2}).items():
            value, optional = getattr(self, name), name in ("query_block", "cluster_granule", "cluster_segment")
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
        choices = {"cluster_metric": ("slow", "cosine"), "score": ("variance", "mean")}
        choices |= {"index_bits": (32, 16, 8, 4), "key_bits": (0, 1, 2, 4), "cache_bits": (16, 8)}
        for name, allowed in choices.items():
            if isinstance(getattr(self, name), bool) or getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        if self.key_bits and self.score == "mean":
            raise ValueError("codes of keys need score='variance': give key_bits=0 with score='mean'")
        if not 0 <= self.coarse_loss < 1:
            raise ValueError(f"coarse_loss must be at least 0 and below 1, got {self.coarse_loss}")
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

    @property
    def num_thresholds(self) -> int:
        """Thresholds of one selection: one a level, and one for single keys where they have codes."""
        return self.num_levels + bool(self.key_bits)

    @property
    def calibration_tokens(self) -> int:
        """Query tokens whose mean gives the thresholds of blocks: the window's, or as many as serve without one."""
        return self.observation_window or FALLBACK_QUERIES

    @property
    def always_read(self) -> int:
        """Tokens that are never clustered: sinks and window."""
        return self.sinks + self.observation_window

    def num_clusters(self, num_keys: int) -> tuple[int, ...]:
        """C of each level for S = num_keys clustered keys, coarse → fine: max(1, ⌊fraction · S⌋)."""
        # The guard keeps 0.29 · 100 = 28.999… from losing a cluster to rounding.
        return tuple(max(1, math.floor(fraction * num_keys + 1e-9)) for fraction in self.cluster_fractions)
