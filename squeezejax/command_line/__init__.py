"""The command `squeezejax`; alone in `squeezejax/` it may import models."""
