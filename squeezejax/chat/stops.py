"""Strings at which a reply ends, looked for in a stream of text."""


class StopStrings:
    """Passes a stream of text on up to the first of some strings, and nothing of that string or what follows it.

    The first is the one that is complete first (the longest, where several end at once), so that it does not matter
    into which pieces the text is cut.
    """

    def __init__(self, strings):
        self._strings = tuple(strings)
        self._held = ""  # the end of the text so far, which may be the beginning of one of the strings
        self.found: str | None = None  # the string that ended the text

    def push(self, piece: str) -> str:
        """What can be shown of the text now that `piece` has come."""
        if self.found is not None:
            return ""
        text = self._held + piece
        at = {string: text.find(string) for string in self._strings}
        ends = [(start + len(string), start, string) for string, start in at.items() if start >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        shown = len(text) - self._overlap(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, once the text has ended."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of text with which one of the strings begins."""
        longest = max(map(len, self._strings), default=0) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(string.startswith(text[-n:]) for string in self._strings)), 0)
