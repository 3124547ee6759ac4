"""Everything to learn from a visit to a Hopper GPU; see benchmarks/gpu/visit.py: `python -m benchmarks.gpu_visit`."""

import sys

from benchmarks.gpu.visit import main

if __name__ == "__main__":
    sys.exit(main())
