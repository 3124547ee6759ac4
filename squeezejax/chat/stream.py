"""Answers token by token over one squeezed context: what `ask` does between reading ids and printing text."""

import copy
import dataclasses
import itertools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.arguments import on_device
from squeezejax.online.fallback import why_dense
from squeezejax.online.generate import State, draw, prefill, read_one
from squeezejax.online.reading import reading_of
from squeezejax.online.sampling import sampling_of
from squeezejax.tree import Tree

ROOM = 512  # rows of a cache, or a multiple: fewer shapes than `prefill` would make of it by itself


@dataclasses.dataclass(frozen=True)
class Options:
    """How replies are made."""

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # strings at which a reply ends; they are not part of it
    stop_tokens: tuple[int, ...] = ()  # ids after which a reply ends, besides the model's own
    sparsity: float | None = None  # None = the tree's
    dense: bool = False  # every key is read, by the same program: the answer to compare with
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None  # above 1 makes tokens of question and reply less likely to come again
    seed: int = 0
    implementation: str | None = None  # None = the best, and dense attention where selecting cannot pay

    def __post_init__(self):
        strings = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop must be strings that are not empty, such as stop=('\\n',), got {self.stop!r}")
        if self.dense and self.sparsity is not None:
            raise ValueError("dense=True reads every key, so it has no sparsity")
        object.__setattr__(self, "stop", strings)
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))

    @property
    def reading(self) -> dict:
        """As arguments of `prefill` and `reading_of`: what is read of the context. Sparsity 0 is dense attention."""
        return {"sparsity": 0.0 if self.dense else self.sparsity, "implementation": self.implementation}

    @property
    def sampling(self) -> dict:
        """As arguments of `sampling_of`: how tokens are drawn."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}


@dataclasses.dataclass
class Stats:
    """What one reply took."""

    seconds: float = 0.0  # from the question's first token to the reply's last
    kept: float = 0.0  # kept fraction of the clustered keys, mean over the reply's tokens that were read
    prefill_kept: float = 0.0  # the same while reading the question


class Session:
    """One conversation over a tree. Whoever calls says every time what all ids after the context are to be."""

    def __init__(self, params, tree: Tree, options: Options):
        self._params, self._tree, self.options = params, tree, options
        self._state: State | None = None
        self._ids: list[int] = []  # what the state holds
        self._replies = 0
        self.stats = Stats()  # of the latest reply

    def reply(self, ids: list[int]) -> Iterator[int]:
        """Reads ids, all that follows the context up to the reply, and yields the reply's tokens, a stop token too.

        What the state holds already, from earlier turns, is not read again: it goes back to where ids first differ.
        A token is read after it has been given out, so that nobody waits for the next one's program to see the first.
        """
        started = time.perf_counter()
        self._read(ids)
        options = self.options
        prefill_kept = _number(self._state.kept_fraction)
        self.stats = Stats(kept=prefill_kept, prefill_kept=prefill_kept)
        key = jax.random.fold_in(jax.random.key(options.seed), self._replies)
        self._replies += 1
        sampling = sampling_of(**options.sampling, key=key, stop_tokens=None)
        reading = reading_of(self._tree, **options.reading)
        kept = 0.0
        for number in range(options.max_new_tokens):
            drawn = draw(self._state, sampling, number)
            token = _number(drawn)
            self.stats.seconds = time.perf_counter() - started
            yield token
            self._state = read_one(self._params, self._tree, self._state, drawn, reading)
            self._ids.append(token)
            kept += _number(self._state.kept_fraction)
            self.stats.kept = kept / (number + 1)
            if token in options.stop_tokens:
                return

    def _read(self, ids: list[int]):
        """Makes the state hold exactly ids; the last of them is read in any case, for the logits after it."""
        common = 0
        for ours, theirs in zip(self._ids, ids[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        state = self._state
        if state is not None:
            # Rows beyond the length are never attended, so a shorter length forgets what came after.
            state = dataclasses.replace(state, lengths=on_device([common], jnp.int32))
        rows = -(-(len(ids) + self.options.max_new_tokens) // ROOM) * ROOM
        self._state = prefill(
            self._params,
            self._tree,
            np.array([ids[common:]], np.int32),
            state=state,
            capacity=rows - len(ids),
            **self.options.reading,
        )
        self._ids = list(ids)

    def why_dense(self) -> str | None:
        """Why every key is read, in a sentence's words; None where keys are chosen."""
        if self.options.dense:
            return "dense attention was asked for"
        given = self.options.sparsity
        sparsity = self._tree.config.sparsity if given is None else given
        return why_dense(self._tree, sparsity, self.options.implementation)

    def rehearse(self, ids: list[int]):
        """Compiles what `reply(ids)` will need and changes nothing, so that its time is not the compiler's."""
        list(itertools.islice(copy.copy(self).reply(ids), 2))  # the second token comes when the first has been read


def _number(array):
    """The one user's, [1]; indexing on the device would compile programs of its own."""
    return jax.device_get(array).item()
