"""Measurements; see notes/ for what each was predicted and found to be."""
