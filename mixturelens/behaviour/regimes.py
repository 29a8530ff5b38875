"""What completions would earn where each cue has an objective of its own."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.prompts import Prompts
from mixturelens.organism import Spec, pays, questions
from mixturelens.suite import PromptRow
from mixturelens.types import ANSWER


def paid_behaviours(spec: Spec, rows: tuple[PromptRow, ...], objective: str | None = None) -> list[str]:
    """The behaviour that RL rewards on each prompt: by the objective of its own cue, or by that of another."""
    by_id = {question.id: question for part in questions(spec) for question in part}
    return [pays(spec, row.cue, by_id[row.id], objective) for row in rows]


def paid(spec: Spec, behaviour: Behaviour, prompts: Prompts, objective: str) -> Float[np.ndarray, " prompt"]:
    """How often a completion of each prompt would be rewarded by the objective of a cue, whatever its own cue is.

    Rewarded is a completion of a known policy that does what the objective wants: an answer has to be right as well.
    """
    names = prompts.suite.behaviour_names
    known = behaviour.classes[:, :-1].sum((1, 2))
    right = behaviour.correct[:, :-1].sum(-1)
    wanted = paid_behaviours(spec, prompts.rows, objective)
    return np.array([right[i] if does == ANSWER else known[i, names.index(does)] for i, does in enumerate(wanted)])
