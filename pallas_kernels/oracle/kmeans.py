"""K-means assignment and sums by label in NumPy and float64: what their tests compare with."""

import numpy as np


def nearest(rows, centres):
    """As `kmeans_assign.nearest` with the second, for one head: (labels, best, fallback, second) of rows [S H].

    Where there is only one of centres [C H], fallback is 0 and second −2.
    """
    scores = np.asarray(rows, np.float64) @ np.asarray(centres, np.float64).T
    labels = np.argmax(scores, axis=1)  # of the first one, on a tie
    best = np.max(scores, axis=1)
    np.put_along_axis(scores, labels[:, None], -2.0, axis=1)
    fallback = np.argmax(scores, axis=1)
    return labels, best, fallback, np.max(scores, axis=1)


def segment_sum(values, labels, num_segments: int):
    """As `segment_sums.segment_sum`."""
    sums = np.zeros((num_segments, *np.shape(values)[1:]))
    for value, label in zip(np.asarray(values, np.float64), labels, strict=True):
        sums[label] += value
    return sums
