"""LongBench, RULER and sets of many questions about one document, on real checkpoints: dense and squeezed attention."""
