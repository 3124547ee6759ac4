"""Builds the API reference from docstrings into a folder; any warning is an error: `python docs/build.py OUT`."""

import sys
import warnings
from pathlib import Path

import pdoc

import squeezejax
import squeezejax.models  # noqa: F401 - documented too

# What the library's own dependencies warn of while they are imported is not about our docstrings.
PAGES = ("squeezejax", "!squeezejax.command_line", "!squeezejax.pallas_kernels.hopper")


def main():
    """Command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    pdoc.render.configure(docformat="google", footer_text="squeezejax, Apache-2.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*PAGES, output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
