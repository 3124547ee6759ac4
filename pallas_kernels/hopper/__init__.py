"""Mosaic kernels for Hopper GPUs."""
