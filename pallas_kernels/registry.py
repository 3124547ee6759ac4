"""Which implementation runs: a name means that one or an error, `None` picks the best that has proved itself.

"xla" is plain XLA and runs everywhere. "mosaic" is the Hopper kernels, for decode, prefill and K-means. They have been
interpreted and compiled for an H200, but never run on one: where `None` would choose them (a Hopper GPU, JAX ≥ 0.11,
shapes that they take), they first have to agree with float64 there, once for each size.
"""

import concurrent.futures
import contextlib
import functools
import warnings

import jax

IMPLEMENTATIONS = ("xla", "mosaic")
AUTO = "auto"  # what `None` means on a Hopper GPU

_forced = False


def resolve(implementation: str | None) -> str:
    """What a request asks for: "xla", "mosaic", or AUTO, the kernels wherever they can and have proved themselves.

    Raises ValueError for an unknown name, NotImplementedError for one that cannot run here.
    """
    if implementation is None:
        return "xla" if _missing() else AUTO
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "mosaic" and (reason := _missing()):
        raise NotImplementedError(f"implementation='mosaic' {reason}; use None or 'xla'")
    return implementation


def decode_kernels(implementation: str, q, keys, *other_keys, split: bool = False):
    """The module of decode kernels for one token a user, q [B 1 N H], over keys [L K R H]; None means plain XLA.

    other_keys are the window's and the users' own; split says that devices share the context.
    Raises NotImplementedError where "mosaic" was named and cannot take these arrays.
    """
    if implementation == "xla":
        return None
    from squeezejax.pallas_kernels.hopper import decode  # imports Mosaic, which older JAX lacks

    def check():
        decode.check(q, keys, *other_keys)
        if split:
            raise NotImplementedError("the decode kernels take a context that lies on one device")

    sizes = q.shape[3], q.shape[2] // keys.shape[1], str(q.dtype)
    return decode if _chosen(implementation, check, "decode_step", *sizes) else None


def prefill_kernels(implementation: str, q, keys, *, split: bool = False):
    """The module of prefill kernels for several tokens a user, q [B T N H], over keys [L K R H]; None: plain XLA.

    Raises NotImplementedError where "mosaic" was named and cannot take these arrays.
    """
    if implementation == "xla":
        return None
    from squeezejax.pallas_kernels.hopper import prefill

    def check():
        prefill.check(q, keys)
        if split:
            raise NotImplementedError("the prefill kernels take a context that lies on one device")

    return prefill if _chosen(implementation, check, "prefill_blocks", q.shape[3], str(q.dtype)) else None


def assignment_kernel(implementation: str, head_dim: int):
    """The function that finds the nearest K-means centres (kmeans_assign.py); None means plain XLA.

    Raises NotImplementedError where "mosaic" was named and cannot take rows of this head size.
    """
    if implementation == "xla":
        return None
    from squeezejax.pallas_kernels.hopper import kmeans_assign

    check = functools.partial(kmeans_assign.check, head_dim)
    return kmeans_assign.nearest if _chosen(implementation, check, "assignment", head_dim) else None


def _chosen(implementation: str, check, proof: str, *sizes) -> bool:
    """Whether kernels that `check` says can run are to run: always where named, for AUTO if they are proved.

    `proof` names a function of self_check.py, which compares them with float64, twice in a row.
    """
    try:
        check()
    except NotImplementedError:
        if implementation == AUTO:
            return False
        raise
    if implementation != AUTO:
        return True
    from squeezejax.pallas_kernels.hopper import self_check

    return proved(getattr(self_check, proof), *sizes)


@functools.cache
def proved(check, *sizes) -> bool:
    """Whether check(*sizes), a small run at first use that raises if it comes out wrong, passes on this machine.

    If it does not, there is one warning, and plain XLA serves.
    """
    try:
        # A thread of its own traces nothing, so this runs now, whatever the caller is tracing.
        # (ensure_compile_time_eval would evaluate operations inside the kernels, too.)
        with concurrent.futures.ThreadPoolExecutor(1) as apart:
            apart.submit(check, *sizes).result()
    except Exception as error:  # whatever goes wrong in an untried kernel or library, XLA still can
        warnings.warn(
            f"{check.__module__}.{check.__name__} failed on this machine, so plain XLA runs instead: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


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
