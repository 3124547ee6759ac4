"""How far a build has come, what is left, and where its time went."""

import contextlib
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping

import jax


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a build has come; `done` and `total` are estimated floating-point operations."""

    stage: str  # what is being done; "done" comes last
    done: float
    total: float
    elapsed: float  # seconds
    skipped: float = 0.0  # part of `done` that an earlier, interrupted run did
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by kind of work, finished pieces only

    @property
    def remaining(self) -> float:
        """Seconds to go, were the rest as fast as what this run did; ∞ before it has done anything."""
        if self.done >= self.total:
            return 0.0
        done = self.done - self.skipped
        return self.elapsed * (self.total - self.done) / done if done else float("inf")


class Reporter:
    """Turns the finished work of a build's layers, each of `layer_work` operations, into `Progress`."""

    def __init__(self, num_layers: int, layer_work: float, progress: Callable[[Progress], None] | bool | None):
        self._show = Bar() if progress is True else progress or None
        self._layers, self._layer_work = num_layers, layer_work
        self._started = time.monotonic()
        self._skipped = 0.0
        self._seconds = Counter()

    @contextlib.contextmanager
    def spend(self, kind: str):
        """Counts the block's time as `kind`; the block waits for its own results."""
        started = time.monotonic()
        yield
        self._seconds[kind] += time.monotonic() - started

    def skip(self, layers: int):
        """The first layers come from an earlier run."""
        self._skipped = layers * self._layer_work

    def layer(self, index: int, work: float, wait_for):
        """`work` operations of layer `index` are done once `wait_for` is there."""
        if self._show is not None:
            jax.block_until_ready(wait_for)  # else the clock would measure the dispatch of work, not the work
        self.tell(f"layer {index + 1}/{self._layers}", index * self._layer_work + work)

    def tell(self, stage: str, done: float | None = None):
        """Shows a stage, by default one that follows all layers."""
        if self._show is not None:
            total = self._layers * self._layer_work
            done, elapsed = total if done is None else done, time.monotonic() - self._started
            self._show(Progress(stage, done, total, elapsed, self._skipped, dict(self._seconds)))


class Bar:
    """Draws a bar on standard error; where that is no terminal, writes a line now and then instead."""

    def __init__(self, seconds: float = 30.0):
        """`seconds`: how long a log waits for its next line, at least."""
        self._seconds, self._told = seconds, 0.0

    def __call__(self, progress: Progress):
        """Shows one report."""
        done = progress.stage == "done"
        fraction = progress.done / progress.total
        rest = f"{progress.elapsed:.1f} s" if done else f"{progress.stage}, {progress.remaining:.0f} s left"
        if sys.stderr is not None and sys.stderr.isatty():
            bar = "█" * round(30 * fraction)
            end = "\n" if done else ""
            print(f"\rsqueezing {bar:░<30} {fraction:4.0%}  {rest}          ", end=end, file=sys.stderr, flush=True)
        elif done or progress.elapsed - self._told >= self._seconds:
            self._told = progress.elapsed
            print(f"squeezing {fraction:4.0%}  {rest}", file=sys.stderr, flush=True)
