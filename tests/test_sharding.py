"""Many devices, forced on the host: processes of their own, since a process cannot change how many it has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "eight_devices"


@pytest.mark.parametrize("checks", sorted(file.stem for file in FOLDER.glob("*.py")))
def test_on_eight_devices(checks):
    # Unoptimised code compiles in two thirds of the time.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", str(FOLDER / f"{checks}.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
