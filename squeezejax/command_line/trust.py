"""Whether a tree was made by this user: only then is the model folder that its notes name opened without being asked.

A tree from elsewhere may name any folder. `build` signs the name with a key that lies in the user's own folder, so that
trees made here can be told from those that were received.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from squeezejax.chat.shown import shown_line

EMBEDDED = "embedded"  # the name of the demo's model, in place of a directory
NOTE = "model_signature"


def model_notes(model: str) -> dict[str, str]:
    """The notes that name a model; signed, where this user has a folder for the key."""
    key = _key(make=True)
    return {"model": model} if key is None else {"model": model, NOTE: _signature(key, model)}


def is_trusted(notes: dict[str, str]) -> bool:
    """Whether the notes name a model that comes with squeezejax, or were signed by this user."""
    model, key = notes.get("model"), _key(make=False)
    if model is None or model == EMBEDDED:
        return model == EMBEDDED
    signature = notes.get(NOTE, "").encode("utf-8", "replace")
    return key is not None and hmac.compare_digest(_signature(key, model).encode(), signature)


def check_trusted(notes: dict[str, str]):
    """Raises ValueError for a tree whose notes name a model and are not to be trusted in that."""
    if not is_trusted(notes):
        raise ValueError(
            "the tree was not made by you on this machine, and names the model folder "
            f"{shown_line(notes['model'])}: if you trust that folder, or have the same model elsewhere, give it with "
            "--model"
        )


def _signature(key: bytes, model: str) -> str:
    return hmac.new(key, model.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _key(make: bool) -> bytes | None:
    """This user's key; None where there is none, or no place for one."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        file = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "squeezejax" / "key"
        if make and not file.exists():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = file.with_name(f"key-{secrets.token_hex(8)}")
            with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as new:
                new.write(secrets.token_bytes(32))
            with contextlib.suppress(FileExistsError):  # another build was faster: its key stays
                os.link(temporary, file)
            os.unlink(temporary)
        key = file.read_bytes()
        return key if len(key) == 32 else None
    return None
