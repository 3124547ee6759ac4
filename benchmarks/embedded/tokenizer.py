"""The embedded model's tokenizer: byte-level BPE that knows the generator's words whole and any other text by bytes.

    python -m benchmarks.embedded.tokenizer --out DIR

writes tokenizer.json and tokenizer_config.json, the same bytes every time. The chat format, in full:

    <bos>{document}\\n\\n{question}\\nAnswer: {reply}<eos>\\n{question}\\nAnswer: {reply}<eos>\\n

A line break is always a token by itself, so a prompt's ids split wherever its text has one: ids(document) +
ids("\\n\\n" + question) are the ids of the whole, whatever the document is.
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from squeezejax.models import embedded
from squeezejax.models.embedded import text

BOS, EOS = "<bos>", "<eos>"
VOCAB_SIZE = 2048
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] + eos_token + '\\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
_DOCUMENTS = 300
_DOCUMENT_TOKENS = 2000
_CORPUS_SEED = 500_000  # neither a training nor a held-out seed


def words() -> tuple[str, ...]:
    """Everything that a fact, a question or a reply may contain, as it stands after a space."""
    rest = ("The", "What", "is", "the", "of")
    return (*text.FIRST_WORDS, *text.SECOND_WORDS, *text.ANSWERS, *text.RELATIONS, *rest)


def corpus():
    """Generated documents with their questions and replies, and the words of facts often enough to become tokens."""
    for seed in range(_CORPUS_SEED, _CORPUS_SEED + _DOCUMENTS):
        document = text.make_document(seed, _DOCUMENT_TOKENS, 40)
        yield document.text
        yield "".join(f"{fact.question}\nAnswer: {fact.reply}\n" for fact in document.facts)
    for word in words():
        yield f" {word}" * 100


def build() -> Tokenizer:
    """Trains the tokenizer. Raises RuntimeError where a word of a fact is not one token."""
    tokenizer = Tokenizer(models.BPE())
    # GPT-2's split alone joins line breaks with each other, or with spaces, depending on what follows them.
    lines = pre_tokenizers.Split(Regex("\n"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(BOS, normalized=False), AddedToken(EOS, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    split = [word for word in words() if len(tokenizer.encode(f" {word}").ids) != 1]
    if split:
        raise RuntimeError(f"a vocabulary of {VOCAB_SIZE} is too small; not one token: {', '.join(split)}")
    return tokenizer


def save(directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as transformers.AutoTokenizer reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    build().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model's tokenizer (seconds; deterministic).")
    parser.add_argument("--out", type=Path, default=embedded.PATH, help="directory (default: the embedded model's)")
    save(parser.parse_args().out)


if __name__ == "__main__":
    main()
