"""The Hopper kernels as a backend: decode for both rules, prefill for the paper's, K-means assignment.

They have been interpreted and compiled for an H200, but never run on one: where nothing is named, each first has to
agree with float64 on the device at hand, once for each size.
"""

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import cudnn
from squeezejax.pallas_kernels.interface import Attended, Layout, Own, Reading
from squeezejax.pallas_kernels.layout import from_lanes, to_lanes
from squeezejax.pallas_kernels.xla.backend import attend_window, join_blocks, own_block
from squeezejax.pallas_kernels.xla.softmax import merge

GRANULE = 8  # rows that a kernel fetches together


class Hopper:
    """The backend "mosaic"; see `interface.Backend` for its methods."""

    name = "mosaic"
    checked = "against float64 on this device before its first use, and interpreted in tests; never run on a GPU yet"
    forced = False  # taken to run here: for the interpreter and for compiling without a device

    def missing(self) -> str | None:
        """Why it cannot run on this machine."""
        if jax.__version_info__ < (0, 11):
            return f"needs JAX 0.11 or later, and this is {jax.__version__}"
        if self.forced:
            return None
        device = jax.devices()[0]
        if device.platform != "gpu" or not str(getattr(device, "compute_capability", "")).startswith("9."):
            return f"needs a Hopper GPU, and this is {device.device_kind}"
        return None

    def layout(self, dtype) -> Layout:
        """Whole granules of 16-bit rows, the only ones it takes."""
        return Layout(GRANULE, GRANULE) if dtype.itemsize == 2 else Layout(1, 1)

    def check(self, task: str, *arguments):
        """Sizes to prove; NotImplementedError for what the kernels do not take."""
        if task == "nearest":
            from squeezejax.pallas_kernels.hopper import mosaic

            (head_dim,) = arguments
            mosaic.check_heads(head_dim)
            return (head_dim,)
        if task == "attend_chunk":
            raise NotImplementedError("the kernels attend to squeezed contexts only")
        tree, q, own, reading, context = arguments
        if reading.estimates:
            raise NotImplementedError("the kernels estimate nothing")
        if reading.per_user:
            raise NotImplementedError("the kernels take one sparsity for all users")
        if context is not None:
            raise NotImplementedError("the kernels take a context that lies on one device")
        if tree.config.cache_bits == 8:
            raise NotImplementedError("the kernels read keys and values in 16 bits, not in 8")
        B, T, K, G, H = q.shape
        rows = jax.ShapeDtypeStruct((B, T, K * G, H), q.dtype)
        bits = _index_bits(tree)
        if task == "decode":
            from squeezejax.pallas_kernels.hopper import decode

            decode.check(rows, tree.keys, tree.window_keys, own.keys)
            return H, G, str(q.dtype), *bits
        if bits:
            raise NotImplementedError("the kernels for blocks of tokens take trees of the paper's rule only")
        from squeezejax.pallas_kernels.hopper import prefill

        prefill.check(rows, tree.keys)
        return H, str(q.dtype)

    def prove(self, task: str, sizes):
        """A small run of each, compared with float64, twice in a row."""
        from squeezejax.pallas_kernels.hopper import self_check

        checks = {"decode": "decode_step", "prefill": "prefill_blocks", "nearest": "assignment"}
        getattr(self_check, checks[task])(*sizes)

    def decode(self, tree, q, own: Own, layer, reading: Reading, context: str | None = None) -> Attended:
        """Fixed context, window and own tokens, all by the decode kernels."""
        from squeezejax.pallas_kernels.hopper import decode

        own_keys = own.keys, own.values
        cache = decode.Cache(tree.keys, tree.values, tree.num_keys, tree.window_keys, tree.window_values, *own_keys)
        step = decode.Step(jnp.reshape(jnp.asarray(layer, jnp.int32), 1), reading.log_T, own.start, own.lengths)
        out, lse, num_kept = decode.attend_kept(q[:, 0], cache, decode.Index.of(tree), step)
        kept = num_kept.astype(jnp.float32) / (q.shape[2] * tree.num_keys)
        return Attended(out[:, None], lse[:, None], kept)

    def prefill(self, tree, q, own: Own, layer, reading: Reading, context: str | None = None) -> Attended:
        """All blocks select and attend to what they keep in a few launches; what needs no selection goes by blocks."""
        from squeezejax.pallas_kernels.hopper import prefill

        B, T, K, G, H = q.shape
        block = min(tree.config.query_block or T, T)
        n = -(-T // block)
        q = jnp.pad(q, ((0, 0), (0, n * block - T), (0, 0), (0, 0), (0, 0)))
        to_blocks = lambda x: jnp.swapaxes(x.reshape(B, n, block, *x.shape[2:]), 0, 1)
        tokens_and_heads = q.reshape(B, -1, K * G, H)
        fused = None
        if cudnn.usable(tokens_and_heads, own.keys):
            with jax.named_scope("attend_user_tokens"):
                fused = cudnn.attend_own(tokens_and_heads, own.keys, own.values, own.start)
                fused = jax.tree.map(to_blocks, fused)

        def visit(index):
            part, valid, attended = own_block(q, own, index * block, block, T)
            if fused is not None:
                attended = jax.tree.map(lambda x: x[index], fused)  # the other is then never computed
            window = [tuple(from_lanes(x, G) for x in found) for found in attend_window(tree, to_lanes(part), layer)]
            return merge(attended, *window), valid

        attended, valid = jax.lax.map(visit, jnp.arange(n))
        rows = jax.vmap(to_lanes)(to_blocks(q)).reshape(n * B * K, block * G, H)
        finest = tree.levels[-1]
        if reading.log_T is None:
            kept = jnp.ones((n * B * K, finest.counts.shape[2]), bool)
        else:
            row_valid = jnp.repeat(valid.reshape(n * B, block), G, axis=1)
            kept = prefill.select(rows, row_valid, tree.levels, layer, reading.log_T)
        with jax.named_scope("attend_kept_keys"):
            found = prefill.attend_kept(
                rows, tree.keys, tree.values, kept, finest.starts[layer], finest.counts[layer], layer
            )
        back = lambda x: from_lanes(x.reshape(n * B, K, *x.shape[1:]), G).reshape(n, B, block, K, G, *x.shape[2:])
        share = jnp.mean(found.num_kept.reshape(n, B, K).astype(jnp.float32), axis=2) / tree.num_keys
        out, lse = merge(attended, (back(found.out), back(found.lse)))
        tokens = jnp.sum(valid.astype(jnp.float32), axis=2)
        found = join_blocks(Attended(out, lse, share), tokens)
        return found._replace(out=found.out[:, :T], lse=found.lse[:, :T])

    def attend_chunk(self, q, k, v, start, before):
        """Never: `check` refuses it."""
        raise NotImplementedError("the kernels attend to squeezed contexts only")

    def nearest(self, rows, centres, *, with_second: bool):
        """By the assignment kernel."""
        from squeezejax.pallas_kernels.hopper import kmeans_assign

        return kmeans_assign.nearest(rows, centres, with_second=with_second)


def _index_bits(tree) -> tuple[int, ...]:
    """The index that kernels are to score: () of float32 means by the paper's rule, else (index_bits, key_bits)."""
    config, coarsest = tree.config, tree.levels[0]
    if config.score == "mean":
        if coarsest.centroids is None or coarsest.centroids.dtype != "f4":
            raise NotImplementedError("the kernels score float32 means of clusters by the paper's rule only")
        return ()
    from squeezejax.pallas_kernels.hopper.scores import CODED_HEAD_DIMS

    if tree.keys.shape[-1] not in CODED_HEAD_DIMS:
        raise NotImplementedError(f"the kernels score codes of head sizes {CODED_HEAD_DIMS}, got {tree.keys.shape[-1]}")
    packed = [coarsest.codes, *([tree.key_codes] if config.key_bits else [])]
    if any(x is None or x.shape[-1] % 16 for x in packed):  # the least that TMA can fetch
        raise NotImplementedError(
            "the kernels take codes of centroids and of keys whose rows are multiples of 16 bytes, got index_bits="
            f"{config.index_bits} and key_bits={config.key_bits} of {tree.keys.shape[-1]} numbers"
        )
    return config.index_bits, config.key_bits
