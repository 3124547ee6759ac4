"""Measurements; see NOTES.md for what each was predicted and found to be."""
