"""Draw concept.svg: what a plugin does to a prompt in each layer. `python docs/figures/concept.py` writes it anew.

The picture lies on a light card of its own, so that it reads the same on light and on dark pages.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 1000, 356
CELL, GAP = 22, 4
STEP = CELL + GAP

HUES = ("#2a6fdb", "#0f9d76", "#d98a00", "#c2427f")  # one per group of two tokens
DENSE, NEW, INK, QUIET, LINE = "#8a94a6", "#5b4bc4", "#1c2430", "#566070", "#9aa4b2"

HEAD, TAIL = [DENSE] * 2, [DENSE] * 3
TOKENS = [*HEAD, *(hue for hue in HUES for _ in range(2)), *TAIL]
MERGED = [*HEAD, *HUES, *TAIL]


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 14,
    fill: str = INK,
    bold: bool = False,
    anchor: str = "start",
) -> str:
    """One line of text."""
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{fill}"{weight}>{escape(words)}</text>'


def cells(x: float, y: float, fills: list[str], *, pale: bool = False) -> str:
    """A row of vectors; `pale`: those that are no token's own."""
    return "".join(
        f'<rect x="{x + STEP * place:g}" y="{y:g}" width="{CELL}" height="{CELL}" rx="4" fill="{fill}"'
        + (' fill-opacity="0.55"/>' if pale and fill != DENSE else "/>")
        for place, fill in enumerate(fills)
    )


def width(fills: list[str]) -> int:
    """Of such a row."""
    return STEP * len(fills) - GAP


def arrow(*points: tuple[float, float]) -> str:
    """A line with a head at its end."""
    way = " L".join(f"{x:g} {y:g}" for x, y in points)
    stroke = f'fill="none" stroke="{LINE}" stroke-width="2" stroke-linejoin="round"'
    return f'<path d="M{way}" {stroke} marker-end="url(#head)"/>'


def funnel(left: float, right: float, top: float, to: float, bottom: float, fill: str) -> str:
    """A group of tokens that becomes one vector."""
    points = f"{left:g},{top:g} {right:g},{top:g} {to + CELL:g},{bottom:g} {to:g},{bottom:g}"
    return f'<polygon points="{points}" fill="{fill}" fill-opacity="0.22"/>'


def box(x: float, y: float, wide: float, high: float, name: str, note: str) -> str:
    """A part of the frozen model."""
    size, centre = f'width="{wide:g}" height="{high:g}"', (x + wide / 2, y + high / 2)
    return "".join(
        (
            f'<rect x="{x:g}" y="{y:g}" {size} rx="8" fill="#ffffff" stroke="{LINE}" stroke-width="1.5"/>',
            text(centre[0], centre[1] - 4, name, anchor="middle"),
            text(centre[0], centre[1] + 14, note, anchor="middle", size=12, fill=QUIET),
        )
    )


def bracket(x: float, wide: float, y: float, words: str) -> str:
    """What a stretch of tokens is, above it."""
    return (
        f'<path d="M{x:g} {y + 5:g} v-5 h{wide:g} v5" fill="none" stroke="{LINE}" stroke-width="1.5"/>'
        + text(x + wide / 2, y - 7, words, size=12, fill=QUIET, anchor="middle")
    )


def draw() -> str:
    """The whole picture."""
    left, top, low = 36, 104, 214
    middle = left + (width(TOKENS) - width(MERGED)) / 2
    parts = [text(left, 44, "A prompt of n tokens, inside a layer", bold=True)]
    parts += [
        bracket(left, width(HEAD), top - 12, "head"),
        bracket(left + 2 * STEP, width(TOKENS[2:10]), top - 12, "groups of k tokens (k = 2)"),
        bracket(left + 10 * STEP, width(TAIL), top - 12, "tail"),
        cells(left, top, TOKENS),
    ]
    for group, hue in enumerate(HUES):
        begin = left + STEP * (2 + 2 * group)
        parts.append(
            funnel(begin, begin + width([hue] * 2), top + CELL, middle + STEP * (2 + group), low, hue)
        )
    parts.append(cells(middle, low, MERGED))
    parts += [
        text(
            left + width(TOKENS) / 2, low + CELL + 22, "merged: about n/k vectors", anchor="middle", bold=True
        ),
        text(
            left + width(TOKENS) / 2,
            low + CELL + 41,
            "head and tail stay dense",
            anchor="middle",
            size=12,
            fill=QUIET,
        ),
    ]

    out, fork, high, down = middle + width(MERGED) + 8, 420, 118, 262
    centre, boxes, right = low + CELL / 2, 448, 636
    parts += [
        arrow((out, centre), (fork, centre), (fork, high), (boxes - 4, high)),
        arrow((fork, centre), (fork, down), (boxes - 4, down)),
        box(boxes, high - 30, 150, 60, "frozen FFN", "runs on n/k vectors"),
        box(boxes, down - 30, 150, 60, "frozen key, value", "projections, the same"),
        arrow((boxes + 154, high), (right - 6, high)),
        arrow((boxes + 154, down), (right - 6, down)),
    ]
    parts += [
        text(right, high - 47, "restored: one output per token", bold=True),
        text(right, high - 28, "by a small trained adapter", size=12, fill=QUIET),
        cells(right, high - CELL / 2, TOKENS, pale=True),
    ]
    new = [NEW] * 4
    begin = right + width(MERGED) + GAP
    parts += [
        text(right, down - 28, "KV cache: about n/k entries", bold=True),
        cells(right, down - CELL / 2, MERGED),
        cells(begin, down - CELL / 2, new),
        text(begin + width(new), down + 31, "generated tokens, dense", size=12, fill=NEW, anchor="end"),
        text(right, down + 31, "the prompt", size=12, fill=QUIET),
    ]
    parts.append(
        text(
            left,
            HEIGHT - 22,
            "The base model is frozen. Merging and restoring are the plugin: a few megabytes, "
            "swapped by moving a pointer.",
            size=13,
            fill=QUIET,
        )
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'role="img" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif">',
            "<title>Groups of k neighbouring prompt tokens are merged for the FFN and for the KV cache</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>',
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="14" fill="#f7f8fa" stroke="#d5dae1"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
