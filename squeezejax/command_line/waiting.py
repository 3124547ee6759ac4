"""Says on standard error what is being waited for, where it takes a while: lines in a log, in place on a terminal."""

import contextlib
import functools
import sys
import threading
import time

PATIENCE = 1.0  # seconds before anything is said
_TICK = 0.2

_compiling = threading.Event()  # whether XLA is at work, in this process


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
    started, said = time.monotonic(), ""
    in_place = stream is not None and stream.isatty()
    while not over.wait(_TICK):
        seconds = time.monotonic() - started
        if seconds < PATIENCE or stream is None:
            continue
        now = f"squeezejax: {what}" + (": compiling, once for this machine" if _compiling.is_set() else "")
        if in_place:
            line = f"{now} … {seconds:.0f} s"
            print("\r" + line.ljust(len(said)), end="", file=stream, flush=True)
            said = line
        elif now != said:
            print(f"{now} …", file=stream, flush=True)
            said = now
    if in_place and said:
        print("\r" + " " * len(said) + "\r", end="", file=stream, flush=True)


@functools.cache
def _listen():
    """Has JAX tell when it begins and ends to compile; once a process, since listeners stay."""
    import jax

    def hear(event: str, *_, **__):
        if event.endswith("jaxpr_to_mlir_module_duration"):  # what comes before compiling has ended
            _compiling.set()
        elif event.endswith("backend_compile_duration"):
            _compiling.clear()

    jax.monitoring.register_event_duration_secs_listener(hear)
