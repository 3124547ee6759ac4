"""What an answer read of the fixed context: its forward passes run again, with selection and attention written down.

Token p of an answer is written by pass p: the question's last token writes the first, every token of the answer the
next one. Attention here is exact, softmax over every key that the pass attended; what the keys *not* kept would have
received is exact too, and costs reading them: an explanation is dense, and as slow.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax import buckets
from squeezejax.arguments import check_model, check_tokens
from squeezejax.mesh import sharding
from squeezejax.online.generate import State, empty_state, forward
from squeezejax.online.reading import Estimate, check_reading, reading_of
from squeezejax.online.select import Selection, kept_rows
from squeezejax.pallas_kernels.interface import Reading
from squeezejax.pallas_kernels.layout import split_heads, to_lanes
from squeezejax.pallas_kernels.xla import backend as xla
from squeezejax.pallas_kernels.xla.softmax import MASKED
from squeezejax.tree import Tree


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What each of the P passes that wrote an answer read, and on average every layer and head; NumPy arrays.

    Context tokens are in their original order; the sinks, which are always read, come first, the window last.
    `attended` is a share of the attention that was paid, `missed` of that which full attention would have paid from the
    same query: 0 for a key that was kept. Attention is averaged over the query heads that share a key/value head.
    """

    token_kept: np.ndarray  # f32[P S], share of layers and key/value heads that kept the key
    token_attended: np.ndarray  # f32[P sinks+S+W], mean over layers and heads
    token_missed: np.ndarray  # f32[P S], mean over layers and heads
    head_kept: np.ndarray  # f32[L K S], share of passes in which the head kept the key
    head_attended: np.ndarray  # f32[L K sinks+S+W], mean over passes
    head_missed: np.ndarray  # f32[L K S], mean over passes
    kept: np.ndarray  # f32[P L K], kept clustered keys / S
    attended: np.ndarray  # f32[P L K], attention paid to the fixed context, window included
    missed: np.ndarray  # f32[P L K], attention that the keys not kept would have received
    probabilities: np.ndarray  # f32[P], of each token of the answer when it was written
    kept_fraction: float  # as `Generation` has it: of the passes that read the answer's tokens, the last included
    prefill_kept_fraction: float
    dense: bool  # every key was kept, by sparsity 0 or because selecting cannot pay (fallback.py)
    sinks: int = 0  # first tokens of the context, which are always read


def explain(
    params,
    tree: Tree,
    question,
    answer,
    *,
    sparsity=None,
    estimate: Estimate | None = None,
    implementation: str | None = None,
) -> Explanation:
    """What an answer i32[n] to a question i32[T], both token ids, read of the context of `tree`.

    `sparsity`, `estimate` and `implementation` must be those with which the answer was generated: they decide which
    keys were kept, the last only where None lets short contexts be read densely. The passes run as plain XLA, one token
    at a time as in `decode`. Memory on the host: 12 (L·K + P) bytes a context token.

    Raises ValueError for a tree of another model, token ids out of range and no tokens, NotImplementedError for a tree
    that lies on several devices.
    """
    check_model(params, tree)
    question, answer = (_one_user(tokens, params.config.vocab_size) for tokens in (question, answer))
    if sharding.mesh_of(tree) is not None:
        raise NotImplementedError("an answer is explained on one device: load the tree without a mesh")
    reading = reading_of(tree, sparsity=sparsity, estimate=estimate, implementation=implementation)
    check_reading(reading, 1)
    reading = dataclasses.replace(reading, implementation="xla")
    padded, room = (buckets.pad_tokens(np.array([ids], np.int32)) for ids in (question, answer))
    state = empty_state(params, tree, 1, padded.shape[1] + room.shape[1])
    state, seen = _read(params, tree, state, padded, len(question), reading)
    prefill_kept = state.kept_fraction[0]
    record = _Record(tree, len(answer))
    kept = 0.0
    for p, token in enumerate(answer):
        record.add(p, seen)
        record.probabilities[p] = jax.nn.softmax(state.logits[0])[token]
        state, seen = _read(params, tree, state, np.array([[token]], np.int32), 1, reading)
        kept += float(state.kept_fraction[0]) / len(answer)
    return Explanation(
        **vars(record),
        kept_fraction=kept,
        prefill_kept_fraction=float(prefill_kept),
        dense=reading.log_T is not None and bool(jnp.all(reading.log_T == -jnp.inf)),
        sinks=tree.config.sinks,
    )


def _one_user(tokens, vocab_size: int) -> list[int]:
    tokens = np.asarray(check_tokens(tokens, vocab_size))
    if len(tokens) != 1:
        raise ValueError(f"one question and one answer at a time, tokens i32[T], not {list(tokens.shape)}")
    return tokens[0].tolist()


class _Seen(NamedTuple):
    """What the last token of one pass read, head by head."""

    kept: jax.Array  # bool[L K S]
    attended: jax.Array  # f32[L K sinks+S+W]
    missed: jax.Array  # f32[L K S]


class _Record:
    """The arrays of an `Explanation`, filled pass by pass."""

    def __init__(self, tree: Tree, P: int):
        L, K, S, whole = tree.num_layers, tree.num_kv_heads, tree.num_keys, tree.context_length
        for name, length in (("kept", S), ("attended", whole), ("missed", S)):
            setattr(self, f"token_{name}", np.zeros((P, length), np.float32))
            setattr(self, f"head_{name}", np.zeros((L, K, length), np.float32))
            setattr(self, name, np.zeros((P, L, K), np.float32))
        self.probabilities = np.zeros(P, np.float32)

    def add(self, p: int, seen: _Seen):
        """Writes down pass p."""
        P = len(self.probabilities)
        for name, found in zip(seen._fields, map(np.asarray, seen), strict=True):
            total = np.mean if name == "kept" else np.sum
            getattr(self, f"token_{name}")[p] = found.mean(axis=(0, 1))
            getattr(self, f"head_{name}")[...] += found / np.float32(P)
            getattr(self, name)[p] = total(found, axis=2)


@jax.jit
def _read(params, tree: Tree, state: State, tokens, count, reading: Reading):
    """One pass of `generate` over tokens i32[1 T], of which the first `count` are real -> (state after it, `_Seen`)."""
    L, K = tree.num_layers, tree.num_kv_heads
    empty = lambda length, dtype: jnp.zeros((L, K, length), dtype)
    S, whole = tree.num_keys, tree.context_length

    def see(seen, layer, q, found):
        here = _look(tree, q, found.lse, layer, count, reading)
        return jax.tree.map(lambda all_layers, here: all_layers.at[layer].set(here), seen, here)

    nothing = _Seen(empty(S, bool), empty(whole, jnp.float32), empty(S, jnp.float32))
    counts = jnp.full(1, count, jnp.int32)
    x, cache, (kept, _), seen = forward(params, tree, state, tokens, counts, reading, observe=(nothing, see))
    logits = params.unembed(x[:, count - 1][:, None])[:, 0]
    after = {"keys": cache[0], "values": cache[1], "lengths": state.lengths + counts}
    return dataclasses.replace(state, **after, logits=logits, kept_fraction=kept), seen


def _look(tree: Tree, q, lse, layer, count, reading: Reading) -> _Seen:
    """What the last of `count` tokens reads in one layer: arrays without L.

    q [1 T N H] as the backend is handed it, lse f32[1 T N] as it gave: the log of the denominator of what was attended.
    """
    T, K, S = q.shape[1], tree.num_kv_heads, tree.num_keys
    groups = split_heads(q, K)
    # The token shares its selection with those of its block, as in the backend.
    block = min(tree.config.query_block or T, T)
    first = (count - 1) // block * block
    part = jnp.pad(groups, ((0, 0), (0, -T % block), (0, 0), (0, 0), (0, 0)))
    part = jax.lax.dynamic_slice_in_dim(part, first, block, axis=1)
    valid = jnp.repeat(first + jnp.arange(block)[None] < count, groups.shape[3], axis=1)
    found = xla.select(tree, to_lanes(part), valid, groups.shape[3], layer, reading)
    kept = Selection(kept_rows(tree, found, layer)[0], layer).key_mask(tree)

    last = groups[0, count - 1]  # [K G H]
    paid = split_heads(lse[..., None], K)[0, count - 1]  # [K G 1]
    # Rows lie in cluster order; padding, −1 there, is sent past the end.
    at = jnp.where(tree.order[layer] < 0, S, tree.order[layer])
    by_row = jnp.swapaxes(_scores(last, jax.tree.map(lambda x: x[layer], tree.cache).wide().keys), 1, 2)
    scores = jnp.zeros((K, S, last.shape[1]), jnp.float32).at[jnp.arange(K)[:, None], at].set(by_row, mode="drop")
    scores = jnp.swapaxes(scores, 1, 2)  # [K G S]
    always = jnp.exp(_scores(last, tree.window_keys[layer]) - paid)
    sinks, window = always[..., : tree.config.sinks], always[..., tree.config.sinks :]
    skipped = jnp.where(kept[:, None], MASKED, scores)
    whole = jnp.logaddexp(paid, jax.nn.logsumexp(skipped, axis=2, keepdims=True))
    attended = jnp.exp(jnp.where(kept[:, None], scores, MASKED) - paid)
    return _Seen(
        kept=kept,
        attended=jnp.mean(jnp.concatenate([sinks, attended, window], axis=2), axis=1),
        missed=jnp.mean(jnp.exp(skipped - whole), axis=1),
    )


def _scores(q, k):
    """q·k/√H of q [K G H] and k [K R H] -> f32[K G R]."""
    dots = jnp.einsum("KGH,KRH->KGR", q.astype(jnp.float32), k.astype(jnp.float32))
    return dots / jnp.sqrt(jnp.float32(q.shape[-1]))
