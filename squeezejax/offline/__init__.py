"""Once per context: read it, cluster its keys, calibrate thresholds; the result is a `Tree`."""
