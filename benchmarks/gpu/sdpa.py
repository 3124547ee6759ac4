"""PyTorch's scaled_dot_product_attention for one query token, all back ends: `python -m benchmarks.gpu.sdpa SHAPES`.

SHAPES is JSON, [[query heads, key/value heads, keys], …], heads of 128 in bfloat16. A process of its own, so that two
libraries do not fight for the memory of one device. Prints one line of JSON: shape -> back end -> seconds, or why not.
"""

import json
import sys
import time

HEAD_DIM = 128


def measure(torch, call, steps: int) -> float:
    """Median seconds of a call, of which `steps` are queued one after another."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    call()
    times = []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            call()
        synchronize()
        times.append((time.perf_counter() - start) / steps)
    return sorted(times)[2]


def time_shape(torch, heads: int, kv_heads: int, num_keys: int) -> dict:
    """Seconds of each back end with the heads grouped, or why it does not run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = lambda *shape: torch.randn(shape, dtype=torch.bfloat16, device=device)
    q = random(1, heads, 1, HEAD_DIM)
    k, v = (random(1, kv_heads, num_keys, HEAD_DIM) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    steps = 100 if device == "cuda" else 1
    found = {}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)), torch.no_grad():
                found[name] = measure(torch, lambda: attend(q, k, v, enable_gqa=heads != kv_heads), steps)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return found


def main():
    try:
        import torch
    except ImportError as error:
        print(json.dumps({"not installed": str(error)}))
        return
    shapes = json.loads(sys.argv[1])
    results = {"/".join(map(str, shape)): time_shape(torch, *shape) for shape in shapes}
    print(json.dumps({"torch": torch.__version__, **results}))


if __name__ == "__main__":
    main()
