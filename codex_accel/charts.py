"""Charts of a web page as inline SVG: histograms, curves over steps, intervals on a scale.

Rule: a chart draws nothing that does not stand beside it as text. Its labels are values of the report with their places
(see `page`), but for the ends of an interval's scale, which are of the class `scale`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from codex_accel.page import At, amount, amount_text, element, plain, table

WIDTH, HEIGHT, TOP, BOTTOM = 360, 190, 24, 166
LEFT = 78  # for the labels of a curve's ends
MAX_BUCKETS = 300  # of a curve; of the points in one, the lowest and the highest are drawn
Point = tuple[int, float, float]  # line of the log, x, y


def _svg(name: str, parts: Iterable[str], *, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


# ----------------------------------------------------------------------------------------------------------- histograms


def histogram(
    bins: At, *, caption: str, name: str, columns: tuple[str, str], tell: Callable[[dict[str, Any]], str]
) -> str:
    """A figure with a bar for each of `bins` (`low`, `high`, `count`), and a table of them; `tell` titles a bar.

    `columns` are the heads of that table: what is binned, what is counted. `caption` is HTML, the rest is text.
    """
    rows = [f"<td>{_range(one)}</td><td>{amount(one['count'])}</td>" for one in bins]
    below = table(f"{plain(columns[1])} of {plain(name)}", map(plain, columns), rows, "numbers")
    chart = bars(bins, f"Histogram of {plain(name)}; the table below has the same numbers", tell, "count")
    return (
        f"<figure><figcaption>{caption}</figcaption>{chart}"
        f"<details><summary>The bars as a table</summary>{below}</details></figure>"
    )


def _range(one: At) -> str:
    low, high = amount(one["low"]), amount(one["high"])
    return low if one.value["low"] == one.value["high"] and isinstance(one.value["low"], float) else f"{low} to {high}"


def bars(bins: At, name: str, tell: Callable[[dict[str, Any]], str], field: str) -> str:
    """Bars of equal width, as high as `field` of each bin says; the tallest is labelled, and at most six bins are.

    `name` is HTML; `tell` titles a bar.
    """
    tallest = max(bins, key=lambda one: one.value[field] or 0, default=None)
    if tallest is None:
        return "<p>none</p>"
    step, most = min(WIDTH / len(bins.value), WIDTH / 5), tallest.value[field] or 1
    every = -(-len(bins.value) // 6)
    parts = [f'<line x1="0" x2="{WIDTH}" y1="{BOTTOM}" y2="{BOTTOM}" class="axis"/>']
    for index, one in enumerate(bins):
        size, x = one.value[field], index * step
        bar = max(1.5, (BOTTOM - TOP) * size / most) if size else 0  # a single one can still be seen
        parts.append(
            f'<g>{element("title", one, plain(tell(one.value)))}<rect x="{x:.2f}" y="{TOP}" width="{step:.2f}" '
            f'height="{BOTTOM - TOP}" class="catch"/><rect x="{x + 1:.2f}" y="{BOTTOM - bar:.2f}" '
            f'width="{max(1, step - 2):.2f}" height="{bar:.2f}" rx="1.5" class="bar"/></g>'
        )
        if index % every == 0:
            parts.append(amount(one["low"], "text", f' x="{x + 1:.2f}" y="{HEIGHT - 8}"'))
        if one == tallest:
            anchor = "end" if x > WIDTH / 2 else "start"
            label = x + step - 1 if x > WIDTH / 2 else x + 1
            parts.append(amount(one[field], "text", f' x="{label:.2f}" y="{TOP - 8}" text-anchor="{anchor}"'))
    return _svg(name, parts)


# --------------------------------------------------------------------------------------------------------------- curves


def curves(lines: At, series: Sequence[tuple[str, list[Point]]], *, name: str, field: str, mark: int | None) -> str:
    """Curves of `field` over the steps, one for each named series, on one scale; at most four are told apart.

    The scale goes from the lowest to the highest value drawn; both are labelled, and the first and the last step.
    `lines` is the place of the log's lines by number. A vertical line stands at the step `mark`.
    """
    points = [point for _, some in series for point in some]
    if not points:
        return "<p>none</p>"
    first, last = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
    lowest, highest = min(points, key=lambda p: p[2]), max(points, key=lambda p: p[2])
    across, up = last[1] - first[1], highest[2] - lowest[2]

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - first[1]) / across if across else 0.5
        high = (y - lowest[2]) / up if up else 0.5
        return LEFT + 4 + (WIDTH - LEFT - 8) * right, BOTTOM - 4 - (BOTTOM - TOP - 8) * high

    parts = [f'<line x1="{LEFT}" x2="{WIDTH}" y1="{BOTTOM}" y2="{BOTTOM}" class="axis"/>']
    if mark is not None and first[1] <= mark <= last[1]:
        x = place(mark, lowest[2])[0]
        parts.append(f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{TOP}" y2="{BOTTOM}" class="mark-line"/>')
    for number, (_, some) in enumerate(series):
        drawn = [place(x, y) for _, x, y in thinned(some)]
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in drawn)
        parts.append(f'<polyline points="{path}" class="curve curve-{number % 4}"/>')
        if len(drawn) <= 40:
            parts += [f'<circle cx="{x:.2f}" cy="{y:.2f}" r="2.5" class="dot-{number % 4}"/>' for x, y in drawn]
    ends = [(highest, TOP + 8), (lowest, BOTTOM)] if up else [(lowest, (TOP + BOTTOM) / 2)]
    for point, y in ends:
        parts.append(amount(lines[point[0]][field], "text", f' x="{LEFT - 6}" y="{y}" text-anchor="end"'))
    across_ends = [(first, LEFT, "start"), (last, WIDTH, "end")] if across else [(first, WIDTH / 2, "middle")]
    for point, x, anchor in across_ends:
        parts.append(amount(lines[point[0]]["step"], "text", f' x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}"'))
    return _svg(f"{plain(name)}; the table below has the first and last values", parts)


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Points to draw of many: by bucket of x, the lowest and the highest, so that no spike is lost."""
    if len(points) <= 2 * MAX_BUCKETS:
        return points
    buckets: dict[int, list[Point]] = {}
    first, last = points[0][1], points[-1][1]
    for point in points:
        bucket = int((MAX_BUCKETS - 1) * (point[1] - first) / ((last - first) or 1))
        kept = buckets.setdefault(bucket, [point, point])
        kept[:] = [min(kept[0], point, key=lambda p: p[2]), max(kept[1], point, key=lambda p: p[2])]
    return [point for kept in buckets.values() for point in sorted(set(kept))]


# ------------------------------------------------------------------------------------------------------------ intervals


def scale_of(values: Iterable[float]) -> tuple[float, float]:
    """The ends of a scale from 0 to the next 1, 2 or 5 times a power of ten that holds all `values`.

    >>> scale_of([0.2, 0.9]), scale_of([4.4, 7.1]), scale_of([-3.0, 2.0])
    ((0.0, 1.0), (0.0, 10.0), (-5.0, 2.0))
    """
    values = list(values)
    return 0.0 - _round_up(max(0.0, -min(values))), _round_up(max(0.0, max(values)))


def _round_up(value: float) -> float:
    if value == 0:
        return 0.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 5, 10) if step * unit >= value * (1 - 1e-12))


def interval(value: At, bounds: At, *, scale: tuple[float, float]) -> str:
    """A dot at `value`, a bar from `low` to `high` of `bounds` (None: no bar), on a labelled scale."""
    width, middle = 200, 8
    span = scale[1] - scale[0]
    if value.value is None or not span:
        return ""

    def across(number: float) -> float:
        return 4 + (width - 8) * (number - scale[0]) / span

    parts = [f'<line x1="4" x2="{width - 4}" y1="{middle}" y2="{middle}" class="axis"/>']
    if bounds.value is not None:
        left, right = across(bounds.value["low"]), across(bounds.value["high"])
        parts.append(
            f'<rect x="{left:.2f}" y="{middle - 4}" width="{max(1, right - left):.2f}" height="8" class="span"/>'
        )
    parts.append(f'<circle cx="{across(value.value):.2f}" cy="{middle}" r="4" class="bar"/>')
    for x, anchor, end in ((4, "start", scale[0]), (width - 4, "end", scale[1])):
        text = amount_text(end)
        parts.append(f'<text x="{x}" y="26" text-anchor="{anchor}" class="scale">{text}</text>')
    return f'<svg viewBox="0 0 {width} 30" class="interval" aria-hidden="true">{"".join(parts)}</svg>'
