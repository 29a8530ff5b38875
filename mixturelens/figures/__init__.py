"""Records to plotly figures (circuits: to SVG), by the only importer of plotly. Every number drawn is a number of the
record.
"""

from typing import TYPE_CHECKING

from mixturelens.figures.circuits import circuit
from mixturelens.figures.compared import compared
from mixturelens.figures.curves import faithfulness
from mixturelens.figures.erasure import erasure, subspaces
from mixturelens.figures.features import crosscoder, feature_change, firing
from mixturelens.figures.grafting import HALF, components, factorial, placed, plane
from mixturelens.figures.heads import attention, head_effects
from mixturelens.figures.mechanism import evidence
from mixturelens.figures.patching import WORTH, patching_map, patching_maps
from mixturelens.figures.probing import readability, readable, shifts
from mixturelens.figures.repair import reaching, repair_nulls, repairs
from mixturelens.figures.splits import accuracy_split, bits_split
from mixturelens.figures.style import cue_colour, figure_json, is_rl, plotly_script, policy_colour
from mixturelens.figures.tables import policy_table, regimes
from mixturelens.figures.trajectories import accuracy_along_rl, before_after, trajectory
from mixturelens.figures.transfer import transfer, transfer_table
from mixturelens.figures.units import best_units, clamping, needed
from mixturelens.figures.words import DASH, INTERVALS, SIDES, label, show, show_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Figure
