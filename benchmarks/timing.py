"""One timer for every benchmark: interleaved runs, median and spread, a description of the machine.

Differences between contenders mean something only if all met the same machine: one run of each in turn, again and
again, so that a busy minute hits all of them. Needs no package beyond the standard library, so that it also runs
where a competitor is installed and JAX is not.
"""

import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs, in the order in which they were made."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest less fastest, as a fraction of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def ratio(self, other: "Timing") -> float:
        """How many times longer this takes than other: the median over rounds, each compared within itself."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def once(call: Callable):
    """(seconds, result) of one call, JAX's asynchronous results waited for."""
    start = time.perf_counter()
    result = call()
    if "jax" in sys.modules:
        result = sys.modules["jax"].block_until_ready(result)
    return time.perf_counter() - start, result


def interleaved(calls: Mapping[str, Callable], rounds: int = 5, warm_up: int = 1) -> dict[str, Timing]:
    """Time every call `rounds` times, in turn; the first `warm_up` rounds compile and are not counted."""
    seconds = {name: [once(call)[0] for _ in range(warm_up)] for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(once(call)[0])
    return {name: Timing(tuple(all_of[warm_up:])) for name, all_of in seconds.items()}


def machine(*packages: str) -> dict:
    """What the numbers depend on; `packages` adds versions of those installed here."""
    versions = {}
    for package in ("jax", "numpy", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # processes that want a core, last minute
        "devices": [str(d.device_kind) for d in sys.modules["jax"].devices()] if "jax" in sys.modules else [],
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
