"""What pages are made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mixturelens import figures
from mixturelens.figures import show
from mixturelens.stats import said_too_few
from mixturelens.types import Interval

if TYPE_CHECKING:
    from mixturelens.figures import Figure


class Picture(NamedTuple):
    """A figure as HTML, with the text below it."""

    html: str
    caption: str


class Pictures:
    """Figures as HTML under ids that are the same on every run, so that equal records give equal pages."""

    def __init__(self, numbers: Iterator[int] | None = None, few: str = "") -> None:
        self.numbers, self.few = numbers or itertools.count(1), few

    def about(self, missing: Sequence[str]) -> Pictures:
        """The same figures, each of which says so where it stands on too few questions, as its record does."""
        return Pictures(self.numbers, "".join(f" {line}." for line in said_too_few(missing)))

    def add(self, figure: Figure, caption: str, *, whiskers: bool = True) -> Picture:
        """Draw a figure under the next id, with its caption.

        `whiskers`: it shows intervals, and the caption says which.
        """
        caption += (f" Whiskers: {figures.INTERVALS}." if whiskers else "") + self.few
        return Picture(figures.figure_html(figure, f"figure-{next(self.numbers)}"), caption)


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


def render(template: str, context: Mapping[str, object]) -> str:
    """A page, whole; what a template asks for and nobody gave is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mixturelens"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)
