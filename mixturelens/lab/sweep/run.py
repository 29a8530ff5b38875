"""The cells of a grid, here or on a cluster: no finished cell is run again, a failed one stops no other.

A cell that was killed goes on where it stopped, because a run does; one that failed is tried again by the next start.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mixturelens as ml
from mixturelens.files import read_text
from mixturelens.lab import runs
from mixturelens.lab.sweep.grid import GridCell, cells_of, load_grid, text
from mixturelens.lab.sweep.numbers import INSTRUMENTS, TAKEN, Scalar, flat
from mixturelens.models import Pair
from mixturelens.records import Record, held, write_bytes, write_text
from mixturelens.types import Frozen, InputError, RunError, running

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, all)."""
Work = Callable[[GridCell], str]


class CellRow(Frozen):
    """One checkpoint after training, and what each instrument says of it."""

    after: str
    trained_cue: str | None
    numbers: dict[str, dict[str, Scalar]]
    """Instrument -> column -> value; `x.low` and `x.high` are the ends of x's interval."""


class CellRecord(Record):
    """Written last: a cell that has it is finished."""

    KIND = "cell"

    rows: tuple[CellRow, ...]


def _recorded(cell: GridCell, folder: Path) -> CellRecord | None:
    """The record of a finished cell. Raises InputError if the folder holds a run of another spec."""
    assert cell.spec is not None
    if folder.exists():
        runs.check_run(cell.spec, folder)
    return CellRecord.load(folder / "cell.json") if (folder / "cell.json").is_file() else None


def _lacks(record: CellRecord | None, then: Sequence[str]) -> bool:
    """Whether something is left to do: the run itself, or instruments that were not asked for at the time."""
    return record is None or not all(set(then) <= set(row.numbers) for row in record.rows)


_CALLED = {"behaviour": "measure", "features": "decompose"}
"""What instruments are called in Python, where a command has another name."""
_ALONE = threading.Lock()
"""torch's random numbers belong to the process: a worker of several threads does one cell at a time."""


def run_cell(cell: GridCell, out: Path, then: Sequence[str], device: str | None) -> str:
    """Train and measure one cell, unless it is finished; returns why it failed, or nothing.

    A worker that others believe dead may still be at it: its lock is held until it ends, and whoever comes then finds
    the cell finished. The traceback of a failure goes into `failed/<cell>.txt`.
    """
    import torch

    from mixturelens.models import quiet_libraries

    assert cell.spec is not None
    folder, failure = out / "cells" / cell.name, out / "failed" / f"{cell.name}.txt"
    with _ALONE, held(folder):
        quiet_libraries()
        torch.set_num_threads(1)
        try:
            with running(cell.name, "failed"):
                there = _recorded(cell, folder)
                if _lacks(there, then):
                    known = {name for row in (there.rows if there else ()) for name in row.numbers}
                    then = [name for name in INSTRUMENTS if name in {*then, *known}]
                    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
                    runs.train(cell.spec, folder, device)
                    rows = tuple(_row(pair, then) for pair in runs.run_pairs(folder, device=device))
                    CellRecord(rows=rows).save(folder / "cell.json")
        except (InputError, RunError) as error:
            write_text(failure, traceback.format_exc())
            return str(error)
        failure.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            failure.parent.rmdir()  # no other cell has failed
        return ""


def _row(pair: Pair, then: Sequence[str]) -> CellRow:
    assert pair.after is not None
    found = {name: INSTRUMENTS[name](getattr(ml, _CALLED.get(name, name))(pair)) for name in then}
    return CellRow(
        after=pair.after.name,
        trained_cue=pair.suite.trained_cue,
        numbers={name: flat(numbers) for name, numbers in found.items()},
    )


# --- all of them ------------------------------------------------------------------------------------------------------


class SweepRecord(Record):
    """What a grid came to."""

    KIND = "sweep"

    cells: int
    axes: dict[str, tuple[Scalar, ...]]
    """Key of the grid (`recipe` first) -> its values, in the order of the grid."""
    failed: dict[str, str]
    """GridCell -> why."""
    rows: tuple[dict[str, Scalar], ...]
    """Those of the table."""


@dataclass(frozen=True)
class Workers:
    """Who runs the cells of a grid: processes of one thread each on this machine, or the workers of a Dask scheduler,
    which must see the same files."""

    jobs: int | None = None
    """Processes here; None: one a core."""
    scheduler: str | None = None
    """Address of the Dask scheduler."""
    device: str | None = None
    """Where each cell computes; None: on a GPU, if its worker has one."""


def run_sweep(
    file: Path, out: Path, workers: Workers | None = None, progress: Progress | None = None
) -> tuple[SweepRecord, Path]:
    """Run the cells of a grid that are not finished; write `table.parquet` and `sweep.html`. The record, and the page.

    `file` holds the grid, and `out` takes the cells. Raises InputError for a bad grid or a scheduler that does not
    answer; a cell that fails stops no other.
    """
    from mixturelens.lab.pages.sweep import Swept, write_sweep

    workers = workers or Workers()
    grid = load_grid(file)
    cells = cells_of(grid, file)
    out = out.resolve()
    failed = {cell.name: cell.error for cell in cells if cell.spec is None}
    left = []
    for cell in cells:
        try:
            if cell.spec is not None and _lacks(_recorded(cell, out / "cells" / cell.name), grid.then):
                left.append(cell)
        except InputError as error:
            failed[cell.name] = str(error)
    work = functools.partial(run_cell, out=out, then=grid.then, device=workers.device)
    done = len(cells) - len(left)
    if progress is not None:
        progress("cells", done, len(cells))
    if workers.scheduler and left:
        outcomes = _on_dask(left, work, workers.scheduler, out)
    else:
        outcomes = _here(left, work, workers.jobs)
    for number, (cell, error) in enumerate(outcomes, start=done + 1):
        if error:
            failed[cell.name] = error
        if progress is not None:
            progress("cells", number, len(cells))
    rows = [row for cell in cells if cell.name not in failed for row in _rows(cell, out, grid.then)]
    record = SweepRecord(
        cells=len(cells),
        axes={
            "recipe": tuple(dict.fromkeys(cell.recipe for cell in cells)),
            **{key: tuple(dict.fromkeys(cell.at[key] for cell in cells)) for key in grid.set},
        },
        failed={cell.name: failed[cell.name] for cell in cells if cell.name in failed},
        rows=tuple(rows),
    )
    table = table_of(record)
    write_bytes(out / "table.parquet", table.to_parquet(None))
    page = write_sweep(
        out / "sweep.html",
        f"Sweep: {file.stem}",
        Swept(table, record.axes, grid.seeds, record.cells, record.failed),
        read_text(file, "is gone"),
    )
    return record, page


def _rows(cell: GridCell, out: Path, then: Sequence[str]) -> list[dict[str, Scalar]]:
    record = CellRecord.load(out / "cells" / cell.name / "cell.json")
    return [
        {
            "cell": cell.name,
            "recipe": cell.recipe,
            **cell.at,
            "seed": cell.seed,
            "after": row.after,
            "trained_cue": row.trained_cue,
            **{column: value for name in then for column, value in row.numbers[name].items()},
        }
        for row in record.rows
    ]


def table_of(record: SweepRecord) -> pd.DataFrame:
    """One row for each checkpoint after training; numbers that were not measured are missing, never zero.

    Columns hold numbers, words or truths; a key of the grid whose values are of several kinds is written in words.
    """
    import pandas as pd

    columns = dict.fromkeys(key for row in record.rows for key in row) or dict.fromkeys(TAKEN[:5])
    return pd.DataFrame({key: _column([row.get(key) for row in record.rows], key in record.axes) for key in columns})


def _column(values: list[Scalar], setting: bool) -> pd.Series:
    import pandas as pd

    kinds = {type(value) for value in values if setting or value is not None}
    if kinds == {bool}:
        return pd.Series(values, dtype="boolean")
    if kinds == {int}:
        return pd.Series(values, dtype="int64")
    if kinds <= {int, float}:
        return pd.Series(values, dtype="float64")
    texts = [None if value is None and not setting else text(value) for value in values]
    return pd.Series(texts, dtype="string")


def _here(cells: Sequence[GridCell], work: Work, jobs: int | None) -> Iterator[tuple[GridCell, str]]:
    """In processes of one thread each. If one is killed, what is left is done one at a time: it is known whose dies."""
    from joblib import Parallel, cpu_count, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    left = {cell.name: cell for cell in cells}
    jobs = min(jobs or cpu_count(), max(len(cells), 1))
    # joblib replaces a worker whose memory grew, which is as it should be
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
    with parallel_config(backend="loky", inner_max_num_threads=1):
        try:
            run: Any = Parallel(n_jobs=jobs, return_as="generator_unordered")
            for name, error in run(delayed(_named)(cell, work) for cell in cells):
                yield left.pop(name), error
        except TerminatedWorkerError:
            for cell in list(left.values()):
                one: Any = Parallel(n_jobs=2)  # one job alone would be done in this process
                try:
                    [(_, error)] = one([delayed(_named)(cell, work)])
                except TerminatedWorkerError:
                    error = "its process was killed; memory may have run out"
                yield cell, error


def _named(cell: GridCell, work: Work) -> tuple[str, str]:
    return cell.name, work(cell)


def _on_dask(cells: Sequence[GridCell], work: Work, scheduler: str, out: Path) -> Iterator[tuple[GridCell, str]]:
    """On the workers of a running cluster. A cell whose worker died goes to another, which resumes it."""
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise InputError("--scheduler needs Dask: in a clone, pip install '.[lab]'") from None
    try:
        client = Client(scheduler, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--scheduler {scheduler}: no Dask scheduler answers there ({error})") from None
    with client:
        # one key a cell, whoever asks: two sweeps of one folder at the same time share it
        sent = {
            client.submit(work, cell, key=str(out / cell.name), pure=False, priority=-place): cell
            for place, cell in enumerate(cells)
        }
        for future in as_completed(sent, loop=client.loop):
            try:
                with running(sent[future].name, "failed on its worker"):
                    said = future.result()
            except RunError as error:
                said = str(error)
            yield sent[future], said
