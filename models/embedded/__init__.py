"""The small trained model that needs no download: its text, its tokenizer and its weights.

`squeezejax.models.load(PATH)` gives the model, `transformers.AutoTokenizer.from_pretrained(PATH)` its tokenizer.
How it was trained is in benchmarks/embedded/ of the repository.
"""

from pathlib import Path

from squeezejax.models.embedded.text import Document, Fact, make_document

__all__ = ["DEMO_TOKENS", "PATH", "Document", "Fact", "demo_document", "make_document"]

PATH = Path(__file__).parent
DEMO_TOKENS = 4096
DEMO_FACTS = 64


def demo_document(seed: int = 0) -> Document:
    """The demo's text, of at most DEMO_TOKENS tokens; seeds below a million were never trained on."""
    return make_document(seed, DEMO_TOKENS, DEMO_FACTS)
