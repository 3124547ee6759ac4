"""The repository, which a parent folder on the path makes look like the package, where the clone is named like it.

Where squeezejax is installed, that is imported in place of this folder.
"""

import importlib.machinery
import importlib.util
import os
import sys


def _installed():
    """Where the installed package lies, or None."""
    above = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    elsewhere = [folder for folder in sys.path if os.path.abspath(folder) != above]
    for finder in sys.meta_path:
        spec = finder.find_spec(__name__, elsewhere if finder is importlib.machinery.PathFinder else None)
        if spec is not None and spec.origin is not None and not os.path.samefile(spec.origin, __file__):
            return spec
    return None


if __name__ == "squeezejax":
    spec = _installed()
    if spec is None:
        raise ImportError(
            f"{os.path.dirname(__file__)} is squeezejax's repository, not the package: run "
            f"`pip install -e {os.path.dirname(__file__)}` first"
        )
    package = importlib.util.module_from_spec(spec)
    sys.modules[__name__] = package
    spec.loader.exec_module(package)
