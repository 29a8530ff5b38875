"""What pages are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from mixturelens import viz
from mixturelens.types import Interval
from mixturelens.viz import show

if TYPE_CHECKING:
    from mixturelens.viz import Figure


class Picture(NamedTuple):
    html: str
    caption: str


class Pictures:
    """Figures as HTML under ids that are the same on every run, so that equal records give equal pages."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, figure: Figure, caption: str, *, whiskers: bool = True) -> Picture:
        self.count += 1
        caption += f" Whiskers: {viz.INTERVALS}." if whiskers else ""
        return Picture(viz.figure_html(figure, f"figure-{self.count}"), caption)


class Control(NamedTuple):
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
