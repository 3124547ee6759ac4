"""Ask many questions of one long, fixed context: Squeezed Attention (arXiv 2411.09688) in JAX.

params = squeezejax.models.load("path/to/checkpoint")
tree = squeezejax.squeeze(params, context_tokens)
answer = squeezejax.generate(params, tree, question_tokens)
"""

import importlib

try:
    importlib.import_module("squeezejax.pallas_kernels")
except ModuleNotFoundError as error:
    if error.name != "squeezejax.pallas_kernels":
        raise
    raise ImportError(
        f"{__path__[0]} is squeezejax's source, whose parts come together when it is installed: run "
        f"`pip install -e {__path__[0]}/..`, or start from another folder if it is installed already"
    ) from None

from squeezejax import text
from squeezejax.config import SqueezeConfig
from squeezejax.mesh.parts import split_context
from squeezejax.mesh.sharding import shardings
from squeezejax.offline.append import append
from squeezejax.offline.build import build_tree
from squeezejax.offline.calibrate import calibrate
from squeezejax.offline.kmeans import KMeans, kmeans
from squeezejax.offline.progress import Progress
from squeezejax.offline.squeeze import squeeze
from squeezejax.offline.thresholds import expected_missed_mass, log_thresholds, sparsity_for
from squeezejax.online.attention import attend
from squeezejax.online.estimate import add_value_centroids
from squeezejax.online.generate import Generation, State, decode, dense_generate, generate, prefill
from squeezejax.online.reading import Estimate
from squeezejax.online.select import Selection, select
from squeezejax.plan import Plan, plan
from squeezejax.storage import exporting as _exporting  # noqa: F401 - registers our pytrees with jax.export
from squeezejax.storage import flax_state as _flax_state  # noqa: F401 - and with flax.serialization
from squeezejax.storage.files import Header, TreeFileError, load, read_header, save
from squeezejax.tree import Level, Tree

__version__ = "0.1.0"

__all__ = [
    "Estimate",
    "Generation",
    "Header",
    "KMeans",
    "Level",
    "Plan",
    "Progress",
    "Selection",
    "SqueezeConfig",
    "State",
    "Tree",
    "TreeFileError",
    "add_value_centroids",
    "append",
    "attend",
    "build_tree",
    "calibrate",
    "decode",
    "dense_generate",
    "expected_missed_mass",
    "generate",
    "kmeans",
    "load",
    "log_thresholds",
    "plan",
    "prefill",
    "read_header",
    "save",
    "select",
    "shardings",
    "sparsity_for",
    "split_context",
    "squeeze",
    "text",
]


def __getattr__(name: str):
    # `squeezejax.models` without an import of its own, though nothing here imports it: models import the core.
    if name == "models":
        return importlib.import_module("squeezejax.models")
    raise AttributeError(f"module 'squeezejax' has no attribute {name!r}")
