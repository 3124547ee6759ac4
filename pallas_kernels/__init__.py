"""The array-level work of one attention step: centroid scores, kept rows, attention over them, one file per kernel.

Nothing here knows trees or models; `registry` chooses an implementation, `xla` is plain XLA.
"""
