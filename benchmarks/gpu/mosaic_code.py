"""What Mosaic's code of a compiled kernel says: which warpgroups reduce across their warps, and through which bytes.

Mosaic reserves one piece of shared memory a CTA for such reductions, and gives it to every warpgroup: two of them that
reduce at once overwrite each other's numbers, between barriers that only order the warps of one. No interpreter sees
it, and a GPU not always. Here it is read from the code itself, as it stands once every array has its layout.
"""

import re
from typing import NamedTuple

WARPGROUP = 128  # threads


class Reduction(NamedTuple):
    """A reduction across the warps of a warpgroup."""

    line: int  # of the code
    warpgroups: tuple[int, ...]  # that come to it
    begin: int  # bytes of shared memory that it may use, [begin, end)
    end: int


def shared_scratch(code: str) -> list[str]:
    """What is wrong with a kernel: reductions of different warpgroups through the same bytes, as sentences."""
    found, wrong = reductions(code), []
    for i, one in enumerate(found):
        if len(one.warpgroups) > 1:
            wrong.append(
                f"line {one.line}: warpgroups {one.warpgroups} all reduce through bytes {one.begin} to {one.end}"
            )
        for other in found[i + 1 :]:
            apart = one.end <= other.begin or other.end <= one.begin
            if not apart and set(one.warpgroups) != set(other.warpgroups):
                wrong.append(
                    f"lines {one.line} and {other.line}: warpgroups {one.warpgroups} and {other.warpgroups} reduce "
                    f"through bytes {max(one.begin, other.begin)} to {min(one.end, other.end)}"
                )
    return wrong


def reductions(code: str) -> list[Reduction]:
    """All reductions across warps, of the text that Mosaic dumps as `after_layout_inference`."""
    values: dict[str, list] = {}  # of numbers, warpgroup by warpgroup, as far as they are known
    within: list[list] = []  # [indentation, the switch's value, cases seen, the case that this is] of open branches
    found, num_warpgroups = [], _num_warpgroups(code)
    for number, line in enumerate(code.splitlines(), 1):
        indent = len(line) - len(line.lstrip())
        while within and indent <= within[-1][0] and not re.match(r" *(case \d+|default) \{| *\}$", line):
            within.pop()
        if switch := re.search(r"scf\.index_switch (%\w+)", line):
            within.append([indent, values.get(switch[1]), [], None])
        elif branch := re.match(r" *(?:case (\d+)|(default)) \{", line):
            within[-1][3] = "default" if branch[2] else int(branch[1])
            within[-1][2].append(within[-1][3])
        elif "scf.if" in line:
            raise NotImplementedError(f"line {number} branches in a way that this does not read: {line.strip()[:80]}")
        if (layout := re.search(r"vector\.(multi_)?reduction <", line)) and _crosses_warps(line, bool(layout[1])):
            offset, size = (int(re.search(rf"{name} = (\d+) : i32", line)[1]) for name in ("offset", "scratch_size"))
            reaching = [w for w in range(num_warpgroups) if all(_taken(*branch[1:], w) for branch in within)]
            found.append(Reduction(number, tuple(reaching), offset, offset + size))
        _define(line, values, num_warpgroups)
    return found


def num_blocks(code: str) -> int:
    """CTAs of a kernel whose grid has one axis."""
    return _launched(code, "blocks")


def _num_warpgroups(code: str) -> int:
    return _launched(code, "threads") // WARPGROUP


def _launched(code: str, what: str) -> int:
    launch = re.search(rf"gpu\.launch .*\b{what}\(.*?\) in \(%\S+ = (%\S+),", code)
    return int(re.search(rf"^ *{launch[1]} = arith\.constant (\d+) : index", code, flags=re.MULTILINE)[1])


def _taken(value, cases, case, warpgroup: int) -> bool:
    """Whether a warpgroup may take a case of a switch."""
    if value is None or value[warpgroup] is None:
        return True
    return value[warpgroup] not in cases[:-1] if case == "default" else value[warpgroup] == case


def _crosses_warps(line: str, is_matrix: bool) -> bool:
    """Whether a reduction's numbers lie in several warps that have to exchange them."""
    layout = re.search(r"in_layouts = \[#mosaic_gpu\.(\w+)<(.*)", line)
    if layout[1] != "TiledLayout":
        return layout[1] != "WGSplatFragLayout"
    tiling, warps = re.match(r"\[(\[.*?\])\], warp_dims = \[(.*?)\], lane_dims", layout[2]).groups()
    tiles = [[int(n) for n in tile.split(",")] for tile in re.findall(r"\[([\d, ]+)\]", tiling)]
    owners = list(range(len(tiles[0])))  # the axis of the array that each axis of its tiles is a piece of
    for tile in tiles[1:]:
        owners += owners[-len(tile) :]
    axes = re.search(r"\[(\d+)\] : vector<", line)
    reduced = {int(axes[1])} if is_matrix else set(owners)
    return any(owners[int(warp)] in reduced for warp in re.findall(r"(?<!times = )-\d+", warps))


def _define(line: str, values: dict, num_warpgroups: int):
    """Takes note of the number that a line defines, or forgets one whose name it uses anew."""
    defined = re.match(r" *(%[\w-]+)(?::\d+)? = (\S+) ?(.*)", line)
    if not defined:
        return
    name, operation, rest = defined.groups()
    operands = re.findall(r"%[\w-]+", rest)
    known = [values.get(x, [None] * num_warpgroups) for x in operands]
    values.pop(name, None)
    if operation == "arith.constant" and (constant := re.match(r"(-?\d+|true|false) ?(:|$)", rest)):
        value = {"true": 1, "false": 0}.get(constant[1])
        values[name] = [int(constant[1]) if value is None else value] * num_warpgroups
    elif operation == "arith.shrui" and all(x == 7 for x in known[1]):
        values[name] = list(range(num_warpgroups))  # a thread's number over 128
    elif operation in ("arith.extui", "arith.index_cast"):
        values[name] = known[0]
    elif operation == "nvvm.shfl.sync":
        values[name] = known[1]
    elif operation == "arith.cmpi":
        compare = COMPARISONS[re.match(r"\w+", rest)[0]]
        values[name] = [None if None in pair else int(compare(*pair)) for pair in zip(*known, strict=True)]


COMPARISONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b, "sle": lambda a, b: a <= b, "sgt": lambda a, b: a > b, "sge": lambda a, b: a >= b,
    "ult": lambda a, b: a < b, "ule": lambda a, b: a <= b, "ugt": lambda a, b: a > b, "uge": lambda a, b: a >= b,
}  # fmt: skip
