"""How likely the right answer is, token by token: it says more than a score where replies are rarely right."""

import jax
import jax.numpy as jnp
import numpy as np

import squeezejax
from benchmarks.public.samples import Item
from squeezejax.chat import prompts as chat


def gold_ids(tokenizer, item: Item, most: int) -> list[int]:
    """The first `most` ids of the answer as a reply would begin with it; all that are wanted where it takes all."""
    answer = ", ".join(item.answers) if item.metric == "contains_all" else item.answers[0]
    templated = item.chat and tokenizer.chat_template
    space = "" if templated or item.question[-1:].isspace() else " "
    return chat.encode(tokenizer, space + answer.strip())[:most]


def of_answers(params, tree, tokens, lengths, answers: list[list[int]], **options) -> list[float]:
    """Mean log-likelihood of a token of each answer after its question; tokens i32[B T] of `lengths` i32[B].

    The tokens are read one by one, so that each selects for itself as in decoding. `options` as of squeezejax.prefill.
    """
    steps = max(map(len, answers))
    padded = np.array([ids + [0] * (steps - len(ids)) for ids in answers], np.int32)
    state = squeezejax.prefill(params, tree, tokens, lengths=lengths, capacity=steps, **options)
    found = []
    for step in range(steps):
        log_p = jax.nn.log_softmax(state.logits, axis=-1)
        found.append(np.asarray(jnp.take_along_axis(log_p, padded[:, step, None], axis=1))[:, 0])
        if step < steps - 1:
            # An answer that ended goes on with padding, which nothing after it is measured by.
            state = squeezejax.prefill(params, tree, padded[:, step, None], state=state, capacity=0, **options)
    found = np.array(found).T
    return [float(np.mean(row[: len(ids)])) for row, ids in zip(found, answers, strict=True)]
