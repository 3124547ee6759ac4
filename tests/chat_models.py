"""Tokenizers with chat templates of several makes, trained on a few sentences, and a tiny checkpoint to go with one."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CONTEXT = (
    "The harbour town lay quiet. Anna carried seven sacks of flour to the mill before noon, and nobody spoke of it.\n\n"
    "The passcode of Amber Falcon is violet. In winter the miller's dog slept beside the stove; it's warm there.\n"
    "Wind, rain and 1,234 barrels of tar: so went the year of the “long frost”. The end came in spring."
)
CORPUS = [
    CONTEXT,
    "What is the passcode of Amber Falcon? It is violet.",
    "Why? How many barrels, and who carried them?",
]

EMBEDDED = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
    + CHATML
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|header|>' + message['role'] + '<|end_header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\\n\\n' }}{% endif %}"
)
INST = (  # the reply follows a space, and a new turn begins with the beginning of sequence
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THOUGHTS = (  # leaves thoughts out of replies once the conversation has gone on
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + text | trim + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "embedded": EMBEDDED,
    "chatml": CHATML,
    "system": SYSTEM,
    "headers": HEADERS,
    "inst": INST,
    "thoughts": THOUGHTS,
    "plain": None,
}
SPECIAL = ("<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|end_header|>", "<|eot|>")

# Llama 3's: a full stop and the line breaks after it are one piece.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("gpt2", "llama3", "metaspace", "llama2")


def make_tokenizer(kind, template, *, add_bos=False):
    """A fast tokenizer with 400 tokens or so."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "llama2", unk_token="<eos>" if kind == "llama2" else None))
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    alphabet = []
    if kind in ("gpt2", "llama3"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "llama3":
            split = pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated")
            level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    else:  # as in Llama 2: no pieces at all, a space in front, unknown characters by bytes
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
        max_token_length=8 if kind == "llama2" else None,
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    if kind == "llama2":
        tokenizer = _with_bytes(tokenizer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=template
    )


def _with_bytes(tokenizer):
    """Trainers know no byte tokens, so these are put into the finished vocabulary."""
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab.update({f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)})
    return Tokenizer.from_str(json.dumps(content))
