"""Texts to squeeze: files given by path, the language reference in every Python, or the embedded model's own."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from squeezejax.models import embedded

GAP = "\n\n"


class Texts:
    """Texts as token ids, of as many tokens as are asked for, no token given out twice for one purpose."""

    def __init__(self, name: str, documents: list[str], encode: Callable[[str], list[int]]):
        """Documents in order; `encode`: text -> ids."""
        self.name, self._encode, self._documents = name, encode, documents
        self._ids: list[int] = []
        self._joined = 0

    def stretches(self, length: int) -> Iterator[list[int]]:
        """Stretches of so many tokens: of one document after another, with an empty line between."""
        for first in range(0, 10**9, length):
            ids = self._tokens(first + length)[first:]
            if len(ids) < length:
                return
            yield ids

    def stretch(self, number: int, length: int) -> list[int]:
        """One of them. Raises ValueError where the texts are too short."""
        ids = self._tokens((number + 1) * length)[number * length :]
        if len(ids) < length:
            raise ValueError(f"{self.name} have fewer than {(number + 1) * length} tokens: give more with --texts")
        return ids

    def _tokens(self, count: int) -> list[int]:
        while len(self._ids) < count and self._joined < len(self._documents):
            self._ids += self._encode(self._documents[self._joined].strip() + GAP)
            self._joined += 1
        return self._ids[:count]


def read(paths: list[Path], encode) -> Texts:
    """Text files, or all *.txt and *.md of folders, longest first: a stretch then often is one text."""
    files = []
    for path in paths:
        found = sorted(file for kind in ("*.txt", "*.md") for file in path.rglob(kind)) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"there is no *.txt or *.md in {path}")
        files += found
    documents = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return Texts(", ".join(map(str, paths)), sorted(documents, key=len, reverse=True), encode)


def language_reference(encode) -> Texts:
    """The chapters of `help()`, some 700 KB of prose, tables and code about Python."""
    from pydoc_data import topics

    documents = sorted(topics.topics.values(), key=len, reverse=True)
    return Texts("pydoc_data.topics", documents, encode)


def embedded_documents(encode, tokens: int, number: int = 64) -> Texts:
    """What the embedded model was trained to read; each fills a stretch of `tokens`."""
    documents = [embedded.make_document(seed, tokens, max(8, tokens // 64)).text for seed in range(number)]
    random.Random(0).shuffle(documents)
    return Texts("the embedded model's documents", documents, encode)
