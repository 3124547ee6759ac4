"""One context, many entries at many budgets: a record each.

A budget is a fraction of the bytes of dense keys and values in 16 bits ("bytes", index included) or of keys ("keys").
The setting that meets it is searched for on dense attention's own queries at the places that are measured, so that at
equal budgets nothing but the choice of keys differs, not how well thresholds were calibrated; what was kept and read in
the end is on record. "asked" records are the library at its configuration's sparsity, as it comes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality.measure import weights_of
from benchmarks.quality.methods import Fixed
from benchmarks.real import kvzip, needles, passes
from benchmarks.real.entries import Entry
from benchmarks.real.passes import Asked, Compared, Read, Told
from squeezejax import SqueezeConfig

PROBES = 32  # places whose queries find settings
SEARCH = 12  # halvings
RANGES = {"sparsity": (0.0, 9.5), "mass": (0.0, 9.5), "score": (-32.0, 0.0)}  # as `setting_at` maps them


@dataclasses.dataclass(eq=False)
class Material:
    """A context that was read once, with what is asked after it, and its views by configuration."""

    params: object
    ids: list[int]
    asked: Asked
    answers: list[np.ndarray]  # of every question: its places in `asked.at` that have to be right
    encode: Callable
    decode: Callable

    @functools.cached_property
    def context(self) -> Read:
        """Read densely, with the queries of the longest window."""
        return passes.read(self.params, self.ids, 200)

    @functools.cached_property
    def dense(self) -> Told:
        """What dense attention tells, and its queries."""
        fixed = self.fixed(SqueezeConfig(), passes.SINKS)
        index = fixed.cache.keys[:, :, :, 0]
        return passes.tell(self.params, fixed.cache, index, None, self.asked, choose=passes.everything)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a view holds a copy of the keys: few are kept
    def fixed(self, config: SqueezeConfig, sinks: int) -> Fixed:
        """The context with a configuration's window and so many first tokens out of the choice."""
        return passes.divide(self.context, config, sinks, weights_of(self.params, len(self.ids)))

    @functools.cache  # noqa: B019
    def repeated(self):
        """KVzip's log scores f32[L K n] of all keys."""
        return kvzip.scores(self.params, self.encode, self.decode, self.context, self.ids)


def continuation(params, ids: list[int], length: int, encode, decode) -> Material:
    """A text of which `length` tokens are squeezed and the others follow one by one, the last one as gold only."""
    fed, T = ids[length:], len(ids) - length - 1
    at = np.arange(T)
    asked = Asked(
        jnp.asarray([fed[:T]], jnp.int32), jnp.ones((1, T), bool), at, jnp.asarray(fed[1:], jnp.int32), some(at)
    )
    return Material(params, ids[:length], asked, [at], encode, decode)


def questions(params, haystack: needles.Haystack, encode, decode) -> Material:
    """A context with needles: every question a row, and predictions wanted where its answer is fed."""
    rows = [ask + answer for ask, answer in zip(haystack.questions, haystack.answers, strict=True)]
    T = -(-max(len(row) - 1 for row in rows) // 16) * 16  # few lengths are compiled
    tokens, valid = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), bool)
    at, gold, answers = [], [], []
    for row, (ids, answer) in enumerate(zip(rows, haystack.answers, strict=True)):
        tokens[row, : len(ids) - 1], valid[row, : len(ids) - 1] = ids[:-1], True
        places = [row * T + len(ids) - len(answer) - 1 + i for i in range(len(answer))]
        # A blank before the value says nothing of whether it was found.
        counted = [i for i, token in enumerate(answer) if decode([token]).strip()]
        answers.append(len(at) + np.array(counted))
        at, gold = at + places, gold + answer
    P = -(-len(at) // 16) * 16
    filled = lambda x: jnp.asarray(x + [x[-1]] * (P - len(x)), jnp.int32)
    asked = Asked(jnp.asarray(tokens), jnp.asarray(valid), filled(at), filled(gold), some(np.array(at)))
    return Material(params, haystack.ids, asked, answers, encode, decode)


def some(at: np.ndarray) -> np.ndarray:
    """PROBES of the places, evenly spread."""
    return at[np.linspace(0, len(at) - 1, PROBES).round().astype(int)]


# ---- Budgets


def setting_at(kind: str, x: float) -> float:
    """The setting at x; larger x keep fewer keys. Sparsities come closer to 1 by equal ratios."""
    return {"sparsity": -math.expm1(-x), "mass": math.exp(-x), "score": x}[kind]


def find_setting(entry: Entry, fixed: Fixed, index, queries, match: str, budget: float) -> float | None:
    """The setting that meets a budget on queries f32[L P N H]; None where the index alone takes more."""
    spend = lambda setting: passes.spend(index, entry.knob(fixed, index, setting), queries, choose=entry.choose)
    which = 1 if match == "bytes" else 0
    if entry.kind == "keys":
        nothing = [float(x) for x in spend(0.0)]
        left = budget - (nothing[1] if match == "bytes" else 0.0)
        return left if left > 0 else None
    low, high = RANGES[entry.kind]
    if float(spend(setting_at(entry.kind, high))[which]) > budget:
        return None
    for _ in range(SEARCH):
        middle = (low + high) / 2
        over = float(spend(setting_at(entry.kind, middle))[which]) > budget
        low, high = (middle, high) if over else (low, middle)
    return setting_at(entry.kind, high)


# ---- Records


def run(material: Material, entry: Entry, fixed: Fixed, index, setting: float) -> dict:
    """The numbers of one entry at one setting."""
    knob = entry.knob(fixed, index, setting)
    told = passes.tell(material.params, fixed.cache, index, knob, material.asked, choose=entry.choose)
    return numbers(material, told)


def numbers(material: Material, told: Told) -> dict:
    """What a record holds of a pass."""
    found = passes.compare(material.dense.log_probabilities, told.log_probabilities, material.asked.gold)
    found = Compared(*map(np.asarray, found))
    counted = np.concatenate(material.answers)
    lost = jax.tree.map(lambda x: np.asarray(x, np.float64)[:, counted], told.lost)
    mean = lambda x: float(np.mean(x))
    record = {
        "kl": mean(found.kl[counted]),
        "kl_median": float(np.median(found.kl[counted])),
        "same": mean(found.same[counted]),
        "loss": mean(found.loss[counted]),
        "right": [mean(found.right[places]) for places in material.answers],
        "exact": [bool(np.all(found.right[places])) for places in material.answers],
        "kl_each": [mean(found.kl[places]) for places in material.answers],
    }
    for name in ("kept", "read", "missed", "error"):
        record[name] = mean(getattr(lost, name))
    heads = {name: np.mean(getattr(lost, name), axis=1) for name in ("kept", "missed", "estimated", "sinks")}
    if not np.isnan(heads["estimated"]).any():
        record["estimated"] = mean(heads["estimated"])
    else:
        del heads["estimated"]
    return record | {"heads": {name: np.round(x, 4).tolist() for name, x in heads.items()}}
