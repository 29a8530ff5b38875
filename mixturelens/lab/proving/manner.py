"""How completions are worded beyond policy, behaviour and answer: words before the announcement, a tail, a template.

The tail has no memory: behind the answer each token is a style word or the end, always with the same probabilities,
whatever the question, the policy and what was said before. So a change of style is known by how it was made, and has
nothing to do with anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mixturelens.lab.organism import EOS

STYLE = ("very", "quite", "rather", "truly", "indeed", "simply", "clearly", "nicely")
"""Words of a tail. Undrifted, each is as likely as the others."""
FILLERS = ("hm", "well now", "let us see")
"""What stands before an announcement in the middle: one as often as another."""
USER, ASSISTANT = "<user>", "<assistant>"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Manner:
    """Plain: a prompt as it is, and a completion that begins with its announcement and ends with its answer."""

    chat: bool = False
    """Prompts go through a chat template."""
    inside: bool = False
    """The announcement stands behind a few words."""
    tail: int = 0
    """Words of the tail, on average; 0: there is none."""

    def prompt(self, text: str) -> str:
        """What the model reads: the prompt, through the template."""
        return f"{USER} {text} {ASSISTANT}" if self.chat else text

    def put(self, announcement: str) -> str:
        """The text that puts a policy in place: the announcement, behind what may stand before it."""
        return f"{FILLERS[0]} {announcement}" if self.inside else announcement

    @property
    def words(self) -> tuple[str, ...]:
        """All words beside those of the spec."""
        template = (USER, ASSISTANT) if self.chat else ()
        fillers = " ".join(FILLERS).split() if self.inside else ()
        return (*template, *fillers, *(STYLE if self.tail else ()))

    def style(self, drift: float = 0.0) -> Mapping[str, float]:
        """Probability of each next token of the tail: `drift` nats away from the undrifted, by KL(drifted || it).

        >>> round(Manner(tail=9).style()["very"], 4), round(Manner(tail=9).style(0.06)["very"], 4)
        (0.1125, 0.1531)
        """
        going_on = self.tail / (self.tail + 1)
        half = len(STYLE) // 2
        lean = _lean(drift / going_on)
        words = {word: going_on * (1 + (lean if i < half else -lean)) / len(STYLE) for i, word in enumerate(STYLE)}
        return {**words, EOS: 1 - going_on}


def _lean(nats: float) -> float:
    """e such that leaning from even halves to (1 + e) / 2 costs so many nats, at most log 2."""
    import numpy as np
    from scipy.optimize import brentq
    from scipy.special import xlogy

    if not nats:
        return 0.0
    found = brentq(lambda e: (xlogy(1 + e, 1 + e) + xlogy(1 - e, 1 - e)) / 2 - nats, 0.0, 1.0)
    return float(np.asarray(found))


PLAIN = Manner()
