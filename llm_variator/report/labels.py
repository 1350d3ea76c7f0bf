"""Labels beside the points of a drawing: each where it covers no other label and no point. Knows matplotlib only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

Box = tuple[float, float, float, float]  # left, bottom, right, top, in points

_NEAR, _FAR = 6.0, 30.0  # points between point and label
_STEPS = 9


def beside(
    axes: Any,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    size: float,
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]] = (),
) -> None:
    """Write `labels` beside `points`; a label that found no room close by gets a thin line.

    `lines` across or upright, from one end to the other, are to be left free as well. All in data coordinates.

    The figure must have 72 dots per inch, its layout and its limits: places are found in points. Greedy: from the
    rightmost point to the left, the first free place among right, left, above and below, then farther up and down.
    """
    renderer = axes.figure.canvas.get_renderer()
    pixels = [tuple(map(float, axes.transData.transform(point))) for point in points]
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in pixels]
    for ends in lines:
        (x0, y0), (x1, y1) = (map(float, axes.transData.transform(end)) for end in ends)
        taken.append((min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1))
    frame = axes.get_window_extent(renderer)
    for place in sorted(range(len(points)), key=lambda i: (-pixels[i][0], -pixels[i][1])):
        (x, y), label = pixels[place], labels[place]
        text = axes.annotate(
            label, points[place], xytext=(0, 0), textcoords="offset points", fontsize=size,
            annotation_clip=False, ha="left", va="bottom",
        )  # fmt: skip
        text.set_in_layout(False)
        own = text.get_window_extent(renderer)
        width, height = own.width, own.height
        best = min(
            _offsets(width, height),
            key=lambda offset: (
                _covered((x + offset[0], y + offset[1], width, height), taken, frame, pixels[place]),
                offset[2],
            ),
        )
        dx, dy, distance = best
        text.set_position((dx, dy))
        left, bottom = x + dx, y + dy
        taken.append((left, bottom, left + width, bottom + height))
        if distance >= 2:
            end = (dx if dx > 0 else dx + width, dy + height / 2)
            line = axes.annotate(
                "", points[place], xytext=end, textcoords="offset points", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": text.get_color(), "alpha": 0.5, "shrinkA": 0},
            )  # fmt: skip
            line.set_in_layout(False)


def _offsets(width: float, height: float) -> list[tuple[float, float, int]]:
    """Places of a label's lower left corner from its point, and how far out each is: 0 the nearest."""
    middle = -height / 2
    found = [
        (_NEAR, middle, 0),
        (-_NEAR - width, middle, 0),
        (-width / 2, _NEAR, 1),
        (-width / 2, -_NEAR - height, 1),
    ]
    for step, out in itertools.product(range(1, _STEPS), (_NEAR, _FAR)):
        for up in (step, -step):
            dy = middle + up * height * 0.8
            found += [(out, dy, 1 + step), (-out - width, dy, 1 + step)]
    return found


def _covered(box: Box, taken: Sequence[Box], frame: Any, point: tuple[float, ...]) -> float:
    """Square points of the label at (left, bottom, width, height) over what is there, or outside the frame."""
    left, bottom, width, height = box
    right, top = left + width, bottom + height
    inside = max(0.0, min(right, frame.x1) - max(left, frame.x0)) * max(
        0.0, min(top, frame.y1) - max(bottom, frame.y0)
    )
    outside = width * height - inside
    over = sum(
        max(0.0, min(right, b[2]) - max(left, b[0])) * max(0.0, min(top, b[3]) - max(bottom, b[1]))
        for b in taken
    )
    return round(outside + over, 3)
