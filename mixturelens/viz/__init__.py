"""Records to plotly figures: the only importer of plotly. Every number drawn is a number of the record."""

from typing import TYPE_CHECKING

from mixturelens.viz.arms import arms
from mixturelens.viz.bars import accuracy_split, bits_split
from mixturelens.viz.circuits import circuit
from mixturelens.viz.curves import faithfulness
from mixturelens.viz.erasure import erasure, subspaces
from mixturelens.viz.features import crosscoder, feature_change, firing
from mixturelens.viz.forecast import drifts, forecast
from mixturelens.viz.grafting import HALF, components, factorial, placed, plane
from mixturelens.viz.heads import attention, head_effects
from mixturelens.viz.mechanism import evidence
from mixturelens.viz.patching import WORTH, patching_map, patching_maps
from mixturelens.viz.probing import readability, readable, shifts
from mixturelens.viz.repair import reaching, repair_nulls, repairs
from mixturelens.viz.structures import phase_diagram, schedule
from mixturelens.viz.style import (
    DASH,
    INTERVALS,
    SIDES,
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
from mixturelens.viz.transfer import transfer, transfer_table
from mixturelens.viz.units import best_units, clamping, needed

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Figure

__all__ = [
    "DASH",
    "HALF",
    "INTERVALS",
    "SIDES",
    "WORTH",
    "accuracy_along_rl",
    "accuracy_split",
    "arms",
    "attention",
    "before_after",
    "best_units",
    "bits_split",
    "circuit",
    "clamping",
    "components",
    "crosscoder",
    "cue_colour",
    "drifts",
    "erasure",
    "evidence",
    "factorial",
    "faithfulness",
    "feature_change",
    "figure_html",
    "firing",
    "forecast",
    "head_effects",
    "is_rl",
    "label",
    "needed",
    "patching_map",
    "patching_maps",
    "phase_diagram",
    "placed",
    "plane",
    "plotly_script",
    "policy_colour",
    "policy_table",
    "reaching",
    "readability",
    "readable",
    "regimes",
    "repair_nulls",
    "repairs",
    "schedule",
    "shifts",
    "show",
    "show_interval",
    "subspaces",
    "trajectory",
    "transfer",
    "transfer_table",
]
