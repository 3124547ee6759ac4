"""First-use proofs: untried code runs once at a small size, beside what it is compared with, before it is used."""

import concurrent.futures
import functools
import warnings


@functools.cache
def proved(check, *arguments) -> bool:
    """Whether check(*arguments), a small run at first use that raises if it comes out wrong, passes on this machine.

    If it does not, there is one warning, and the next backend serves.
    """
    try:
        # A thread of its own traces nothing, so this runs now, whatever the caller is tracing.
        # (ensure_compile_time_eval would evaluate operations inside the kernels, too.)
        with concurrent.futures.ThreadPoolExecutor(1) as apart:
            apart.submit(check, *arguments).result()
    except Exception as error:  # whatever goes wrong in an untried kernel or library, XLA still can
        warnings.warn(
            f"{check.__qualname__}{arguments} failed on this machine, so plain XLA runs instead: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
