"""Builds the API reference from docstrings into a folder; any warning is an error: `python docs/build.py OUT`."""

import sys
import warnings
from pathlib import Path

import pdoc

import squeezejax
import squeezejax.models  # noqa: F401 - documented too

# What is meant to be called, and what a backend of somebody else's needs.
PAGES = (
    "squeezejax",
    "squeezejax.models",
    "squeezejax.models.config",
    "squeezejax.models.llama",
    "squeezejax.pallas_kernels.interface",
    "squeezejax.pallas_kernels.registry",
)


def main():
    """Command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    pdoc.render.configure(docformat="google", footer_text="squeezejax, Apache-2.0")
    # Only here: what other packages warn of while they are imported is not about our docstrings.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*PAGES, output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
