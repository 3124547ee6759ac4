"""Which implementation runs: `None` picks the best that applies, a name means that one or an error."""

IMPLEMENTATIONS = ("xla", "mosaic")


def resolve(implementation: str | None) -> str:
    """The implementation to use for a request.

    Raises ValueError for an unknown name, NotImplementedError for one that cannot run here.
    """
    if implementation is None or implementation == "xla":
        return "xla"
    if implementation in IMPLEMENTATIONS:
        raise NotImplementedError(f"implementation={implementation!r} has no kernels yet; use None or 'xla'")
    raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}")
