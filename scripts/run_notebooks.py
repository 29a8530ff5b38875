"""Run the notebooks and store their outputs: `make notebooks`, or `python scripts/run_notebooks.py [SCRIPT ...]`.

Each is a pair of files, kept by jupytext: the `.py` is the one to review, the `.ipynb` has the same cells and their
outputs. Either can be edited. What
changes from run to run though nothing else did (times, ids) is not stored, so that running twice leaves git clean.
Figures are stored as plotly's own data, which JupyterLab and VS Code draw without a network, and beside it as a picture
for viewers that run no scripts (GitHub), where chromium is there to draw it.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent / "notebooks"
PLOTLY = "application/vnd.plotly.v1+json"
WIDTH = 1000
"""Pixels of a figure's picture."""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def paired(script: Path, notebook: Path) -> bool:
    """Whether both files hold the same cells."""
    if not notebook.is_file():
        return False
    sides = [[(cell.cell_type, cell.source) for cell in jupytext.read(file).cells] for file in (script, notebook)]
    return sides[0] == sides[1]


def execute(script: Path) -> tuple[Any, float]:
    """The notebook of a script with its outputs, and the seconds it took. Raises CellExecutionError with the cell."""
    notebook = jupytext.read(script)
    # a progress bar that cannot be drawn as a widget is no news, and its warning names local folders
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"
    start = time.perf_counter()
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(script.parent)}}
    ).execute()
    return notebook, time.perf_counter() - start


def settle(notebook: Any) -> None:
    """Leave out what differs from run to run, and from machine to machine."""
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata.get("jupytext", {}).pop("text_representation", None)  # of the script; `jupytext --sync` drops it
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)


def pictures(notebook: Any) -> None:
    """Beside each figure, a picture of it."""
    chromium = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if chromium is None:
        print("no chromium: figures are stored without pictures", file=sys.stderr)
        return
    figures = [
        output.data
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if PLOTLY in output.get("data", {})
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(figures):
            shot = picture(data[PLOTLY], chromium, Path(folder) / str(number))
            if shot is not None:
                data["image/png"] = base64.b64encode(shot).decode()


def picture(figure: dict[str, Any], chromium: str, folder: Path) -> bytes | None:
    """A figure as PNG, drawn by a browser that has no network; None if it does not draw."""
    import plotly.io

    folder.mkdir()
    height = int(figure.get("layout", {}).get("height") or 450)
    page, shot = folder / "page.html", folder / "shot.png"
    drawn = plotly.io.from_json(json.dumps({key: figure[key] for key in ("data", "layout")}))
    page.write_text(
        "<!doctype html><meta charset=utf-8><style>body{margin:0;overflow:hidden}</style>"
        + plotly.io.to_html(
            drawn,
            full_html=False,
            include_plotlyjs=True,
            config={"displayModeBar": False},
            default_width=f"{WIDTH}px",
            default_height=f"{height}px",
        ),
        encoding="utf-8",
    )
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{height}"]
    command += ["--virtual-time-budget=5000", f"--screenshot={shot}", page.as_uri()]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"a figure was not drawn: {error}", file=sys.stderr)
    return shot.read_bytes() if shot.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the notebooks and store their outputs.")
    parser.add_argument("scripts", nargs="*", type=Path, default=sorted(FOLDER.glob("*.py")))
    for script in parser.parse_args().scripts:
        notebook = script.with_suffix(".ipynb")
        if not paired(script, notebook):  # the one that was edited last counts
            subprocess.run([sys.executable, "-m", "jupytext", "--quiet", "--sync", str(script)], check=True)
        done, seconds = execute(script)
        settle(done)
        pictures(done)
        nbformat.write(done, notebook)
        print(f"{notebook.name}: {seconds:.0f} s, {notebook.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
