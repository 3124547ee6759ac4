"""Faults planted in the kernels, one at a time, and what sees them: `python tests/kernels/planted_faults.py [CASE …]`.

Every wait for a barrier, arrival at one (a release is one), `commit_smem` and wait for a store is left out in turn; the
kernel is then interpreted at a size at which its rings wrap, against float64 and with race detection. Writes
benchmarks/results/planted_faults.md. A quarter of an hour of one core: not part of any lane.
"""

import contextlib
import functools
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from processes import INTERPRETING

HERE = pathlib.Path(__file__)
ROOT = HERE.parents[2]
TABLE = ROOT / "benchmarks" / "results" / "planted_faults.md"
OPERATIONS = ("barrier_wait", "barrier_arrive", "commit_smem", "wait_smem_to_gmem")
POLL = 0.2  # seconds between looks at a process
IDLE = 60  # looks in a row without work after which it hangs: not seconds, in which it may have been stopped
MOST = 400.0  # seconds of CPU time that one may take
NOTHING = "**nothing**"
INTRO = f"""# Planted faults

Written by `python tests/kernels/{HERE.name}`: each row is a line of a kernel that was left out, alone, and what then
saw that it was missing: race detection, the comparison with float64, the interpreter itself, or a hang (which ends by
timeout). A line within a loop is missing in every turn. A line that several kernels share is left out of the first of
them, and of the next ones until something sees it.

`keep_clusters`, `merge_shares` and `sparse_prefill_merge` have no such line: they use registers only, or Mosaic's own
barriers, as `centroid_scores`, `keep_keys` and `list_items` do around what they keep in shared memory.

What nothing sees is a `commit_smem`, of one of two kinds. It is a barrier of one warpgroup: the interpreter runs a
warpgroup as one thread, so that its warps cannot race. Or it is a fence between ordinary accesses and those of wgmma,
which the interpreter takes for synchronous. No check can show these; that they are needed was read from the code.
"""


def sparse_decode():
    import interpreted_attention as attention

    config = attention.sparse_decode.Config(stages=2, num_ctas=1)
    attention.check([[60, 3], [0, 20]], R=512, config=config, window=20, room=9)


def centroid_scores():
    import interpreted_selection as selection

    with selection.one_cta():
        selection.check((300, 400), K=2, L=1, S=900, fraction=0.8, dead=0.0)


def codes():
    import interpreted_selection as selection

    with selection.one_cta():
        selection.check_codes((300,), K=2, L=1, S=900, unit=1, fraction=0.6, dead=0.0)


def sparse_prefill(H: int = 64):
    import dataclasses

    import test_prefill

    from squeezejax.pallas_kernels.hopper import sparse_prefill

    sparse_prefill.count_ctas = lambda per_multiprocessor: 1
    config = dataclasses.replace(sparse_prefill.CONFIGS[H], keys=64, stages=2)
    test_prefill.check_attention([50, 0, 21, 9], H=H, R=512, config=config)


def block_scores():
    import test_block_scores

    test_block_scores.deep()


def kmeans_assign():
    import numpy as np
    import test_kmeans_assign as kmeans

    rng = np.random.default_rng(0)
    kmeans.check_nearest(
        kmeans.unit(rng, 1, 130, 64), kmeans.unit(rng, 1, 1100, 64), config=kmeans.kmeans_assign.Config(64, 2)
    )


CASES = {
    "sparse_decode": sparse_decode,
    "centroid_scores, keep_clusters, list_items": centroid_scores,
    "the same and keep_keys, of codes": codes,
    "sparse_prefill": sparse_prefill,
    "sparse_prefill, heads of 192": functools.partial(sparse_prefill, 192),
    "score_statistics, score_sums": block_scores,
    "kmeans_assign": kmeans_assign,
}


def plant(case: str, fault: str | None):
    """In a process of its own: runs a case without one of its lines, and prints all lines that could be left out."""
    sys.path.insert(0, str(HERE.parent))
    import jax.experimental.pallas.mosaic_gpu as plgpu

    sites = {}

    def leave_out(operation, original, *arguments, **options):
        frames = [f for f in inspect.stack()[1:] if "/hopper/" in f.filename]
        # What a ring does is the fault of the kernel that it is a part of.
        frame = next(f for f in frames if not f.filename.endswith("/ring.py"))
        site = f"{pathlib.Path(frame.filename).name}:{frame.lineno}:{operation}"
        sites[site] = f"{frame.function}: {frame.code_context[0].strip()}"
        if site != fault:
            original(*arguments, **options)

    for operation in OPERATIONS:
        setattr(plgpu, operation, functools.partial(leave_out, operation, getattr(plgpu, operation)))
    try:
        CASES[case]()
    finally:
        print("\nSITES " + json.dumps(sites), flush=True)


def run(case: str, fault: str | None) -> tuple[str, dict]:
    """(what was seen, the lines that the case comes to) of one fault; ends a process that hangs."""
    command = [sys.executable, HERE, "--plant", case, *([fault] if fault else [])]
    environment = os.environ | INTERPRETING
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=environment)
        hangs = _wait(process)
        out.seek(0), err.seek(0)
        printed, complaint = out.read(), err.read()
    sites = next((json.loads(line[6:]) for line in printed.splitlines() if line.startswith("SITES ")), {})
    seen = ["a race"] if "RACE DETECTED" in printed else []
    if hangs:
        seen.append("a hang")
    elif "AssertionError" in complaint:
        seen.append("a wrong result")
    elif process.returncode:
        errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", complaint, re.M) or [
            "it ended with " + str(process.returncode)
        ]
        seen.append("an error: " + re.sub(r"\d{9,}", "…", errors[-1])[:100].replace("|", "/"))
    return ", ".join(seen) or NOTHING, sites


def _wait(process) -> bool:
    """Whether it had to be ended: when `IDLE` times in a row none of its threads wanted to run, or after `MOST`."""
    idle = 0
    while process.poll() is None:
        time.sleep(POLL)
        used, idle = 0.0, idle + 1
        for thread in pathlib.Path(f"/proc/{process.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                state, *numbers = thread.read_text().rsplit(")", 1)[1].split()
                used += sum(map(int, numbers[10:12])) / os.sysconf("SC_CLK_TCK")
                if state in "RDT":
                    idle = 0
        if idle > IDLE or used > MOST:
            process.kill()
            process.wait()
            return True
    return False


def write(found: list):
    """The table of (case, place, line, operation, seen)."""
    lines = [INTRO, "| kernel | place | left out | seen by |", "|---|---|---|---|"]
    lines += [f"| {case} | `{place}` | `{text}` | {seen} |" for case, place, text, seen in found]
    hidden = sum(seen.startswith(NOTHING) for *_, seen in found)
    lines += ["", f"{len(found)} faults, of which {len(found) - hidden} are seen."]
    TABLE.write_text("\n".join(lines) + "\n")


def main(chosen):
    """Plants every fault of the chosen cases, and writes the table after each; rows of other cases stay."""
    rows = re.findall(r"^\| (.*) \| `(.*)` \| `(.*)` \| (.*) \|$", TABLE.read_text() if TABLE.exists() else "", re.M)
    found = [row for row in rows if row[0] in CASES and row[0] not in (chosen or CASES)]
    known = set()  # lines whose absence something has seen
    for case in chosen or CASES:
        start = time.monotonic()
        seen, sites = run(case, None)
        print(case, "without a fault:", seen, f"{time.monotonic() - start:.0f} s,", len(sites), "lines", flush=True)
        if seen != NOTHING:
            raise SystemExit(f"{case} fails as it is")
        for site, text in sites.items():
            if site in known:
                continue
            seen, _ = run(case, site)
            if seen != NOTHING:
                known.add(site)
            file, _, _ = site.split(":")
            function, code = text.split(": ", 1)
            print(" ", site, function, "->", seen, flush=True)
            found.append((case, f"{file} {function}", code.replace("|", "/"), seen))
            write(found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plant"]:
        plant(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
    else:
        main(sys.argv[1:])
