"""Our pytrees for `flax.serialization`: their arrays by field; static fields come from the target, as flax has it."""

import dataclasses

from flax import serialization

from squeezejax.online.generate import Generation, State
from squeezejax.tree import Level, Tree


def _arrays(node) -> list[str]:
    return [field.name for field in dataclasses.fields(node) if not field.metadata.get("static")]


def _to_state(node) -> dict:
    return {name: serialization.to_state_dict(getattr(node, name)) for name in _arrays(node)}


def _from_state(node, state: dict):
    found = {
        name: serialization.from_state_dict(getattr(node, name), state[name], name=name)
        for name in _arrays(node)
        if name in state  # one that was written before a field was added
    }
    return dataclasses.replace(node, **found)


for _kind in (Tree, Level, State, Generation):
    serialization.register_serialization_state(_kind, _to_state, _from_state)
