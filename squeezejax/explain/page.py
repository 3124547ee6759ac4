"""An `Explanation` as one HTML page that needs nothing else: no network, and no JavaScript for its basic marks.

The template is page.html, with page.css and page.js put into it. Numbers for every token travel as bytes,
compressed: a row for the whole answer, one for every head and one for every token of the answer, and in each what was
attended, kept and missed. Text reaches the page through the template alone, which escapes it; should a text still find
a way to run as a script, the page's content security policy allows no script but its own, and no connection at all.
"""

import base64
import dataclasses
import gzip
import hashlib
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from squeezejax.chat.shown import shown, shown_line
from squeezejax.explain.answer import Explanation
from squeezejax.explain.text import Piece, passages

MOST_SHOWN = 10_000  # tokens of the text on a page; of longer texts the passages with most attention are shown
MOST_ROWS = 256  # tokens of the answer that can be clicked
MOST_LISTED = 8  # passages in a list
LOWEST_MASS = 1e-5  # attention below this counts as none
# Shades: a token's is the number of bounds that its value reaches.
MASS_BOUNDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SHARE_BOUNDS = (1e-9, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
KINDS = ("attended", "kept", "missed")
UNSURE = 0.5  # a word written with less probability is marked
SEEN = 0.001  # a passage is listed from this much attention on


@dataclasses.dataclass(frozen=True)
class About:
    """What a page says besides what was read."""

    question: str
    answer: list[Piece]
    dense_answer: str | None  # the reply of the same model when it reads every key; None = the same
    context: list[Piece]  # S+W
    sparsity: float  # as asked for
    tree: str  # its file


def render(found: Explanation, about: About) -> str:
    """The page."""
    about = _shown(about)
    S = found.head_kept.shape[2]
    L, K = found.kept.shape[1:]
    window = found.sinks + S  # where it begins
    parts = passages(about.context, window)
    totals = [_whole_row(found, kind) for kind in KINDS]
    shown = _choose(parts, totals[0] + totals[2])
    tokens = np.concatenate([np.arange(part.start, part.stop) for part in shown])
    codes = _rows(found, tokens)
    css, js = (_here(name) for name in ("page.css", "page.js"))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent}
    return environment.from_string(_here("page.html")).render(
        about=about,
        found=found,
        css=Markup(css),
        js=Markup(js),
        css_hash=_hash(css),
        js_hash=_hash(js),
        words=_words(found, about.answer),
        S=S,
        W=len(about.context) - window,
        sinks=found.sinks,
        blocks=list(_blocks(about.context, shown, _classes(codes[0]), window)),
        lists={kind: _top(about, parts, totals[KINDS.index(kind)], found, window) for kind in ("attended", "missed")},
        map=_map(found),
        shape=(L, K),
        mass_bounds=MASS_BOUNDS,
        share_bounds=SHARE_BOUNDS,
        meta={
            "tokens": len(tokens),
            "positions": [[part.start, part.stop] for part in shown],
            "window": window,
            "heads": L * K,
            "headsPerLayer": K,
            "listed": MOST_LISTED,
            "seen": SEEN,
            "lowestMass": LOWEST_MASS,
            "massBounds": _mass_codes(np.array(MASS_BOUNDS)).tolist(),
            "shareBounds": _share_codes(np.array(SHARE_BOUNDS)).tolist(),
            "gridBounds": SHARE_BOUNDS,
        },
        codes=_pack(codes),
        grid=_pack(_grid(found)),
    )


def _shown(about: About) -> About:
    """Control characters are shown as they are written in programs: pages know none, and some turn a text around."""
    pieces = lambda found: [dataclasses.replace(piece, text=shown(piece.text)) for piece in found]
    return dataclasses.replace(
        about,
        question=shown(about.question),
        answer=pieces(about.answer),
        dense_answer=None if about.dense_answer is None else shown(about.dense_answer),
        context=pieces(about.context),
        tree=shown_line(about.tree),
    )


def percent(share: float) -> str:
    """A share in words: one decimal, two significant digits below 1 %."""
    value = 100 * float(share)
    if value == 0:
        return "0 %"
    return f"{value:.1f} %" if value >= 0.95 else f"{value:.2g} %" if value >= 0.001 else "below 0.001 %"


# ---- What is shown of the text


def _choose(parts: list[range], weight: np.ndarray) -> list[range]:
    """The passages to show, in order: all, or as many as MOST_SHOWN tokens allow, those with most weight first."""
    by_weight = sorted(parts, key=lambda part: -weight[part.start : part.stop].sum())
    chosen, room = [], MOST_SHOWN
    for part in by_weight:
        if len(part) <= room:
            chosen.append(part)
            room -= len(part)
    return sorted(chosen, key=lambda part: part.start)


def _blocks(context: list[Piece], shown: list[range], classes: list[str], window: int):
    """A passage each: its first token's number, its tokens as (class, text), how many are left out before it."""
    classes = iter(classes)
    end = 0
    for part in [*shown, range(len(context), len(context))]:
        tokens = [(next(classes) + " special" * context[i].special, context[i].text) for i in part]
        window_begins = end <= window <= part.start < len(context)
        yield {"start": part.start, "tokens": tokens, "gap": part.start - end, "window_begins": window_begins}
        end = part.stop


def _words(found: Explanation, answer: list[Piece]) -> list[dict]:
    """Tokens of the answer with white space apart, and the row of codes that each can show."""
    first = 1 + found.kept[0].size
    return [
        {
            "before": piece.text[: len(piece.text) - len(piece.text.lstrip())] if p else "",
            "text": piece.text.strip() or "␣",
            "after": piece.text[len(piece.text.rstrip()) :] if piece.text.strip() else "",
            "class": "word" + " special" * piece.special + " unsure" * bool(found.probabilities[p] < UNSURE),
            "row": first + p if p < MOST_ROWS else None,
            "probability": found.probabilities[p],
            "kept": found.kept[p].mean(),
            "missed": found.missed[p].mean(),
        }
        for p, piece in enumerate(answer)
    ]


def _top(about: About, parts: list[range], total: np.ndarray, found: Explanation, window: int) -> list[dict]:
    """The passages with most of `total` f32[sinks+S+W], and what else is known of them."""
    # Models park attention on the first token and on marks of the template, which says nothing of the text there.
    weight = np.where([piece.special for piece in about.context], 0, total)
    weight[0] = 0
    kept = _whole_row(found, "kept")
    ranked = sorted(parts, key=lambda part: -weight[part.start : part.stop].sum())
    return [
        {
            "start": part.start,
            "text": "".join(about.context[i].text for i in part if not about.context[i].special).strip(),
            "value": weight[part.start : part.stop].sum(),
            "kept": kept[part.start : part.stop].mean(),
            "window": part.start >= window,
        }
        for part in ranked[:MOST_LISTED]
        if weight[part.start : part.stop].sum() >= SEEN
    ]


# ---- Numbers


def _whole_row(found: Explanation, kind: str) -> np.ndarray:
    """f32[sinks+S+W]: one kind, over the whole answer."""
    return _padded(getattr(found, f"token_{kind}").mean(axis=0), kind, found)


def _padded(values: np.ndarray, kind: str, found: Explanation) -> np.ndarray:
    """Values of the clustered tokens [… S], between those of sinks and window: always kept, never missed."""
    missing = found.token_attended.shape[1] - values.shape[-1]
    before = min(found.sinks, missing)  # none where values are of all tokens
    around = [(0, 0)] * (values.ndim - 1) + [(before, missing - before)]
    return np.pad(values, around, constant_values=np.float32(kind == "kept"))


def _rows(found: Explanation, tokens: np.ndarray) -> np.ndarray:
    """u8[rows kinds tokens]: the whole answer, every head, every token of the answer."""
    kinds = []
    for kind in KINDS:
        code = _share_codes if kind == "kept" else _mass_codes
        heads = getattr(found, f"head_{kind}")
        rows = (_whole_row(found, kind)[None], heads.reshape(-1, heads.shape[2]), getattr(found, f"token_{kind}"))
        rows = [_padded(x[:MOST_ROWS] if x is rows[2] else x, kind, found)[:, tokens] for x in rows]
        kinds.append(code(np.concatenate(rows)))
    return np.stack(kinds, axis=1)


def _mass_codes(mass: np.ndarray) -> np.ndarray:
    """Attention on a logarithmic scale, u8: 0 below LOWEST_MASS, 255 for all of it; steps of 4.6 %."""
    log = 1 - np.log(np.maximum(mass, LOWEST_MASS)) / np.log(LOWEST_MASS)
    return np.where(mass < LOWEST_MASS, 0, np.clip(np.rint(255 * log), 1, 255)).astype(np.uint8)


def _share_codes(share: np.ndarray) -> np.ndarray:
    """Shares, u8: 0 and 255 mean none and all, exactly."""
    code = np.clip(np.rint(255 * share), 1, 254)
    return np.where(share <= 0, 0, np.where(share >= 1 - 1e-6, 255, code)).astype(np.uint8)


def _classes(codes: np.ndarray) -> list[str]:
    """CSS classes of every token: a, k and m with the shade of what was attended, kept and missed; u8[kinds tokens]."""
    mass, share = _mass_codes(np.array(MASS_BOUNDS)), _share_codes(np.array(SHARE_BOUNDS))
    bounds = (mass, share, mass)
    shades = [np.searchsorted(bound, row, side="right") for bound, row in zip(bounds, codes, strict=True)]
    return [f"t a{a} k{k} m{m}" for a, k, m in zip(*shades, strict=True)]


def _grid(found: Explanation) -> np.ndarray:
    """u16[1+P kinds L·K], in 65,535ths: the mean over passes, then every pass."""
    passes = np.stack([getattr(found, kind) for kind in KINDS], axis=1)
    grid = np.concatenate([passes.mean(axis=0, keepdims=True), passes[:MOST_ROWS]])
    return np.rint(65535 * np.clip(grid, 0, 1)).astype("<u2").reshape(*grid.shape[:2], -1)


def _map(found: Explanation) -> list[list[dict]]:
    """The table of layers and heads: a cell's class and its share of each kind."""
    mean = {kind: getattr(found, kind).mean(axis=0) for kind in KINDS}
    L, K = found.kept.shape[1:]
    shade = lambda share: np.searchsorted(SHARE_BOUNDS, share, side="right")
    cell = lambda at: {
        "class": " ".join(f"{kind[0]}{shade(mean[kind][at])}" for kind in KINDS),
        "row": 1 + at[0] * K + at[1],
        "attended": mean["attended"][at],
        **{kind: f"{100 * mean[kind][at]:.1f}" for kind in ("kept", "missed")},
    }
    return [[cell((layer, head)) for head in range(K)] for layer in range(L)]


def _pack(numbers: np.ndarray) -> str:
    return base64.b64encode(gzip.compress(numbers.tobytes(), mtime=0)).decode()


def _hash(text: str) -> str:
    """As a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _here(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
