"""The words of the field as frozen values, and the errors that users see. No I/O, no torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

ANSWER = "answer"
"""Behaviour of a completion that answers the question and matches no other behaviour."""
REFUSE = "refuse"
"""Behaviour of a completion that holds back."""
ERR = "err"
"""Behaviour of a completion that follows a fixed wrong rule."""
OTHER = "other"
"""The policy that collects completions of no known policy."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SAID = 2000
"""Characters of a message: a prompt may be a book."""


def shown(text: str) -> str:
    r"""A text on one line, as a terminal may show it: what would move its cursor or turn its writing round is escaped.

    >>> shown("plain, \x1b[31mred")
    'plain, \\x1b[31mred'
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class _Said(Exception):
    """An error whose message is one line, however long the texts are that it quotes, and safe to print."""

    def __init__(self, message: str = "") -> None:
        line = shown(" ".join(part.strip() for part in str(message).splitlines()))
        super().__init__(line if len(line) <= SAID else f"{line[: SAID - 500]} ... {line[-490:]}")


class InputError(_Said):
    """Bad input: says what is wrong, where, and what to do. The command line exits with status 2."""


class RunError(_Said):
    """The run itself failed. The command line exits with status 1."""


@contextlib.contextmanager
def loading(where: object, what: str) -> Iterator[None]:
    """Turn any error of a library that reads other people's files into an InputError of one line; a lack of memory,
    which is no fault of the file, into a RunError.

    `where` names the file, and `what` says what could not be done, and perhaps what to do.

    >>> with loading("S", "no model"):
    ...     {}["hidden_act"]
    Traceback (most recent call last):
    mixturelens.types.InputError: S: no model (KeyError: 'hidden_act')
    """
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise RunError(f"{where}: {what}: memory ran out; give a smaller one, or a machine with more") from None
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise InputError(_met(where, what, error)) from None


@contextlib.contextmanager
def running(where: object, what: str) -> Iterator[None]:
    """The same for work of which other work must not suffer: any error but an InputError becomes a RunError.

    >>> with running("a part", "failed"):
    ...     [][0]
    Traceback (most recent call last):
    mixturelens.types.RunError: a part: failed (IndexError: list index out of range)
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise RunError(_met(where, what, error)) from error


def _is_failure(error: BaseException) -> bool:
    """All but a wish to stop; a panic of a library in Rust (tokenizers, safetensors) is no Exception for Python."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _met(where: object, what: str, error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{where}: {what} ({type(error).__name__}: {lines[0] if lines else 'no message'})"


class Frozen(BaseModel):
    """Base of all specs and records: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(Frozen):
    """A number with its 95% bootstrap interval over questions; all three are null where it was not measured.

    >>> Interval(value=0.5, low=0.4, high=0.6).excludes(0.3)
    True
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Interval:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self

    @property
    def measured(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    @property
    def known(self) -> float:
        """The value. Raises ValueError where nothing was measured, which is not the same as 0."""
        if self.value is None:
            raise ValueError("nothing was measured here")
        return self.value

    def excludes(self, threshold: float) -> bool:
        """True if the whole interval lies on one side of `threshold`; False when not measured."""
        if self.low is None or self.high is None:
            return False
        return self.low > threshold or self.high < threshold

    def above(self, threshold: float) -> bool:
        """Whether all of the interval is at least `threshold`; False where there is none."""
        return self.low is not None and self.low >= threshold

    def below(self, threshold: float) -> bool:
        """Whether all of the interval is at most `threshold`; False where there is none."""
        return self.high is not None and self.high < threshold

    def within(self, least: float, most: float) -> Interval:
        """The same interval, cut to what the quantity can be."""
        cut = {name: None if x is None else min(most, max(least, x)) for name, x in self}
        return Interval(**cut)


NOT_MEASURED = Interval()

VerdictWord = Literal["routing", "specialist", "both", "neither", "inconclusive"]

PolicyTable = Mapping[str, Mapping[str, str]]
"""policy -> cue -> behaviour, e.g. {"a": {"A": "answer", "B": "refuse"}, ...}"""

Component = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "neurons", "z", "q", "k", "v", "pattern"
]
"""What of a layer: the residual stream before attention, between attention and MLP, and after; the outputs of attention
and MLP; the MLP's hidden neurons; per head its output `z` (before the output projection), queries, keys, values (before
any rotation) and attention pattern."""

PER_HEAD: tuple[Component, ...] = ("z", "q", "k", "v", "pattern")


Side = Literal["before", "after"]
"""Which checkpoint of a pair: S or R."""


class Site(Frozen):
    """An address in the network. Without a head (or neuron) it is all of them, and without a position every one.

    >>> str(Site(layer=0, component="z", head=3, position="policy"))
    'L0.z.3@policy'
    """

    layer: int = Field(ge=0)
    component: Component
    head: int | None = Field(default=None, ge=0)
    neuron: int | None = Field(default=None, ge=0)
    position: str | int | None = None
    """A named span (`cue`, `hint`, `question`, `last`, `policy`, `answer`, `completion`), or a token's index."""

    @model_validator(mode="after")
    def _fits(self) -> Site:
        if self.head is not None and self.component not in PER_HEAD:
            raise ValueError(f"head: {self.component} has no heads (those of {', '.join(PER_HEAD)} have)")
        if self.neuron is not None and self.component != "neurons":
            raise ValueError(f"neuron: {self.component} has no neurons")
        return self

    @model_serializer(mode="wrap")
    def _short(self, as_usual: SerializerFunctionWrapHandler) -> dict[str, object]:
        """What an address does not say is left out: records hold many of them."""
        return {key: value for key, value in as_usual(self).items() if value is not None}

    def __str__(self) -> str:
        unit = self.head if self.head is not None else self.neuron
        where = "" if self.position is None else f"@{self.position}"
        return f"L{self.layer}.{self.component}{'' if unit is None else f'.{unit}'}{where}"


class Intervention(Frozen):
    """What to do at one site; a tuple of them is applied together. Printed, saved and composed as a value.

    - `set`: put `vector` there
    - `add`: add `amount` times `vector` (steering)
    - `scale`: multiply by `amount` (0 ablates)
    - `project`: remove the component along `vector`
    - `erase`: remove `vector` as often as `read` finds it beyond `offset`: x - (read . x - offset) vector, an oblique
      projection (`read . vector` is 1). A concept of several dimensions takes several, blind to each other's vectors
    - `clamp`: make a unit's activation `amount`: x + (amount - f) vector, where f is read . x - offset, counted as 0 up
      to `threshold` (a feature of a sparse dictionary; without a threshold a linear unit, such as a probe's direction)
    - `replace`: put what the same prompt, with the same completion, has there under the cue `source` (interchange)
    - `mean`: the mean of that over all cues, each counted equally

    >>> print(Intervention(site=Site(layer=0, component="z", head=3), do="replace", source="A"))
    L0.z.3 <- that of cue A
    """

    site: Site
    do: Literal["set", "add", "scale", "project", "erase", "clamp", "replace", "mean"]
    vector: tuple[float, ...] | None = None
    read: tuple[float, ...] | None = None
    offset: float = 0.0
    threshold: float | None = None
    amount: float = 1.0
    source: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Intervention:
        if (self.vector is None) == (self.do in ("set", "add", "project", "erase", "clamp")):
            raise ValueError(f"vector: {self.do} {'needs one' if self.vector is None else 'takes none'}")
        if self.do == "project" and not any(self.vector or ()):
            raise ValueError("vector: project needs a direction, and this one is zero")
        if (self.read is None) == (self.do in ("erase", "clamp")):
            raise ValueError(f"read: {self.do} {'needs one' if self.read is None else 'takes none'}")
        if self.offset and self.do not in ("erase", "clamp"):
            raise ValueError(f"offset: {self.do} takes none")
        if self.threshold is not None and self.do != "clamp":
            raise ValueError(f"threshold: {self.do} takes none")
        if self.read is not None and self.vector is not None:
            if len(self.read) != len(self.vector):
                raise ValueError(f"read: has {len(self.read)} numbers, and the vector {len(self.vector)}")
            found = sum(r * v for r, v in zip(self.read, self.vector, strict=True))
            if self.do == "erase" and not abs(found - 1.0) < 1e-6:
                raise ValueError(f"read: finds {found:g} in the vector, where it must find 1 to erase it")
        if (self.source is None) == (self.do == "replace"):
            raise ValueError(f"source: {self.do} {'needs the cue to read' if self.source is None else 'takes none'}")
        return self

    def __str__(self) -> str:
        shown = {
            "set": "a fixed vector",
            "add": f"+ {self.amount:g} x a vector",
            "scale": f"x {self.amount:g}" if self.amount else "zero",
            "project": "without a direction",
            "erase": "without a concept",
            "clamp": f"a unit at {self.amount:.3g}",
            "replace": f"that of cue {self.source}",
            "mean": "the mean over cues",
        }[self.do]
        return f"{self.site} <- {shown}"
