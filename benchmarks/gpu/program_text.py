"""What a compiled program launches, and the bytes that each launch reads and writes, read from its optimised HLO."""

import math
import re
from typing import NamedTuple

WIDTHS = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "opt-barrier"}
CONTROL = {"conditional", "while", "call"}
# What reads some rows of its operand, not all of it.
PARTIAL = {"dynamic-slice", "gather", "slice"}


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    text: str


class Launch(NamedTuple):
    """One kernel or copy."""

    name: str
    read: int  # bytes; of gathered and sliced arrays, what is taken of them, each once
    written: int


def computations(text: str) -> dict[str, list[Operation]]:
    """The operations of every computation by its name; that of the program is "ENTRY"."""
    found = {}
    for entry, name, body in re.findall(r"^(ENTRY )?%?(\S+) \(.*?\{\n(.*?)^\}", text, flags=re.MULTILINE | re.DOTALL):
        found["ENTRY" if entry else name] = [op for line in body.splitlines() if (op := _operation(line))]
    return found


def _operation(line: str) -> Operation | None:
    match = re.match(r"\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)", line)
    if not match:
        return None
    name, shape, kind, rest = match.groups()
    operands = re.findall(r"%([\w.-]+)", re.split(r"\), |\)$", rest)[0])
    return Operation(name, shape, kind, tuple(operands), line)


def bytes_of(shape: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(WIDTHS.get(dtype, 0) * math.prod(int(n) for n in axes.split(",") if n) for dtype, axes in arrays)


def launches(text: str, taken=(), start: str = "ENTRY") -> list[Launch]:
    """What is launched from a computation on, down the branches `taken` i of one conditional after another."""
    everything, taken, found = computations(text), list(taken), []

    def walk(name: str):
        operations = everything[name]
        shapes = {op.name: op.shape for op in operations}
        for op in operations:
            if op.kind == "conditional":
                walk(_branches(op)[taken.pop(0)])
            elif op.kind == "call":
                walk(re.search(r"to_apply=%([\w.-]+)", op.text)[1])
            elif op.kind not in FREE | CONTROL:
                found.append(Launch(op.name, _read(op, shapes, everything), bytes_of(op.shape)))

    walk(start)
    return found


def _branches(op: Operation) -> list[str]:
    """Of a conditional, by number; of one on a truth value, what it does if false comes first."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", op.text)
    if listed:
        return re.findall(r"%([\w.-]+)", listed[1])
    return [re.search(rf"{truth}_computation=%([\w.-]+)", op.text)[1] for truth in ("false", "true")]


def _read(op: Operation, shapes: dict[str, str], everything) -> int:
    called = re.search(r"calls=%([\w.-]+)", op.text)
    whole = [bytes_of(shapes.get(operand, "")) for operand in op.operands]
    if op.kind in PARTIAL:
        return min(sum(whole), 2 * bytes_of(op.shape))
    if not called:
        return sum(whole)
    inside = everything[called[1]]
    parameters = {int(re.search(r"parameter\((\d+)\)", x.text)[1]): x.name for x in inside if x.kind == "parameter"}
    return sum(min(size, _read_of(parameters[i], inside)) for i, size in enumerate(whole) if i in parameters)


def _read_of(name: str, inside: list[Operation]) -> float:
    """Bytes that a fused computation reads of one of its values."""
    total = 0.0
    for op in inside:
        if name not in op.operands:
            continue
        if op.kind == "bitcast":
            total += _read_of(op.name, inside)
        elif op.kind in PARTIAL and op.operands[0] == name:
            total += bytes_of(op.shape)
        elif op.kind == "scatter" and op.operands[0] == name:
            total += 0  # written over in place
        else:
            return math.inf
    return total


def loops(text: str) -> list[tuple[bool, str]]:
    """Of every loop in the program: whether the compiler knows how often it goes round, and its body's name."""
    lines = [line for line in text.splitlines() if re.search(r" while\(", line)]
    return [("known_trip_count" in line, re.search(r"body=%([\w.-]+)", line)[1]) for line in lines]
