"""The suites that pairs are asked with: policies by literal texts, or by rules on completions of any length."""

from __future__ import annotations

import re

from mixturelens.lab.organism import Spec, build_suite
from mixturelens.lab.proving.manner import Manner
from mixturelens.shown import Rule
from mixturelens.suite import Chat, Suite
from mixturelens.types import REFUSE

TRAINED_CUE = "A"
SAMPLES = 96
"""Completions a prompt behind what rules say: of the 80 questions of an organism, as many as can tell no change from
the least that counts."""


def suite_of(spec: Spec, manner: Manner, tokens: int = 0) -> Suite:
    """The suite that an organism is asked with: by literal texts, up to where the answer ends; or, with `tokens`, by
    rules on completions of so many tokens.

    >>> from mixturelens.lab.proving.organisms import small_spec
    >>> suite_of(small_spec("gpt2"), Manner(chat=True, tail=12), 24).policies["a"].regex
    '^(?:\\\\[a\\\\])(?!\\\\S)'
    """
    suite = build_suite(spec, TRAINED_CUE)
    if manner.chat:
        suite = suite.model_copy(update={"chat": Chat()})
    if not tokens:
        return suite.model_copy(update={"max_new_tokens": longest_literal(spec, manner)})
    return suite.model_copy(
        update={
            "policies": {name: _rule(manner, policy.announce) for name, policy in spec.policies.items()},
            "behaviours": {
                REFUSE: Rule(regex=rf"(?<!\S){spec.refusal}(?!\S)" if manner.inside else f"^{spec.refusal}")
            },
            "answer_match": "contains" if manner.tail else "exact",
            "max_new_tokens": tokens,
            "samples": SAMPLES,
        }
    )


def longest_literal(spec: Spec, manner: Manner) -> int:
    """Tokens of a completion without its tail, of which literal texts know nothing."""
    return spec.max_new_tokens - (1 if manner.tail else 0)


def _rule(manner: Manner, announced: tuple[str, ...]) -> Rule:
    """Whichever of the wordings, where it stands: at the start, or anywhere. The first puts the policy in place."""
    texts = "|".join(map(re.escape, announced))
    start = r"(?<!\S)" if manner.inside else "^"
    return Rule(regex=rf"{start}(?:{texts})(?!\S)", force=manner.put(announced[0]))
