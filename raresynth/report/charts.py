"""Charts as inline SVG, coloured by the page's style sheet; equal inputs give equal bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 12, 48
TICKS = 5
MARKED_POINTS = 12
"""A line of at most so many points shows them."""
STYLES = 8
"""Line styles series-0, series-1, ... of the style sheet."""

_ACROSS = Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/><text class="end" x="{3}" y="{2}">{4}</text>')
_BELOW = Markup('<text class="middle" x="{}" y="{}">{}</text>')
_LABELS = Markup(
    '<text class="middle" x="{0}" y="{1}">{2}</text>'
    '<text class="middle" x="14" y="{3}" transform="rotate(-90 14 {3})">{4}</text>'
)
_DIAGONAL = Markup('<line class="diagonal" x1="{}" y1="{}" x2="{}" y2="{}"/>')
_PATH = Markup('<polyline class="{}" points="{}"/>')
_MARK = Markup('<circle class="{}" cx="{}" cy="{}" r="3.5"/>')
_KEY = Markup(
    '<li><svg class="key" viewBox="0 0 26 8" aria-hidden="true"><polyline class="{}" points="1,4 25,4"/></svg>{}</li>'
)


@dataclass(frozen=True)
class Line:
    """One line of a chart; points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    @property
    def points(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with its tick values."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float]) -> "Axis":
        """The axis with round tick values that spans all values."""
        low, high = min(values), max(values)
        if high - low < 1e-12:
            low, high = low - 0.5, high + 0.5
        step = _round_step((high - low) / TICKS)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(round(i * step, 10) for i in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks)

    def share(self, value: float) -> float:
        """Place of a value along the axis: 0 at `low`, 1 at `high`, held within."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


UNIT = Axis(0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    x: Axis | None = None,
    y: Axis | None = None,
    diagonal: str = "",
) -> Markup:
    """A figure with its caption, the lines and their legend; empty where no line has a point.

    Args:
        x: the axis, fitted to the lines if left out; likewise `y`.
        diagonal: name of the line from corner to corner, where there is one to compare with.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return Markup()
    x = x or Axis.over([point[0] for line in drawn for point in line.points])
    y = y or Axis.over([point[1] for line in drawn for point in line.points])
    parts = [_grid(x, y), _labels(x_label, y_label)]
    if diagonal:
        parts.append(_DIAGONAL.format(_x(x, x.low), _y(y, y.low), _x(x, x.high), _y(y, y.high)))
    parts += [_line(line, f"series-{number % STYLES}", x, y) for number, line in enumerate(drawn)]
    ends = "; ".join(f"{line.name} ends at {line.points[-1][1]:.4g}" for line in drawn)
    svg = Markup('<svg viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>').format(
        WIDTH, HEIGHT, title, f"{y_label} over {x_label}: {ends}.", Markup().join(parts)
    )
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}{}</figure>').format(
        title, svg, _legend(drawn, diagonal)
    )


def _round_step(raw: float) -> float:
    magnitude = float(10 ** math.floor(math.log10(raw)))
    return next(factor * magnitude for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * magnitude >= raw * 0.999)


def _x(axis: Axis, value: float) -> str:
    return f"{LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT):.1f}"


def _y(axis: Axis, value: float) -> str:
    return f"{HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM):.1f}"


def _grid(x: Axis, y: Axis) -> Markup:
    across = [_ACROSS.format(LEFT, WIDTH - RIGHT, _y(y, tick), LEFT - 8, f"{tick:g}") for tick in y.ticks]
    below = [_BELOW.format(_x(x, tick), HEIGHT - BOTTOM + 18, f"{tick:g}") for tick in x.ticks]
    return Markup().join([*across, *below])


def _labels(x_label: str, y_label: str) -> Markup:
    return _LABELS.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, (TOP + HEIGHT - BOTTOM) / 2, y_label)


def _line(line: Line, style: str, x: Axis, y: Axis) -> Markup:
    places = [(_x(x, a), _y(y, b)) for a, b in line.points]
    marks = [_MARK.format(style, *place) for place in places] if len(places) <= MARKED_POINTS else []
    return Markup().join([_PATH.format(style, " ".join(",".join(place) for place in places)), *marks])


def _legend(lines: Sequence[Line], diagonal: str) -> Markup:
    entries = [_KEY.format(f"series-{number % STYLES}", line.name) for number, line in enumerate(lines)]
    if diagonal:
        entries.append(_KEY.format("diagonal", diagonal))
    return Markup('<ul class="legend">{}</ul>').format(Markup().join(entries))
