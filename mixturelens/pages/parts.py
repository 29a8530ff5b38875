"""What pages are made of."""

from __future__ import annotations

import base64
import functools
import gzip
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mixturelens import figures
from mixturelens.figures import show
from mixturelens.stats import said_too_few
from mixturelens.types import Interval

if TYPE_CHECKING:
    from mixturelens.figures import Figure


class Picture(NamedTuple):
    """A figure of a page: where plotly draws it, and the text below it."""

    number: int
    height: int
    """Pixels, which are kept for it until it is drawn."""
    caption: str
    read: str
    """One sentence for a reader who sees such a figure for the first time."""
    html: str = ""
    """Of a figure that plotly does not draw."""


class Pictures:
    """The figures of a page, numbered as they come, so that equal records give equal pages."""

    def __init__(self, drawn: list[str] | None = None, few: str = "") -> None:
        self._drawn, self.few = [] if drawn is None else drawn, few

    def about(self, missing: Sequence[str]) -> Pictures:
        """The same figures, each of which says so where it stands on too few questions, as its record does."""
        return Pictures(self._drawn, "".join(f" {line}." for line in said_too_few(missing)))

    def add(self, figure: Figure, caption: str, *, read: str, whiskers: bool = True) -> Picture:
        """Keep a figure under the next number, with its caption.

        `read`: how to read it, one sentence. `whiskers`: it shows intervals, and the caption says which.
        """
        caption += (f" Whiskers: {figures.INTERVALS}." if whiskers else "") + self.few
        self._drawn.append(figures.figure_json(figure))
        layout: dict[str, int] = figure.to_plotly_json()["layout"]
        return Picture(len(self._drawn), layout.get("height", 450), caption, read)

    def draw(self, html: Callable[[str], str], caption: str, *, read: str) -> Picture:
        """Keep a figure that is an element of its own under the next number: `html` makes it, of its id."""
        self._drawn.append("null")
        number = len(self._drawn)
        return Picture(number, 0, caption + self.few, read, html(f"figure-{number}"))

    def packed(self) -> dict[str, str]:
        """What the page's script unpacks and draws: plotly.js, and all figures; nothing where there are none."""
        if set(self._drawn) <= {"null"}:
            return {}
        return {"plotly": _packed_once(figures.plotly_script()), "drawn": _pack(f"[{','.join(self._drawn)}]")}


def _pack(text: str) -> str:
    """Text as gzip in base64, a quarter of its size or less: browsers unpack it, and no markup can be in it."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


_packed_once = functools.lru_cache(maxsize=1)(_pack)
"""The same for a text that every page has."""


class Control(NamedTuple):
    """One control of a page: what must hold, what was measured, and whether it holds (None: not measured)."""

    name: str
    must: str
    measured: str
    holds: bool | None


def number(value: Interval, digits: int = 3) -> tuple[str, str]:
    """(number, interval), both as text; a dash and nothing where it was not measured."""
    if value.value is None or value.low is None or value.high is None:
        return show(value.value, digits), ""
    return show(value.value, digits), f"{show(value.low, digits)} to {show(value.high, digits)}"


class Group(NamedTuple):
    """Figures under a heading, with what a newcomer needs to read them, and what would speak against them."""

    title: str
    text: str
    falsify: str
    pictures: list[Picture]


def render(template: str, context: Mapping[str, object], pictures: Pictures | None = None) -> str:
    """A page, whole, with its pictures; what a template asks for and nobody gave is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mixturelens"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    packed = {} if pictures is None else pictures.packed()
    return environment.get_template(template).render({**context, "packed": packed})
