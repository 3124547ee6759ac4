"""What `jax.export` needs to write down programs that take or give our pytrees: their static fields as JSON.

    answer = lambda params, tree, tokens: squeezejax.generate(params, tree, tokens, implementation="xla")
    exported = jax.export.export(jax.jit(answer), platforms=("cpu", "cuda", "tpu"))(params, tree, tokens)
    file.write(exported.serialize())  # needs the package flatbuffers

Another process imports squeezejax and squeezejax.models, which register their types here, and calls
`jax.export.deserialize(bytearray(data)).call(params, tree, tokens)`. JAX compares the static fields: a program made for
one model refuses another. Arguments may be `jax.ShapeDtypeStruct`s when exporting.
"""

import dataclasses
import json
import operator
from collections.abc import Mapping

from jax import export

from squeezejax.config import SqueezeConfig
from squeezejax.online.generate import Generation, State
from squeezejax.tree import Level, Tree

_STATIC_TYPES: dict[str, type] = {}  # by name: the only types that a file may ask for, besides JSON's own


def register_static(*types: type):
    """Lets dataclasses, and mappings made from a dict, be static fields, or parts of them, in an exported program."""
    _STATIC_TYPES.update((kind.__name__, kind) for kind in types)


def register_nodes(*types: type):
    """Lets pytree nodes be arguments and results of an exported program. They must be registered with JAX before."""
    for node in types:
        export.register_pytree_node_serialization(
            node,
            serialized_name=f"{node.__module__}.{node.__qualname__}",
            serialize_auxdata=lambda static: json.dumps(_to_json(static)).encode(),
            deserialize_auxdata=lambda data: _from_json(json.loads(data)),
        )


def _to_json(value):
    """Tuples as lists; a registered type as an object with its name and its contents."""
    name = type(value).__name__
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    if _STATIC_TYPES.get(name) is type(value):
        items = value if isinstance(value, Mapping) else vars(value)
        return {name: {key: _to_json(item) for key, item in items.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return operator.methodcaller("item")(value)  # NumPy's numbers


def _from_json(value):
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    ((name, items),) = value.items()
    items = {key: _from_json(item) for key, item in items.items()}
    kind = _STATIC_TYPES[name]
    return kind(**items) if dataclasses.is_dataclass(kind) else kind(items)


register_static(SqueezeConfig)
register_nodes(Tree, Level, State, Generation)
