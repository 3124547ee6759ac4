"""Many devices: where every array lies, and trees in parts."""
