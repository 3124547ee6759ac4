"""Plain XLA: runs everywhere."""
