"""Every kernel once more in NumPy and float64, sharing no helper: what tests compare with."""
