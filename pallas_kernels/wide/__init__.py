"""Plain XLA for accelerators: a few wide launches, where the backend `xla` runs loops that suit a CPU's caches."""
