"""Says on standard error what is being waited for, where it takes a while: lines in a log, in place on a terminal."""

import contextlib
import functools
import sys
import threading
import time

PATIENCE = 1.0  # seconds before anything is said
_TICK = 0.2


class _Compiler:
    """When XLA last began to compile in this process; None while it does not."""

    since: float | None = None


@contextlib.contextmanager
def waiting_for(what: str):
    """While the block runs, and after it has taken a second, `what` is said, such as "loading the model"."""
    _listen()
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(what, over, sys.stderr), daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _tell(what: str, over: threading.Event, stream):
    started, said = time.monotonic(), [""]
    in_place = stream is not None and stream.isatty()
    while not over.wait(_TICK):
        now, compiling = time.monotonic(), _Compiler.since
        if now - started < PATIENCE or stream is None:
            continue
        line = f"squeezejax: {what}"
        if compiling is not None and now - compiling >= PATIENCE:  # less: it was found in the cache
            line += ": compiling, once for this machine"
        if in_place:
            line += f" … {now - started:.0f} s"
            print("\r" + line.ljust(len(said[-1])), end="", file=stream, flush=True)
            said.append(line)
        elif line not in said:
            print(f"{line} …", file=stream, flush=True)
            said.append(line)
    if in_place:
        print("\r" + " " * len(said[-1]) + "\r", end="", file=stream, flush=True)


@functools.cache
def _listen():
    """Has JAX tell when it begins and ends to compile; once a process, since listeners stay."""
    import jax

    def hear(event: str, *_, **__):
        if event.endswith("jaxpr_to_mlir_module_duration"):  # what comes before compiling has ended
            _Compiler.since = time.monotonic()
        elif event.endswith("backend_compile_duration"):
            _Compiler.since = None

    jax.monitoring.register_event_duration_secs_listener(hear)
