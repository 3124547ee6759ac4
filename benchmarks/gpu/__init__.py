"""What a visit to a Hopper GPU measures (`python -m benchmarks.gpu_visit`), and compiling for one without it."""
