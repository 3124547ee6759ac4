"""Squeezed Attention once more in NumPy float64, straight from docs/method.md, and small cases to try it on.

The oracle shares no helper with the library: clusters keep the numbers that the labels give them, keys stay in their
original order, every sum runs over explicit Python lists of keys. Letters as in squeezejax/tree.py.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import squeezejax
from squeezejax.models import Llama, LlamaConfig
from squeezejax.pallas_kernels.xla.dense import causal_attention

TIE = 1e-9  # log scores this close are one score, whatever order they were summed in; strictly above means beyond it
LONG = np.longdouble  # its exponent reaches e±11356: scores at logits of several hundred do not underflow


# ---------------------------------------------------------------------------------------------------------------------
# The method, for one layer and one key/value head unless an axis says otherwise
# ---------------------------------------------------------------------------------------------------------------------
def ancestors(labels):
    """Cluster of every key at every level, coarse → fine, from labels (coarse → fine, the last one of keys)."""
    found = [np.asarray(labels[-1])]
    for parents in reversed(labels[:-1]):
        found.insert(0, np.asarray(parents)[found[0]])
    return found


def cluster_scores(keys, cluster, q, alive):
    """log A of every key, and −∞ for keys outside `alive`: keys [S H], cluster i[S], q [M H], alive bool[S]."""
    keys, q = np.asarray(keys, np.float64), np.asarray(q, np.float64)
    members = {c: np.flatnonzero(cluster == c) for c in np.unique(cluster[alive])}
    centroids = (
        np.stack([keys[rows].mean(axis=0) for rows in members.values()]) if members else np.zeros((0, q.shape[1]))
    )
    sizes = np.array([len(rows) for rows in members.values()], LONG)
    scores = (q @ centroids.T / np.sqrt(q.shape[1])).astype(LONG)
    log_A = np.full(len(keys), -np.inf, LONG)
    if members:
        exp = np.exp(scores - scores.max())  # one maximum for all queries is enough at longdouble's range
        A = (exp / (exp * sizes).sum(axis=1, keepdims=True)).mean(axis=0)
        for rows, value in zip(members.values(), np.log(A), strict=True):
            log_A[rows] = value
    return log_A


def descend(keys, labels, q, log_T):
    """(log A [S] of every level, kept bool[S] of every level), coarse → fine; thresholds log_T, one a level."""
    alive, scores, kept = np.ones(len(keys), bool), [], []
    for cluster, threshold in zip(ancestors(labels), log_T, strict=True):
        scores.append(cluster_scores(keys, cluster, q, alive))
        alive = alive & (scores[-1] > threshold + TIE)
        kept.append(alive)
    return scores, kept


def thresholds(keys, labels, queries, sparsity, margin):
    """log T of every level at `sparsity`: keys [L K S H], labels [L K …] a level, queries [L N W H]."""
    L, K, _, _ = keys.shape
    levels = len(labels)
    log_T = []
    for depth in range(levels):
        wanted = 1 - sparsity
        if depth < levels - 1:  # a geometric series of margins from the coarsest, which has all of it, to the finest
            wanted = min(1, wanted * margin ** ((levels - 1 - depth) / (levels - 1)))
            if wanted == 1:
                log_T.append(-np.inf)
                continue
        pool = []
        for layer in range(L):
            for head in range(K):
                own = [entry[layer, head] for entry in labels[: depth + 1]]
                # Levels below `depth` play no part: a key's cluster at `depth` is all that its score needs.
                full = ancestors([entry[layer, head] for entry in labels])
                q = grouped(queries[layer], K)[head]
                alive = np.ones(keys.shape[2], bool)
                for level in range(len(own)):
                    score = cluster_scores(keys[layer, head], full[level], q, alive)
                    if level < depth:
                        alive = alive & (score > log_T[level] + TIE)
                pool.append(score)
        T = np.quantile(np.exp(np.concatenate(pool)), LONG(1 - wanted))
        log_T.append(float(np.log(T)) if T > 0 else -np.inf)  # 0 where a level above cut more than this one has to
    return np.array(log_T)


def grouped(q, K):
    """q [N … H] -> K blocks of rows [M H]: the query heads that share a key/value head, all tokens."""
    return np.asarray(q, np.float64).reshape(K, -1, q.shape[-1])


def attention(q, keys, values):
    """Softmax attention of one query [H] over an explicit set of keys, values [n H] -> (out [H], lse)."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    scores = keys @ q / np.sqrt(len(q))
    top = scores.max()
    weights = np.exp(scores - top)
    return weights @ values / weights.sum(), top + np.log(weights.sum())


def attend(case, layer, q, k, v, start, masks):
    """Attention of q [T N H], rows `start` on of the user cache k, v [T' K H], over the keys that masks name.

    masks: bool[K S] for every token [T]. -> (out [T N H], lse [T N]).
    """
    T, N, _ = q.shape
    G = N // case.K
    out, lse = np.zeros(q.shape), np.zeros((T, N))
    for t in range(T):
        for n in range(N):
            head = n // G
            seen = np.concatenate([masks[t][head], np.ones(case.W, bool)])
            keys = np.concatenate([case.keys[layer, head][seen], k[: start + t + 1, head]])
            values = np.concatenate([case.values[layer, head][seen], v[: start + t + 1, head]])
            out[t, n], lse[t, n] = attention(q[t, n], keys, values)
    return out, lse


# ---------------------------------------------------------------------------------------------------------------------
# The common scale (docs/method.md, The index), for one layer and one key/value head unless an axis says otherwise
# ---------------------------------------------------------------------------------------------------------------------
def rotation(H):
    """The matrix [H H] by which rows are turned before they are rounded."""
    signs = np.where(np.random.default_rng(0).integers(0, 2, H), 1.0, -1.0)
    size = next(2**i for i in range(10, -1, -1) if H % 2**i == 0)
    stride = H // size
    turn = np.zeros((H, H))
    for i, j in np.ndindex(size, size):
        for x in range(stride):
            turn[i * stride + x, j * stride + x] = (-1) ** bin(i & j).count("1") / np.sqrt(size)
    return turn * signs


def unpack(packed, bits, H):
    """Codes 0 … 2^bits − 1, i[… H], of bytes u8[… bits·⌈H/8⌉]: dimension d in byte d mod their number."""
    packed = np.asarray(packed).astype(int)
    n = packed.shape[-1]
    return np.stack([packed[..., d % n] >> (bits * (d // n)) & (2**bits - 1) for d in range(H)], axis=-1)


def decode(packed, steps, bits, H):
    """Rounded rows [… H], still turned."""
    return (unpack(packed, bits, H) - (2**bits - 1) / 2) * np.asarray(steps).astype(np.float64)[..., None]


def rounded_centroids(tree, depth, layer, head):
    """The numbers [C H] of a level's clusters, as they are stored."""
    level, bits, H = tree.levels[depth], tree.config.index_bits, tree.keys.shape[3]
    if bits >= 16:
        return np.asarray(level.centroids[layer, head]).astype(np.float64)
    rows = decode(level.codes[layer, head], level.steps[layer, head], bits, H)
    return (rows + np.asarray(level.offset[layer, head], np.float64)) @ rotation(H)


@dataclasses.dataclass(frozen=True)
class CommonScale:
    """What one selection of the rule "variance" computes, for one head."""

    tree: squeezejax.Tree
    layer: int
    head: int

    def rows_of(self, depth):
        """The rows of every cluster of a level; dead ones have none."""
        level = self.tree.levels[depth]
        starts, counts = (np.asarray(x[self.layer, self.head]) for x in (level.starts, level.counts))
        return [range(first, first + n) for first, n in zip(starts, counts, strict=True)]

    def cluster_scores(self, depth, q):
        """(s [C M], q·c/√H [C M]) of q [M H]."""
        centroids = rounded_centroids(self.tree, depth, self.layer, self.head)
        dots = centroids @ q.T / np.sqrt(q.shape[1])
        spread = np.asarray(self.tree.levels[depth].spreads[self.layer, self.head]).astype(np.float64)
        return dots + spread[:, None] * np.sum(q**2, axis=1)[None] / (2 * q.shape[1]), dots

    def plain_denominator(self, q):
        """log of the denominator [M] from coarsest clusters and sinks, not corrected."""
        scores, _ = self.cluster_scores(0, q)
        sizes = np.array([len(rows) for rows in self.rows_of(0)], LONG)
        sinks = np.asarray(self.tree.window_keys[self.layer, self.head, : self.tree.config.sinks]).astype(np.float64)
        total = (sizes[:, None] * np.exp(scores.astype(LONG))).sum(axis=0)
        return np.log(total + np.exp((sinks @ q.T / np.sqrt(q.shape[1])).astype(LONG)).sum(axis=0))

    def denominator(self, q, group):
        """The same, corrected as calibration found; rows of q are tokens of `group` query heads each."""
        lse = self.plain_denominator(q)
        if self.tree.denominators is None:
            return lse
        a, b = np.asarray(self.tree.denominators[self.layer, self.head], np.float64).T
        head = np.arange(len(q)) % group
        return a[head] + b[head] * lse

    def true_denominator(self, q):
        """log of the denominator [M] over every key and sink."""
        live = np.asarray(self.tree.order[self.layer, self.head]) >= 0
        keys = np.asarray(self.tree.keys[self.layer, self.head]).astype(np.float64)[live]
        sinks = np.asarray(self.tree.window_keys[self.layer, self.head, : self.tree.config.sinks]).astype(np.float64)
        scores = np.concatenate([keys, sinks]) @ q.T / np.sqrt(q.shape[1])
        return np.log(np.exp(scores.astype(LONG)).sum(axis=0))

    def key_scores(self, q):
        """Scores [R M] of rows by their codes."""
        H, (_, dots) = q.shape[1], self.cluster_scores(-1, q)
        packed, steps = (x[self.layer, self.head] for x in (self.tree.key_codes, self.tree.key_steps))
        residual = decode(packed, steps, self.tree.config.key_bits, H) @ rotation(H)
        scores = np.full((len(residual), len(q)), -np.inf)
        for c, rows in enumerate(self.rows_of(len(self.tree.levels) - 1)):
            for row in rows:
                scores[row] = dots[c] + residual[row] @ q.T / np.sqrt(H)
        return scores

    def log_A(self, q, group):
        """log A of every level's clusters, coarse → fine, and then of rows, if they have codes."""
        lse = self.denominator(q, group)
        mean = lambda scores: np.log(np.mean(np.exp(scores.astype(LONG) - lse), axis=1))
        with np.errstate(divide="ignore"):
            found = [mean(self.cluster_scores(depth, q)[0]) for depth in range(len(self.tree.levels))]
            return [*found, mean(self.key_scores(q))] if self.tree.config.key_bits else found

    def select(self, q, group, log_T):
        """(rows kept bool[R], clusters given up by level, keys given up, smallest distance from a threshold)."""
        log_A = self.log_A(q, group)
        R = self.tree.keys.shape[2]
        alive, gap, given_up, above = np.zeros(R, bool), np.inf, [], None
        for depth, level in enumerate(self.tree.levels):
            parents = np.asarray(level.parents[self.layer, self.head])
            kept = np.zeros(len(parents), bool)
            lost = []
            for c, rows in enumerate(self.rows_of(depth)):
                if not len(rows) or (above is not None and not above[parents[c]]):
                    continue
                kept[c] = log_A[depth][c] > log_T[depth]
                gap = min(gap, abs(log_A[depth][c] - log_T[depth]))
                if not kept[c]:
                    lost.append(c)
            given_up.append(lost)
            above = kept
        for c in np.flatnonzero(above):
            alive[list(self.rows_of(len(self.tree.levels) - 1)[c])] = True
        dropped = np.zeros(R, bool)
        if self.tree.config.key_bits:
            gap = min(gap, np.abs(log_A[-1][alive] - log_T[-1]).min(initial=np.inf))
            dropped = alive & ~(log_A[-1] > log_T[-1])
            alive = alive & ~dropped
        return alive, given_up, dropped, float(gap)


def selected_mask(tree, layer, q, log_T):
    """(bool[K S] that q [T N H] keeps by the common scale, the smallest distance of a score from its threshold)."""
    K, S = tree.num_kv_heads, tree.num_keys
    masks, smallest = np.zeros((K, S), bool), np.inf
    group = q.shape[1] // K
    for head in range(K):
        rows = np.asarray(q[:, head * group : (head + 1) * group], np.float64).reshape(-1, q.shape[-1])
        kept, _, _, gap = CommonScale(tree, layer, head).select(rows, group, log_T)
        masks[head][np.asarray(tree.order[layer, head])[kept]] = True
        smallest = min(smallest, gap)
    return masks, smallest


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Case:
    """A context as NumPy arrays (exactly representable in `dtype`), its labels, and the tree made of it."""

    keys: np.ndarray  # f32[L K S+W H]
    values: np.ndarray
    labels: tuple  # coarse → fine
    queries: np.ndarray  # f32[L N Q H], for calibration
    config: squeezejax.SqueezeConfig
    dtype: jnp.dtype = jnp.float32

    @property
    def K(self):
        return self.keys.shape[1]

    @property
    def W(self):
        return self.config.observation_window

    @property
    def clustered(self):
        """keys [L K S H], without the window."""
        return self.keys[:, :, : self.keys.shape[2] - self.W]

    @functools.cached_property
    def uncalibrated(self):
        cast = lambda x: jnp.asarray(x, self.dtype)
        return squeezejax.build_tree(cast(self.keys), cast(self.values), self.config, labels=self.labels)

    @functools.cached_property
    def tree(self):
        return squeezejax.calibrate(self.uncalibrated, jnp.asarray(self.queries, self.dtype))

    def thresholds(self, sparsity):
        return thresholds(self.clustered, self.labels, self.queries, sparsity, self.config.coarse_margin)

    def head_labels(self, layer, head):
        return [entry[layer, head] for entry in self.labels]

    def key_mask(self, layer, q, log_T):
        """(bool[K S] kept keys for q [T N H], the smallest distance of a live score from its threshold)."""
        masks, gap = [], np.inf
        for head, rows in enumerate(grouped(q.swapaxes(0, 1), self.K)):
            scores, kept = descend(self.clustered[layer, head], self.head_labels(layer, head), rows, log_T)
            masks.append(kept[-1])
            for score, threshold in zip(scores, log_T, strict=True):
                gap = min(gap, np.abs(score[np.isfinite(score)] - threshold).min(initial=np.inf))
        return np.stack(masks), float(gap)


def cutting_thresholds(case, layer, q, fractions):
    """log T of every level that lie among the scores of q [T N H], halfway between two, so that every level cuts some.

    `fractions`: how far up among its distinct scores each level cuts.
    """
    log_T = []
    for depth, fraction in enumerate(fractions):
        scores = []
        for head, rows in enumerate(grouped(q.swapaxes(0, 1), case.K)):
            open_below = [*log_T, *[-np.inf] * (len(fractions) - depth)]
            found, _ = descend(case.clustered[layer, head], case.head_labels(layer, head), rows, open_below)
            scores.append(found[depth][np.isfinite(found[depth])])
        pool = np.unique(np.concatenate(scores))
        if not len(pool):
            return np.array([*log_T, *[0.0] * (len(fractions) - depth)])
        at = int(fraction * (len(pool) - 1))
        log_T.append(float((pool[at] + pool[min(at + 1, len(pool) - 1)]) / 2))
    return np.float32(log_T)


def make_case(
    seed=0,
    *,
    clusters=(4, 12),
    L=2,
    K=2,
    G=2,
    S=60,
    W=5,
    H=6,
    Q=None,
    scale=1.0,
    empty=0.25,
    dtype=jnp.float32,
    **config,
):
    """A random case; `clusters`: C of each level, coarse → fine, of which a fraction `empty` may have no keys."""
    rng = np.random.default_rng(seed)
    to_dtype = lambda x: np.asarray(jnp.asarray(x, dtype), np.float32)
    # Keys of a few directions, so that clusters differ, and random labels, so that nothing relies on K-means.
    keys = to_dtype(scale * (rng.normal(size=(L, K, 1, H)) + rng.normal(size=(L, K, S + W, H))))
    values = to_dtype(rng.normal(size=keys.shape))
    Q = W if Q is None else Q
    queries = to_dtype(rng.normal(size=(L, K * G, Q, H)))
    labels = []
    for C, below in zip(clusters, (*clusters[1:], S), strict=True):
        used = rng.permutation(C)[: max(1, round(C * (1 - empty)))]
        entry = used[rng.integers(0, len(used), (L, K, below))]
        entry[0, 0, 0] = C - 1  # or else the coarsest level would have fewer clusters
        labels.append(entry)
    fractions = tuple((i + 1) / (len(clusters) + 1) for i in range(len(clusters)))  # only their number matters
    config = squeezejax.SqueezeConfig.paper(cluster_fractions=fractions, observation_window=W, **config)
    return Case(keys, values, tuple(labels), queries, config, dtype)


def spread_rows(tree, seed=0):
    """The same tree with its finest clusters in another order in memory and padding rows of garbage between them."""
    rng = np.random.default_rng(seed)
    fine = tree.levels[-1]
    starts, counts = np.asarray(fine.starts), np.asarray(fine.counts)
    L, K, C = starts.shape
    S = tree.keys.shape[2]
    room = S + 3 * C + 2
    old_arrays = {name: np.asarray(x) for name, x in tree.row_arrays().items()}
    garbage = lambda x: 1 if x.dtype == np.uint8 else 1e3
    arrays = {name: np.full((L, K, room, *x.shape[3:]), garbage(x), x.dtype) for name, x in old_arrays.items()}
    arrays["order"] = np.full((L, K, room), -1, np.int32)
    moved = np.zeros_like(starts)
    for at in np.ndindex(L, K):
        row = 2
        for c in rng.permutation(C):
            n, old = counts[at][c], starts[at][c]
            for name, x in old_arrays.items():
                arrays[name][at][row : row + n] = x[at][old : old + n]
            moved[at][c] = row
            row += n + rng.integers(0, 4)
    level = dataclasses.replace(fine, starts=jnp.asarray(moved))
    return dataclasses.replace(tree, **jax.tree.map(jnp.asarray, arrays), levels=(*tree.levels[:-1], level))


def user_tokens(case, seed=0, *, B=2, T=3, room=7, G=2, scale=1.0, dtype=None):
    """Random q [B T N H] and a user cache k, v [B room K H] for a case, rounded to its dtype."""
    rng = np.random.default_rng([seed, 1])
    H, dtype = case.keys.shape[3], dtype or case.dtype
    to_dtype = lambda x: np.asarray(jnp.asarray(x, dtype), np.float32)
    q = to_dtype(scale * rng.normal(size=(B, T, case.K * G, H)))
    k, v = (to_dtype(rng.normal(size=(B, room, case.K, H))) for _ in range(2))
    return q, k, v


def make_model(seed=0, *, sharpness=3.0, dtype=jnp.float32, **changes):
    """A small random Llama whose attention is sharp enough that what it attends to changes its answers."""
    sizes = {
        "vocab_size": 31,
        "model_dim": 16,
        "mlp_dim": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
    }
    config = LlamaConfig(**(sizes | changes))
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: Llama(config, key=jax.random.key(0), dtype=dtype))

    def weight(path, leaf):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.asarray(1 + 0.1 * rng.normal(size=leaf.shape), dtype)
        spread = sharpness if "query" in name else 1.5
        return jnp.asarray(spread * rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-1]), dtype)

    return jax.tree_util.tree_map_with_path(weight, shapes)


# `attend` and `select` as programs that compile once per shape.
attend_jit = jax.jit(squeezejax.attend, static_argnames="implementation")
select_jit = jax.jit(squeezejax.select)
mask_jit = jax.jit(
    lambda tree, q, layer, log_T: squeezejax.select(tree, q, layer=layer, log_thresholds=log_T).key_mask(tree)
)


@contextlib.contextmanager
def count_compilations():
    """The names of the programs that XLA compiles inside the block, as a list that fills up."""
    compiled = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def plain_forward(params, tokens):
    """q [L N T H], k, v [L K T H] after RoPE of every layer, and logits [T V], by dense attention over tokens [T]."""
    tokens = jnp.asarray(tokens, jnp.int32)[None]
    return _plain_forward(params, tokens)


@jax.jit
def _plain_forward(params, tokens):
    seen = []

    def attend(q, k, v):
        seen.append([x[0].swapaxes(0, 1) for x in (q, k, v)])
        return None, causal_attention(q, k, v)

    x, positions = params.embed(tokens), jnp.arange(tokens.shape[1])[None]
    for i in range(params.config.num_layers):
        x, _ = params.apply_layer(params.layer(i), x, positions, attend)
    return (*(jnp.stack(part) for part in zip(*seen, strict=True)), params.unembed(x)[0])


def model_tree(params, tokens, config, seed=0, clusters=(4, 14)):
    """A calibrated tree of tokens [S+W] without K-means: random labels, keys of a plain forward pass."""
    q, k, v, _ = plain_forward(params, tokens)
    rng = np.random.default_rng(seed)
    L, K, S = k.shape[0], k.shape[1], k.shape[2] - config.always_read
    labels = [rng.integers(0, C, (L, K, below)) for C, below in zip(clusters, (*clusters[1:], S), strict=True)]
    for entry, C in zip(labels, clusters, strict=True):
        entry[0, 0, 0] = C - 1
    tree = squeezejax.build_tree(k, v, config, labels=tuple(labels))
    tree = squeezejax.calibrate(tree, q[:, :, -max(config.observation_window, 1) :])
    return dataclasses.replace(tree, fingerprint=params.config.fingerprint)


@contextlib.contextmanager
def no_host_sync():
    """Fails on every read of a device value by the host: int, bool, float, item, numpy.asarray, printing."""
    array = type(jnp.zeros(1))
    original = array._value

    def refuse(self):
        raise AssertionError("the host read a value from the device")

    array._value = property(refuse)
    try:
        yield
    finally:
        array._value = original
