"""The embedded model's own needles: a document it can read, and the facts that it was trained to look up."""

from benchmarks.real.needles import Haystack
from squeezejax.models import embedded


def embedded_questions(seed: int, length: int, encode, tokenizer, keys: int = 8) -> Haystack:
    """A context of exactly `length` ids, a document after <bos> and headings, with `keys` of its facts asked."""
    document = embedded.make_document(seed, length - 1, max(keys, length // 64))
    ids = encode(document.text)[: length - 1]
    filler = encode("\n\n".join(embedded.text.HEADINGS) + "\n\n")
    missing = length - 1 - len(ids)
    filler = filler * (missing // len(filler) + 1)
    facts = document.facts[:: max(1, len(document.facts) // keys)][:keys]
    ask = lambda fact: encode(f"\n\n{fact.question}\nAnswer:")
    return Haystack(
        [tokenizer.bos_token_id, *filler[len(filler) - missing :], *ids],
        [ask(fact) for fact in facts],
        [encode(" " + fact.reply) for fact in facts],
        "facts",
    )
