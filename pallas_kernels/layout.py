"""How queries lie: tokens with their heads grouped, as models give them, and lanes, as backends take them.

A *lane* is a set of query rows that share one selection and one key/value head: for user b and head k the M = T·G rows
of T tokens and the G query heads that share head k.
"""


def split_heads(q, num_kv_heads: int):
    """q [B T N H] -> [B T K G H]: query heads grouped under the key/value head that they share."""
    B, T, N, H = q.shape
    return q.reshape(B, T, num_kv_heads, N // num_kv_heads, H)


def to_lanes(x):
    """x [B T K G …] -> [B K T·G …]."""
    B, T, K, G = x.shape[:4]
    return x.swapaxes(1, 2).reshape(B, K, T * G, *x.shape[4:])


def from_lanes(x, group: int):
    """x [B K T·G …] -> [B T K G …], the inverse of `to_lanes` for G = group."""
    B, K, M = x.shape[:3]
    return x.reshape(B, K, M // group, group, *x.shape[3:]).swapaxes(1, 2)
