"""JAX's persistent compilation cache for the command line: a program compiled once starts at once the next time."""

import hashlib
import os
import platform
from pathlib import Path

MOST_BYTES = 2 << 30  # then what was not used for longest goes


def keep_compiled(wanted: bool = True):
    """Keeps compiled programs in a folder of the user's own, unless JAX was told another folder, or not to.

    JAX's own settings go first: JAX_COMPILATION_CACHE_DIR names the folder, JAX_ENABLE_COMPILATION_CACHE=0 is off.
    """
    import jax

    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.jax_compilation_cache_dir is None and (folder := _folder()) is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
        # Small programs too (JAX's own least is a second of compiling): there are a dozen of them in a question.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _folder() -> Path | None:
    """The folder, made if need be; None where there is no place for it, or where others could write into it."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "squeezejax" / f"compiled-{_machine()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        ours = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
        return folder if ours and os.access(folder, os.W_OK) else None  # compiled programs are run as they are
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None


def _machine() -> str:
    """A name for this kind of processor: programs for one may not run on another, and home folders are shared."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            kind = sorted({line for line in file if line.startswith(("model name", "flags", "Features"))})
    except OSError:
        kind = []
    return hashlib.sha256("".join([platform.machine(), *kind]).encode()).hexdigest()[:12]
