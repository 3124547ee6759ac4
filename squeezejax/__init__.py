"""Ask many questions of one long, fixed context: Squeezed Attention (arXiv 2411.09688) in JAX.

params = squeezejax.models.load("path/to/checkpoint")
tree = squeezejax.squeeze(params, context_tokens)
answer = squeezejax.generate(params, tree, question_tokens)
"""

import importlib

from squeezejax import exporting as _exporting  # noqa: F401 - registers our pytrees with jax.export
from squeezejax.append import append
from squeezejax.attention import attend
from squeezejax.calibrate import calibrate, log_thresholds
from squeezejax.config import SqueezeConfig
from squeezejax.estimate import add_value_centroids
from squeezejax.generate import Generation, State, decode, dense_generate, generate, prefill
from squeezejax.kmeans import KMeans, kmeans
from squeezejax.parts import split_context
from squeezejax.plan import Plan, plan
from squeezejax.progress import Progress
from squeezejax.select import Selection, select
from squeezejax.sharding import shardings
from squeezejax.squeeze import squeeze
from squeezejax.storage import Header, TreeFileError, load, read_header, save
from squeezejax.tree import Level, Tree, build_tree

__all__ = [
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
    "split_context",
    "squeeze",
]


def __getattr__(name: str):
    # `squeezejax.models` without an import of its own, though nothing here imports it: models import the core.
    if name == "models":
        return importlib.import_module("squeezejax.models")
    raise AttributeError(f"module 'squeezejax' has no attribute {name!r}")
