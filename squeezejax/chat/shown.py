"""Text that others wrote, made safe to show: a terminal obeys control characters, and so does a reader's eye."""

import re
import unicodedata

# Those that turn the direction of writing around, which makes a text look like another.
_TURNING = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_UNSAFE = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff{_TURNING}]")


def shown(text: str) -> str:
    r"""The text with `\x1b` in place of an escape, and likewise for every character that is not to be seen but obeyed.

    Line breaks and tabs stay; so do characters that join letters or emoji.
    """
    return _UNSAFE.sub(lambda match: _escape(match[0]), text.replace("\r\n", "\n"))


def shown_line(text: str) -> str:
    """`shown`, for what is to stay on one line."""
    return "".join(_escape(c) if c in "\n\t" else c for c in shown(text))


def _escape(character: str) -> str:
    if unicodedata.category(character) == "Cs":  # half of a character: cannot be printed at all
        return f"\\u{ord(character):04x}"
    return character.encode("unicode_escape").decode()
