"""Trains the embedded model: a small Llama that answers questions about facts planted in a long text.

    python -m benchmarks.embedded.train --work DIR --out DIR

Contexts grow from phase to phase: looking a name up in the text ("induction") is learnt where the text is short, and
only then stretched. A phase ends early when the answers in its batches are right often enough. `--work` holds the
state, written every few minutes; the same command goes on from there. `--out` gets the finished checkpoint, and its
table of exact replies is printed. `--phase` replaces the built-in table, so that a larger machine can train longer, for
example `--phase 8192:8:4000:1e-3:1e-4 --start previous/state.npz`.
"""

import argparse
import dataclasses
import functools
import math
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.embedded import evaluate, export
from benchmarks.embedded.batches import Encoder, Shape, make_batch
from squeezejax.models import Llama, LlamaConfig, RopeConfig, embedded
from squeezejax.models.layers import rope_frequencies
from squeezejax.pallas_kernels.layout import split_heads


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps on batches of one shape; the learning rate goes from `rate` to `final_rate` along a half cosine."""

    shape: Shape
    steps: int
    rate: float
    final_rate: float
    enough: float = 2.0  # ends the phase early: this share of recent answers right; above 1 = never

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0 ≤ step < steps."""
        return self.final_rate + (self.rate - self.final_rate) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


# What the committed weights began with: 2,235 steps, under an hour on two busy cores (then they went on with
# benchmarks/quality/train.py). Some 600 of them went to 256 and 1,024 tokens
# without crowded names; then every name with a second word of its own was found, and less than half of the others:
# that word was all that the model matched. Crowded names in short texts taught it the first word too in 450 steps.
PHASES = (
    Phase(Shape(64, 32, 1, (1, 1), recitals=1.0), 4000, 3e-3, 3e-3, enough=0.9),
    Phase(Shape(160, 12, 4, (1, 4), recitals=0.3), 3000, 2e-3, 2e-3, enough=0.95),
    Phase(Shape(160, 12, 3, (3, 5), recitals=0.4, crowded=0.7), 1500, 2e-3, 1.5e-3, enough=0.96),
    Phase(Shape(256, 16, 5, (5, 12), crowded=0.5), 1000, 1.5e-3, 1.5e-3, enough=0.95),
    Phase(Shape(1024, 4, 16, (16, 32), crowded=0.3), 600, 1.5e-3, 8e-4, enough=0.97),
    Phase(Shape(4608, 1, 24, (24, 64), crowded=0.2), 150, 8e-4, 6e-4),
    Phase(Shape(8704, 1, 24, (24, 64), crowded=0.2), 110, 6e-4, 3e-5),
)
WARM_UP_STEPS = 100
LONGEST_KEPT = 5000  # tokens up to which attention weights are kept for the backward pass rather than computed again


def model_config(vocab_size: int, stop_token: int) -> LlamaConfig:
    """The embedded model: 4 layers of width 128. The large theta keeps half of each head's pairs turning slowly enough
    to compare contents at any distance up to 8K tokens."""
    return LlamaConfig(
        vocab_size=vocab_size,
        model_dim=128,
        mlp_dim=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope=RopeConfig(theta=500_000.0),
        norm_eps=1e-5,
        tie_embeddings=True,
        max_positions=8192,
        stop_tokens=(stop_token,),
    )


def initial_weights(config: LlamaConfig, key) -> Llama:
    """Random weights, biased towards the two things that looking something up is made of; all of them are trained.

    From plain random weights the first layer takes thousands of steps here to notice where tokens stand, since nothing
    is common to the projections of all tokens. So all embeddings share a direction, in which the first layer's heads
    begin by preferring the tokens 1, 2, 3, … places back; in the later layers queries begin a little like keys and the
    output projection like the value projection's transpose, comparing and copying contents ("mimetic initialization",
    arXiv 2305.09828).
    """
    params = Llama(config, key=key)
    attention, H = params.layers.attention, config.head_dim
    N, K, D = config.num_heads, config.num_kv_heads, config.model_dim
    common = jax.random.rademacher(jax.random.fold_in(key, 1), (D,), jnp.float32) / math.sqrt(D)  # of length 1
    params.embedding[...] = params.embedding[...] + common[None, :]

    alike = jnp.repeat(attention.key[...], N // K, axis=1)  # [L N H D]
    query = (math.sqrt(0.75) * attention.query[...] + 0.5 * alike).at[0].set(0.3 * attention.query[0])
    # The fastest pairs of dimensions tell neighbours apart; a query rotated by n places prefers the key n before it.
    frequencies, _ = rope_frequencies(config.rope, H)
    fast = (jnp.arange(H // 2) < 4).astype(jnp.float32)
    angles = -jnp.asarray(frequencies)[None, :] * jnp.arange(1, N + 1, dtype=jnp.float32)[:, None]  # [N H/2]
    places = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1) * jnp.tile(fast, 2)[None, :]
    attention.query[...] = query.at[0].add(0.7 * places[:, :, None] * common[None, None, :])
    here = jnp.concatenate([fast, jnp.zeros_like(fast)])
    first_key = 0.3 * attention.key[0] + 0.7 * here[None, :, None] * common[None, None, :]
    attention.key[...] = attention.key[...].at[0].set(first_key)
    values = jnp.repeat(attention.value[...], N // K, axis=1)
    attention.output[...] = 0.3 * jnp.moveaxis(values, 3, 1)  # [L D N H]
    return params


def attention(q, k, v, block: int = 512):
    """Causal attention of q [B T N H] over k, v [B T K H] -> [B T N H]; a block of queries reads no key after it.

    `squeezejax.partial.causal_attention` reads every key for every block, which halves the speed of training here.
    """
    T, K = q.shape[1], k.shape[2]
    q = jnp.moveaxis(split_heads(q, K), 1, 3) / math.sqrt(q.shape[-1])  # [B K G T H]
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [B K T H]

    def one(q, k, v):
        rows = jnp.arange(q.shape[3])[:, None] + k.shape[2] - q.shape[3]
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k)
        seen = jnp.arange(k.shape[2])[None, :] <= rows
        scores = jnp.where(seen[None, None, None], scores, -1e30)
        return jnp.einsum("BKGTS,BKSH->BKGTH", jax.nn.softmax(scores, axis=-1), v)

    one = jax.checkpoint(one) if T > LONGEST_KEPT else one
    ends = [min(start + block, T) for start in range(0, T, block)]
    blocks = [one(q[..., end - (end - 1) % block - 1 : end, :], k[:, :, :end], v[:, :, :end]) for end in ends]
    out = jnp.moveaxis(jnp.concatenate(blocks, axis=3), 3, 1)  # [B T K G H]
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def loss(params: Llama, tokens, weights, answers):
    """Weighted cross entropy of tokens i32[B T] -> (f32[], share of answers whose token has the largest logit)."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1), tokens[:, 1:].shape)
    attend = lambda carry, layer, q, k, v: (carry, attention(q, k, v))
    x, _ = params.run_layers(params.embed(tokens[:, :-1]), positions, attend, None)
    logits = params.unembed(x)
    costs = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    right = jnp.argmax(logits, axis=-1) == tokens[:, 1:]
    share = jnp.sum(right & answers[:, 1:]) / jnp.maximum(jnp.sum(answers), 1)
    return jnp.sum(costs * weights[:, 1:]) / jnp.sum(weights[:, 1:]), share


def _is_matrix(weight) -> bool:
    """Stacked norms are [L D] and the last one [D]; L is small."""
    return weight.ndim > 2 or (weight.ndim == 2 and weight.shape[0] > 64)


# Decay only matrices: norms' scales and biases have no direction to regularise.
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b1=0.9, b2=0.97),
    optax.add_decayed_weights(0.05, mask=lambda params: jax.tree.map(_is_matrix, params)),
)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params: Llama, moments, rate, tokens, weights, answers):
    """One update -> (params, moments, loss f32[], share of answers right f32[])."""
    (cost, share), gradients = jax.value_and_grad(loss, has_aux=True)(params, tokens, weights, answers)
    updates, moments = OPTIMIZER.update(gradients, moments, params)
    params = jax.tree.map(lambda weight, update: weight - rate * update, params, updates)
    return params, moments, cost, share


@dataclasses.dataclass
class Run:
    """Everything that training needs to go on: weights, moments, and where in the table of phases it is."""

    params: Llama
    moments: optax.OptState
    phase: int = 0
    step: int = 0  # within the phase
    total: int = 0  # since the beginning; numbers the batches
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Writes the state to one file, by way of a temporary name."""
        leaves = {f"leaf{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves((self.params, self.moments)))}
        counters = np.array([self.phase, self.step, self.total, self.seconds])
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, counters=counters, **leaves)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, params: Llama) -> "Run":
        """Reads a state into the structure of `params`."""
        template = (params, OPTIMIZER.init(params))
        with np.load(path) as file:
            leaves = [jnp.asarray(file[f"leaf{i}"]) for i in range(len(jax.tree.leaves(template)))]
            phase, step, total, seconds = file["counters"].tolist()
        params, moments = jax.tree.unflatten(jax.tree.structure(template), leaves)
        return cls(params, moments, int(phase), int(step), int(total), seconds)


def train(
    run: Run,
    encoder: Encoder,
    phases: tuple[Phase, ...],
    *,
    every=50,
    report=print,
    checkpoint=None,
    make_batch=make_batch,
) -> Run:
    """Goes through the phases from where `run` stands; every `every` steps reports and calls `checkpoint`.

    `make_batch(encoder, phase.shape, number)` gives the batches.
    """
    while run.phase < len(phases):
        phase, recent, started = phases[run.phase], [], time.monotonic()
        while run.step < phase.steps:
            batch = make_batch(encoder, phase.shape, run.total)
            rate = phase.rate_at(run.step) * min(1.0, (run.total + 1) / WARM_UP_STEPS)
            run.params, run.moments, cost, share = train_step(
                run.params, run.moments, jnp.float32(rate), batch.tokens, batch.weights, batch.answers
            )
            recent.append((cost, share))
            run.step, run.total = run.step + 1, run.total + 1
            if run.step % every == 0 or run.step == phase.steps:
                cost, share = np.mean(np.asarray(recent), axis=0)
                seconds = time.monotonic() - started
                run.seconds, started = run.seconds + seconds, time.monotonic()
                report(
                    f"phase {run.phase} ({phase.shape.length} tokens) step {run.step}/{phase.steps} rate {rate:.2e} "
                    f"loss {cost:.4f} answers {share:.4f} {seconds / len(recent):.3f} s/step total {run.seconds:.0f} s"
                )
                recent = []
                if checkpoint is not None:
                    checkpoint(run)
                if share >= phase.enough:
                    break
        run.phase, run.step = run.phase + 1, 0
    return run


def parse_phase(string: str) -> Phase:
    """`length:batch:steps:rate:final_rate[:enough]`; facts and turns grow with the length."""
    length, batch, steps, rate, final_rate, *enough = string.split(":")
    turns = max(2, min(24, int(length) // 60))
    facts = (turns, max(turns, min(64, (int(length) - 40 - 21 * turns) // 9)))
    shape = Shape(int(length), int(batch), turns, facts)
    return Phase(shape, int(steps), float(rate), float(final_rate), *map(float, enough))


def begin(state: Path, start: Path | None, params: Llama) -> Run:
    """The run that `state` holds, else one that goes on from the weights of `start`, else one from params."""
    if state.exists():
        return Run.load(state, params)
    if start:
        return dataclasses.replace(Run.load(start, params), phase=0, step=0)
    return Run(params, OPTIMIZER.init(params))


def finish(run: Run, encoder: Encoder, out: Path | None, report):
    """Writes the weights to `out` as a Hugging Face checkpoint, if it is named, and evaluates them."""
    if out:
        rounded = export.round_weights(run.params)
        export.save(out, rounded, encoder.bos, encoder.eos)
        evaluate.evaluate(rounded, encoder, report=report)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of the training state; resumed if present")
    parser.add_argument("--out", type=Path, help="directory for the finished Hugging Face checkpoint, evaluated after")
    parser.add_argument("--start", type=Path, help="state of another run to begin the phases from")
    parser.add_argument(
        "--phase",
        type=parse_phase,
        action="append",
        metavar="LENGTH:BATCH:STEPS:RATE:FINAL[:ENOUGH]",
        help="replaces the built-in table; repeat for several phases",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--every", type=int, default=25, help="steps between reports")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(embedded.PATH)
    config = model_config(encoder.vocab_size, encoder.eos)
    params = initial_weights(config, jax.random.key(arguments.seed))
    state = arguments.work / "state.npz"
    run = begin(state, arguments.start, params)
    phases = tuple(arguments.phase or PHASES)
    print(f"{sum(x.size for x in jax.tree.leaves(run.params)):,} parameters; {len(phases)} phases", flush=True)
    report = functools.partial(print, flush=True)
    train(run, encoder, phases, every=arguments.every, report=report, checkpoint=lambda run: run.save(state))
    run.save(state)
    finish(run, encoder, arguments.out, report)


if __name__ == "__main__":
    main()
