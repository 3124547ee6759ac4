"""Programs in processes of their own: a kernel that hangs ends by timeout, and takes no test with it."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
# NPROC is the size of XLA's thread pool: with two threads, on a small machine, the interpreter's warpgroups, which wait
# for one another there, sometimes wait for ever.
OPTIONS = {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
# An interpreted kernel is compiled for a quarter of its time, and hardly slower if that is done without care.
INTERPRETING = OPTIONS | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def run_python(*arguments, timeout: float = 600, options=OPTIONS) -> subprocess.CompletedProcess:
    """Python with these arguments, its output as text; on the CPU."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | options,
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def run_checks(program, *names, timeout: float = 600):
    """Interpreted checks of a program: they pass, and the interpreter's race detection has nothing to say."""
    run = run_python(program, *names, timeout=timeout, options=INTERPRETING)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "RACE DETECTED" not in run.stdout, run.stdout[:3000]
