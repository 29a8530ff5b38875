"""Notebooks: the pair of files agrees, outputs are stored and small, and they run."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
LARGEST = 4 << 20
"""Bytes of a notebook with its outputs."""
PLOTLY = "application/vnd.plotly.v1+json"

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def outputs(script: Path) -> list[dict]:
    notebook = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def test_every_notebook_has_its_script():
    assert SCRIPTS
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == {file.stem for file in SCRIPTS}


@each
def test_the_first_cell_installs_what_is_missing_and_needs_no_magic(script: Path):
    """It is plain Python, the same in all, and so runs in Jupyter, VS Code and Colab."""
    first, *rest = [cell for cell in script.read_text(encoding="utf-8").split("# %%\n")[1:] if cell.strip()]
    install = first.split("\n# %%")[0].strip()
    assert 'importlib.util.find_spec("mixturelens") is None' in install
    assert install == SCRIPTS[0].read_text(encoding="utf-8").split("# %%\n")[1].split("\n# %%")[0].strip()
    ast.parse(install)
    assert '"colab" if "google.colab" in sys.modules' in rest[0]  # which draws no plotly of the usual kind


@each
def test_script_and_notebook_hold_the_same_cells(script: Path):
    jupytext = pytest.importorskip("jupytext")
    sides = [
        [(cell.cell_type, cell.source) for cell in jupytext.read(file).cells]
        for file in (script, script.with_suffix(".ipynb"))
    ]
    assert sides[0] == sides[1], "run `make notebooks`"


@each
def test_every_code_cell_was_run_in_order_without_errors(script: Path):
    notebook = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert {output["output_type"] for output in outputs(script)} <= {"display_data", "execute_result", "stream"}
    assert not [output for output in outputs(script) if output.get("name") == "stderr"]


@each
def test_figures_need_no_network_and_little_room(script: Path):
    file = script.with_suffix(".ipynb")
    text = file.read_text(encoding="utf-8")
    assert file.stat().st_size < LARGEST
    assert "cdn.plot.ly" not in text
    assert "<script" not in text
    figures = [output["data"] for output in outputs(script) if PLOTLY in output.get("data", {})]
    assert figures
    # what viewers show that run no scripts
    assert all("image/png" in figure for figure in figures)


@each
def test_nothing_of_the_machine_is_stored(script: Path):
    text = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert str(FOLDER.parents[1]) not in text
    assert '"execution"' not in text
    assert "iopub" not in text


@pytest.mark.slow
@each
# jupyter's own deprecations are not ours, and the kernel says that it is on TCP
@pytest.mark.filterwarnings("ignore")
def test_runs_in_three_minutes(script: Path):
    pytest.importorskip("nbclient")
    from scripts.run_notebooks import execute

    notebook, seconds = execute(script)
    assert seconds < 180
    kinds = {output.output_type for cell in notebook.cells for output in cell.get("outputs", [])}
    assert "error" not in kinds
