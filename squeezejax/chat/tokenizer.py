"""Tokenizers of checkpoint directories: a plain one is read by the library `tokenizers` alone, others by transformers.

A directory is plain where its tokenizer.json is all there is to know: transformers would take that file as it stands.
Reading it then takes tenths of a second; importing transformers takes seconds, with PyTorch installed more of them.
"""

import datetime
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# What tokenizer_config.json may say without making a difference to token ids, or what `PlainTokenizer` follows.
_KNOWN = {
    *_SPECIAL,
    "added_tokens_decoder",
    "backend",
    "chat_template",
    "clean_up_tokenization_spaces",
    "is_local",
    "local_files_only",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "tokenizer_class",
}
_AS_IT_STANDS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that add nothing to tokenizer.json
_FAMILIES = ("llama", "qwen3")  # whose tokenizer_class transformers believes
_OTHER_FILES = ("added_tokens.json", "additional_chat_templates", "chat_template.json")


class Tokenizer(Protocol):
    """What is asked of a tokenizer; transformers' fast ones have it."""

    @property
    def chat_template(self) -> str | None:
        """Jinja's text of how a conversation is written."""

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text."""

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a reply."""

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Mapping:
        """A mapping with `input_ids`, a list."""

    def decode(self, token_ids, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces=False) -> str:
        """The text of ids."""

    def apply_chat_template(self, conversation, *, tokenize: bool = False, add_generation_prompt: bool = False) -> str:
        """The text of a conversation."""


def load_tokenizer(directory) -> Tokenizer:
    """The tokenizer of a Hugging Face checkpoint directory; nothing is downloaded, and no code of others is run.

    Raises FileNotFoundError for a directory that is not there, and ValueError where it holds no usable tokenizer.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"no model directory at {folder}; models are not downloaded, give a local path")
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).exists() for name in names):
        raise FileNotFoundError(f"{folder} has no tokenizer (none of {', '.join(names)})")
    try:
        return _load_plain(folder) or _load_by_transformers(folder)
    except Exception as error:  # of many types, the Rust library's own among them
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder}: its tokenizer is a program of its own (auto_map), and such code is never run: save it as a "
                "tokenizer.json where you trust it"
            ) from error
        raise ValueError(f"{folder}: its tokenizer cannot be read ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _load_by_transformers(folder: Path) -> Tokenizer:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else: that PyTorch is missing
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer  # takes seconds to import

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


class PlainTokenizer:
    """A tokenizer.json and the words of a chat template around it; see `Tokenizer`."""

    def __init__(self, backend, special: dict[str, str], chat_template: str | None):
        """backend, of the library `tokenizers`; `special`, tokens by the name that templates know them by."""
        self._backend, self._special = backend, special
        self.chat_template = chat_template  # Jinja's text of how a conversation is written; may be set to another
        # As in transformers, what tokenizer.json says of lengths is for callers who ask for it, and none does here.
        backend.no_truncation()
        backend.no_padding()

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a reply."""
        return self._id("eos_token")

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text."""
        return self._special.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a reply."""
        return self._special.get("eos_token")

    @property
    def added_tokens_decoder(self) -> dict:
        """Tokens beside the vocabulary, by id; each knows whether it is `special`."""
        return self._backend.get_added_tokens_decoder()

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True):
        """Ids of a text, in a mapping as transformers' tokenizers give it."""
        return {"input_ids": self._backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, token_ids, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces=False) -> str:
        """The text of ids. Spaces are left as they are: the clean-up of old tokenizers would change it."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, token: int) -> str:
        """The token with this id."""
        return self._backend.id_to_token(token)

    def apply_chat_template(self, conversation, *, tokenize: bool = False, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, messages with role and content."""
        given = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        messages = [dict(message) for message in conversation]
        return _compiled(self.chat_template).render(messages=messages, **given, **self._special)

    def _id(self, name: str) -> int | None:
        return self._backend.token_to_id(self._special[name]) if name in self._special else None


@functools.cache
def _compiled(template: str):
    return _environment().from_string(template)


def _environment():
    """Jinja's sandbox with what chat templates expect to find in it."""
    import jinja2.ext
    import jinja2.sandbox

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own is for HTML and escapes <, > and &.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _load_plain(folder: Path) -> PlainTokenizer | None:
    """The tokenizer of a plain directory; None where anything in it is for transformers to judge."""
    if any((folder / name).exists() for name in _OTHER_FILES):
        return None
    content, settings, model = (_read(folder / f"{name}.json") for name in ("tokenizer", "tokenizer_config", "config"))
    if content is None or settings is None or model is None or not _is_plain(content, settings, model):
        return None
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if template is not None and (not isinstance(template, str) or "generation %}" in template):
        return None  # several templates, or a tag of transformers' own
    if "added_tokens_decoder" not in settings and (folder / "special_tokens_map.json").exists():
        return None
    special = {name: _name(settings[name]) for name in _SPECIAL if settings.get(name) is not None}
    import tokenizers

    return PlainTokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), special, template)


def _read(file: Path) -> dict | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # transformers says what is wrong
        return None
    return content if isinstance(content, dict) else None


def _is_plain(content: dict, settings: dict, model: dict) -> bool:
    """Whether a tokenizer.json is all there is to know, given what lies beside it."""
    added = content.get("added_tokens")
    if not isinstance(added, list):
        return False
    known = {token.get("content"): token for token in added}
    names = [_name(settings[name]) for name in _SPECIAL if settings.get(name) is not None]
    decoder = settings.get("added_tokens_decoder", {})
    return (
        settings.keys() <= _KNOWN
        and settings.get("tokenizer_class") in _AS_IT_STANDS
        and model.get("model_type") in _FAMILIES
        and all(name in known and known[name].get("special") for name in names)
        and isinstance(decoder, dict)
        and all(known.get(_name(token)) == {"id": int(index), **token} for index, token in decoder.items())
    )


def _name(token) -> str | None:
    """A special token's text, which may be written with its properties."""
    return token.get("content") if isinstance(token, dict) else token
