"""Records to plotly figures: the only importer of plotly. Every number drawn is a number of the record."""

from typing import TYPE_CHECKING

from mixturelens.viz.bars import accuracy_split, kl_split
from mixturelens.viz.style import (
    DASH,
    INTERVALS,
    cue_colour,
    figure_html,
    is_rl,
    label,
    plotly_script,
    policy_colour,
    show,
    show_interval,
)
from mixturelens.viz.tables import policy_table, regimes
from mixturelens.viz.trajectories import accuracy_along_rl, before_after, trajectory

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Figure

__all__ = [
    "DASH",
    "INTERVALS",
    "accuracy_along_rl",
    "accuracy_split",
    "before_after",
    "cue_colour",
    "figure_html",
    "is_rl",
    "kl_split",
    "label",
    "plotly_script",
    "policy_colour",
    "policy_table",
    "regimes",
    "show",
    "show_interval",
    "trajectory",
]
