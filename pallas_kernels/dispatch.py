"""Which implementation runs: a name means that one or an error, `None` picks the best that has proved itself.

"xla" is plain XLA and runs everywhere. "mosaic" is the Hopper kernels: decode steps run by them, prefill still as
"xla". They have been interpreted and compiled for an H200, but never run on one, so `None` does not choose them yet.
"""

import contextlib

import jax

IMPLEMENTATIONS = ("xla", "mosaic")

_forced = False


def resolve(implementation: str | None) -> str:
    """The implementation to use for a request, "xla" or "mosaic".

    Raises ValueError for an unknown name, NotImplementedError for one that cannot run here.
    """
    if implementation is None:
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "mosaic" and (reason := _missing()):
        raise NotImplementedError(f"implementation='mosaic' {reason}; use None or 'xla'")
    return implementation


def decode_kernels(implementation: str, q, keys, levels):
    """The module of decode kernels for one token a user, q [B K G H] over keys [L K R H]; None means plain XLA.

    Raises NotImplementedError where "mosaic" was named and cannot take these arrays.
    """
    if implementation == "xla":
        return None
    from squeezejax.pallas_kernels import decode  # imports Mosaic, which older JAX lacks

    decode.check(q, keys, levels)
    return decode


def assignment_kernel(implementation: str, head_dim: int):
    """The function that finds the nearest K-means centres (kmeans_assign.py); None means plain XLA.

    Raises NotImplementedError where "mosaic" was named and cannot take rows of this head size.
    """
    if implementation != "mosaic":
        return None
    from squeezejax.pallas_kernels import kmeans_assign  # imports Mosaic, which older JAX lacks

    kmeans_assign.check(head_dim)
    return kmeans_assign.nearest


@contextlib.contextmanager
def force_mosaic():
    """Lets "mosaic" be chosen without a GPU: for the interpreter and for compiling without a device."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def _missing() -> str | None:
    """Why the Hopper kernels cannot run here, as the end of a sentence; None if they can."""
    if jax.__version_info__ < (0, 11):
        return f"needs JAX 0.11 or later, and this is {jax.__version__}"
    if _forced:
        return None
    device = jax.devices()[0]
    if device.platform != "gpu" or not str(getattr(device, "compute_capability", "")).startswith("9."):
        return f"needs a Hopper GPU, and this is {device.device_kind}"
    return None
