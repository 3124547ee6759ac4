"""Which backend runs: a name means that one or an error, `None` picks the first that can and has proved itself."""

import contextlib
import math
from typing import NamedTuple

from squeezejax.pallas_kernels.hopper.backend import Hopper
from squeezejax.pallas_kernels.interface import Backend, Layout
from squeezejax.pallas_kernels.proof import proved
from squeezejax.pallas_kernels.wide.backend import Wide
from squeezejax.pallas_kernels.xla.backend import Xla

AUTO = "auto"  # what `None` means where a backend that is better than plain XLA may run

_hopper, _wide = Hopper(), Wide()
_backends: list[Backend] = [_hopper, _wide, Xla()]  # best first


def register(backend: Backend):
    """Makes a backend known, before all others: `implementation=None` then prefers it wherever it can run."""
    _backends.insert(0, backend)


def names() -> tuple[str, ...]:
    """What `implementation=` may name."""
    return tuple(sorted({backend.name for backend in _backends}, reverse=True))


def layout(dtype) -> Layout:
    """How the rows of a cache should lie, so that every known backend can take it, wherever the tree is built."""
    wanted = [backend.layout(dtype) for backend in _backends]
    return Layout(max(layout.granule for layout in wanted), math.lcm(*(layout.row_multiple for layout in wanted)))


def resolve(implementation: str | None) -> str:
    """What a request asks for: the name of a backend that can run here, or AUTO.

    Raises ValueError for an unknown name, NotImplementedError for one that cannot run here.
    """
    able = [backend.name for backend in _backends if backend.missing() is None]
    if implementation is None:
        return able[0] if len(able) == 1 else AUTO
    if implementation not in names():
        raise ValueError(f"implementation must be None or one of {names()}, got {implementation!r}")
    if implementation not in able:
        reason = next(backend.missing() for backend in _backends if backend.name == implementation)
        raise NotImplementedError(f"implementation={implementation!r} {reason}; use None or 'xla'")
    return implementation


def preferred() -> str:
    """The first backend that can run on this machine: what `None` begins with."""
    return next(backend.name for backend in _backends if backend.missing() is None)


class Surveyed(NamedTuple):
    """What there is to know of a backend on this machine."""

    name: str
    missing: str | None  # why it does not run here, as the end of a sentence; None: it does
    checked: str  # how it is known to be right


def survey() -> list[Surveyed]:
    """All backends, best first."""
    of = lambda backend: Surveyed(backend.name, backend.missing(), getattr(backend, "checked", "not said"))
    return [of(backend) for backend in _backends]


def choose(implementation: str, task: str, *arguments) -> Backend:
    """The backend for a task, a method of `Backend`, with arguments as its `check` takes them.

    `implementation` comes from `resolve`. Raises NotImplementedError where the one that was named cannot do this, or
    where none can.
    """
    refusal = None
    for backend in _backends:
        if implementation not in (AUTO, backend.name) or backend.missing() is not None:
            continue
        try:
            sizes = backend.check(task, *arguments)
        except NotImplementedError as error:
            refusal = error
            continue
        if implementation != AUTO or sizes is None or proved(backend.prove, task, sizes):
            return backend
    raise refusal or NotImplementedError(f"no backend can {task} here")


def may_run(name: str, implementation: str) -> bool:
    """Whether a backend may be chosen for what `resolve` gave."""
    return implementation == name or (
        implementation == AUTO and any(backend.name == name and backend.missing() is None for backend in _backends)
    )


@contextlib.contextmanager
def force_mosaic():
    """Lets "mosaic" be chosen without a GPU: for the interpreter and for compiling without a device."""
    with _forced(_hopper):
        yield


@contextlib.contextmanager
def force_wide():
    """Lets "wide" be chosen on a CPU, and by `None`: for tests and for compiling without a device."""
    with _forced(_wide):
        yield


@contextlib.contextmanager
def _forced(backend):
    before, backend.forced = backend.forced, True
    try:
        yield
    finally:
        backend.forced = before
