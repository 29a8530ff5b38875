"""Sweeps: a cell is a run, finished cells stay, failed ones harm no other, and Dask gives the same table."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from test_cli import refused

from mixturelens import figures, pipeline
from mixturelens.lab import runs
from mixturelens.lab.organism import build_suite, load_spec
from mixturelens.lab.sweep import run as sweep
from mixturelens.lab.sweep.grid import GridCell, cells_of, load_grid
from mixturelens.lab.sweep.run import Workers, run_sweep, table_of
from mixturelens.routing.verdict import VerdictRecord
from mixturelens.suite import load_suite
from mixturelens.types import InputError, Interval

REFERENCE = Path(__file__).resolve().parents[2] / "artifacts" / "reference" / "records"
TINY = yaml.safe_load((Path(__file__).parents[1] / "tiny.yaml").read_text(encoding="utf-8"))
SMALLEST = TINY | {
    "sft": {**TINY["sft"], "steps": 4, "measure_every": 4},
    "rl": {**TINY["rl"], "cues": ["A"], "steps": 2, "measure_every": 2},
}
GRID = {"recipe": "small.yaml", "set": {"rl.learning_rate": ["1e-3", 0.002], "rl.adam_epsilon": [0.01]}, "seeds": 2}


def write(folder: Path, grid: dict, recipe: dict | None = SMALLEST, name: str = "grid.yaml") -> Path:
    if recipe is not None:
        (folder / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / name).write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")
    return folder / name


def cells(folder: Path, **changes) -> list[GridCell]:
    file = write(folder, GRID | changes)
    return cells_of(load_grid(file), file)


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_a_grid_is_a_product_with_readable_names(tmp_path):
    found = cells(tmp_path)
    assert [cell.name for cell in found] == [
        f"small--rl.learning_rate={rate}--rl.adam_epsilon=0.01--seed={seed}"
        for rate in ("0.001", "0.002")
        for seed in (0, 1)
    ]
    for cell, rate in zip(found, (1e-3, 1e-3, 2e-3, 2e-3), strict=True):
        assert cell.spec is not None
        assert cell.spec.rl.learning_rate == rate
        assert cell.spec == load_spec(tmp_path / "small.yaml", seed=cell.seed).model_copy(update={"rl": cell.spec.rl})
        assert cell.spec.rl.steps == 2


def test_what_is_added_to_a_grid_leaves_the_names_of_its_cells(tmp_path):
    more = cells(
        tmp_path,
        recipe=["small.yaml", "default"],
        seeds=[1, 0, 7],
        set={**GRID["set"], "rl.learning_rate": [0.002, 0.001, 0.003]},
    )
    assert {cell.name for cell in cells(tmp_path)} < {cell.name for cell in more}
    assert len(more) == 2 * 3 * 3
    assert {cell.recipe for cell in more} == {"small", "default"}


def test_a_label_sets_several_keys_at_once(tmp_path):
    mixture = {
        "even": {},
        "rare a/b": {"policies.a.weight": 0.05, "policies.b.weight": 0.95, "hints": None},
    }
    even, rare = cells(tmp_path, set={"mixture": mixture}, seeds=[3])
    assert (even.at, rare.at) == ({"mixture": "even"}, {"mixture": "rare a/b"})
    assert rare.name == "small--mixture=rare_a_b--seed=3"
    assert rare.spec is not None
    assert rare.spec.policies["a"].weight == 0.05
    assert rare.spec.hints is None
    assert even.spec == load_spec(tmp_path / "small.yaml", seed=3)


def test_a_setting_that_makes_no_spec_is_a_cell_with_a_reason(tmp_path):
    good, bad, worse = cells(tmp_path, set={"rl.steps": [2, -1], "hints": {"with": {}}}, seeds=1) + cells(
        tmp_path, set={"none": {"x": {"hints": None, "hints.share": 0.5}}}, seeds=1
    )
    assert good.spec is not None
    assert bad.spec is None
    assert "rl.steps" in bad.error
    assert worse.error == "set.hints.share: hints is null there, and holds no keys"
    [unknown] = cells(tmp_path, recipe="no-such", set={}, seeds=1)
    assert "no such spec file" in unknown.error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": [1]}, "unknown key 'seed'"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": "many"}, "seeds"),
        ({"recipe": []}, "recipe"),
        ({"set": {"rl.steps": 4}}, "rl.steps: give a list of values"),
        ({"set": {"rl.steps": []}}, "rl.steps: give a list of values"),
        ({"set": {"rl.freeze": [["norms"]]}}, "rl.freeze: a value that is no number or word needs a label"),
        ({"set": {"hints": {"without": None}}}, "hints: each label needs the keys that it sets"),
        ({"set": {"seed": [1, 2]}}, "seed: a column of the table may be called so"),
        ({"set": {"verdict": {"x": {}}}}, "verdict: a column of the table may be called so"),
        ({"then": ["verdicts"]}, "no instrument 'verdicts' (those of behaviour, patch"),
        ({"set": {"rl.steps": [4, 4]}}, "two cells would be called small--rl.steps=4--seed=0"),
        ({"set": {"m": {"a/b": {}, "a_b": {}}}}, "two cells would be called small--m=a_b--seed=0"),
    ],
)
def test_a_bad_grid_is_refused_by_file_and_key(tmp_path, changes, said):
    with pytest.raises(InputError, match=r"grid\.yaml: ") as error:
        cells(tmp_path, **changes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["- a\n- b\n", "recipe: [", None])
def test_a_file_that_is_no_grid_is_refused(tmp_path, content):
    file = tmp_path / "grid.yaml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"grid\.yaml: "):
        run_sweep(file, tmp_path / "out")


# --- running it -------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(monkeypatch) -> list[Path]:
    """Training and verdicts that take no time; the folders that were trained, as they were asked for."""
    asked = []
    known = {name: VerdictRecord.load(REFERENCE / name / "verdict.json") for name in ("sft--rl-A", "sft--rl-B")}

    def train(spec, out, device="cpu", progress=None):
        runs.start_run(spec, out)
        asked.append(out)
        build_suite(spec).save(out / "suite.yaml")
        (out / "checkpoints" / "rl-A").mkdir(parents=True, exist_ok=True)
        return []

    def opened(before, after, suite, *, trained_cue, out, **_):
        """As much of a pair as a cell asks for: there are no checkpoints that one could be made of."""
        asked_with = load_suite(suite).model_copy(update={"trained_cue": trained_cue})
        return SimpleNamespace(name=f"{before.name}--{after.name}", after=after, suite=asked_with, out=out)

    def verdict(pair, **options):
        share = Interval(value=runs.load_run(pair.out).seed / 10, low=0.0, high=1.0)
        return known[pair.name].model_copy(update={"routing_share": share})

    monkeypatch.setattr(figures, "plotly_script", lambda: "")  # megabytes that are not ours
    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "Pair", opened)
    monkeypatch.setattr(pipeline, "verdict", verdict)
    monkeypatch.setattr(pipeline, "measure", verdict)
    return asked


def test_finished_cells_stay_and_a_grown_grid_runs_what_is_new(tmp_path, training):
    file, out = write(tmp_path, GRID), tmp_path / "out"
    seen = []
    record, page = run_sweep(file, out, Workers(jobs=1), progress=lambda *at: seen.append(at))
    assert seen == [("cells", i, 4) for i in range(5)]
    assert len(training) == 4
    assert (record.cells, record.failed) == (4, {})
    table = pd.read_parquet(out / "table.parquet")
    assert page == out / "sweep.html"
    assert table.equals(table_of(record))
    stamps = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*")}
    bytes_before = [(out / name).read_bytes() for name in ("table.parquet", "sweep.html")]

    again, _ = run_sweep(file, out, Workers(jobs=1))
    assert again == record
    assert len(training) == 4
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*")}
    assert bytes_before == [(out / name).read_bytes() for name in ("table.parquet", "sweep.html")]

    more, _ = run_sweep(write(tmp_path, GRID | {"seeds": 3}), out, Workers(jobs=1))
    assert {path.name for path in training[4:]} == {row["cell"] for row in more.rows if row["seed"] == 2}
    assert [row for row in more.rows if row["seed"] != 2] == list(record.rows)


@pytest.mark.slow
def test_a_sweep_from_the_command_line(tmp_path, run):
    """One cell that is really trained and one that cannot be: a row says what the records say, and the status is 1."""
    file, out = write(tmp_path, GRID | {"set": {"rl.learning_rate": ["1e-3", -1.0]}, "seeds": 1}), tmp_path / "out"
    status, printed, said = run("sweep", file, "--out", out, "--jobs", 1, "--json", "--quiet")
    bad = "small--rl.learning_rate=-1.0--seed=0"
    assert status == 1
    assert f"\n{bad}: recipe small with these settings: rl.learning_rate: Input should" in f"\n{said}"
    assert said.endswith("mixturelens: 1 of 2 cells failed; the same command tries them again\n")
    record = json.loads(printed)
    assert list(record["failed"]) == [bad]

    table = pd.read_parquet(out / "table.parquet")
    [row] = table.to_dict("records")
    verdict = json.loads((out / "cells" / row["cell"] / "records/sft--rl-A/verdict.json").read_text())
    assert (row["recipe"], row["rl.learning_rate"], row["seed"]) == ("small", 0.001, 0)
    assert (row["after"], row["trained_cue"], row["verdict"]) == ("rl-A", "A", verdict["verdict"])
    # none, where hardly any completion shows a policy
    terms = {f"bits.{term}": value for term, value in verdict["bits"].items()}
    for column, value in (terms | {"text.nats_per_token": verdict["text"]["nats_per_token"]}).items():
        known, shown = value["high"], row[f"{column}.high"]
        assert shown == known if known is not None else pd.isna(shown)
    for cue, state in verdict["per_cue"].items():
        for when in ("before", "after"):
            assert row[f"accuracy.{cue}.{when}"] == state[when]["overall"]
            assert row[f"weight.a.{cue}.{when}.low"] == state[when]["intervals"]["weights.a"]["low"]
    status, printed, said = run("sweep", file, "--out", out, "--jobs", 1, "--quiet")
    assert status == 1
    assert f"{row['cell']}   rl-A" in printed
    assert f"Table: {out}/table.parquet" in printed
    # the mechanism's verdict is null here, and null is missing
    assert table["mechanism.verdict"].isna().all()
    assert [value for key, value in record["rows"][0].items() if row[key] == row[key]] == [
        value for value in row.values() if value == value
    ]


def test_jobs_are_of_this_machine(tmp_path, run):
    options = ("--out", tmp_path / "out", "--jobs", 2, "--scheduler", "tcp://x:1")
    refused(run("sweep", write(tmp_path, GRID), *options), "--scheduler", "give one of them")


def test_an_instrument_that_is_asked_for_later_is_run_on_what_was_trained(tmp_path, training):
    out = tmp_path / "out"
    run_sweep(write(tmp_path, GRID | {"then": ["behaviour"]}), out, Workers(jobs=1))
    assert "verdict" not in pd.read_parquet(out / "table.parquet")
    record, _ = run_sweep(write(tmp_path, GRID), out, Workers(jobs=1))
    assert all("verdict" in row for row in record.rows)
    fewer, _ = run_sweep(write(tmp_path, GRID | {"then": ["behaviour"]}), out, Workers(jobs=1))
    assert len(training) == 8  # the last start found all that it asked for
    assert "verdict" not in fewer.rows[0]


def test_what_fails_is_reported_tried_again_and_harms_no_other(tmp_path, training, monkeypatch):
    out, measure = tmp_path / "out", pipeline.verdict

    def verdict(pair, **options):
        if "seed=1" in str(pair.out):
            raise RuntimeError("of\nits own")
        return measure(pair, **options)

    monkeypatch.setattr(pipeline, "verdict", verdict)
    grid = {"recipe": "small.yaml", "set": {"rl.steps": [2, 0]}, "seeds": 2}
    record, page = run_sweep(write(tmp_path, grid), out, Workers(jobs=1))
    names = [f"small--rl.steps={steps}--seed={seed}" for steps in (2, 0) for seed in (0, 1)]
    assert list(record.failed) == names[1:]
    assert record.failed[names[1]] == f"{names[1]}: failed (RuntimeError: of)"
    assert "rl.steps: Input should be greater than or equal to 1" in record.failed[names[2]]
    assert [row["cell"] for row in record.rows] == names[:1]
    assert "in verdict" in (out / "failed" / f"{names[1]}.txt").read_text()
    assert not (out / "cells" / names[2]).exists()
    assert "of its own" in page.read_text(encoding="utf-8")

    monkeypatch.setattr(pipeline, "verdict", measure)
    record, _ = run_sweep(write(tmp_path, grid), out, Workers(jobs=1))
    assert list(record.failed) == names[2:]
    assert [row["cell"] for row in record.rows] == names[:2]
    assert not (out / "failed").exists()


def test_a_recipe_that_changed_does_not_pass_for_what_was_run(tmp_path, training):
    out = tmp_path / "out"
    run_sweep(write(tmp_path, GRID), out, Workers(jobs=1))
    record, _ = run_sweep(write(tmp_path, GRID, SMALLEST | {"refusal": "no"}), out, Workers(jobs=1))
    assert len(record.failed) == 4
    assert all("holds another run (refusal: sorry, not no)" in why for why in record.failed.values())


def test_a_sweep_of_which_nothing_is_done_has_a_page_too(tmp_path):
    record, page = run_sweep(write(tmp_path, {"recipe": "none.yaml"}), tmp_path / "out", Workers(jobs=1))
    assert (record.cells, len(record.failed), record.rows) == (1, 1, ())
    assert "None is done." in page.read_text(encoding="utf-8")
    assert list(pd.read_parquet(tmp_path / "out" / "table.parquet")) == [
        "cell",
        "recipe",
        "seed",
        "after",
        "trained_cue",
    ]


def test_a_cell_waits_for_whoever_is_at_it_and_then_finds_it_done(tmp_path, training):
    file, out = write(tmp_path, GRID), tmp_path / "out"
    [cell, *_] = cells_of(load_grid(file), file)
    workers = [threading.Thread(target=sweep.run_cell, args=(cell, out, ("verdict",), "cpu")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(training) == 1


@pytest.mark.slow
def test_a_killed_process_fails_its_own_cell_alone(tmp_path):
    found = cells(tmp_path)
    doomed = found[1].name

    def work(cell: GridCell) -> str:
        if cell.name == doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        return ""

    outcomes = {cell.name: error for cell, error in sweep._here(found, work, 2)}
    assert set(outcomes) == {cell.name for cell in found}
    assert [name for name, error in outcomes.items() if "was killed" in error] == [doomed]


# --- Dask -------------------------------------------------------------------------------------------------------------


def test_a_scheduler_that_does_not_answer_is_named(tmp_path):
    with pytest.raises(InputError, match="--scheduler tcp:/x: no Dask scheduler answers there"):
        list(sweep._on_dask(cells(tmp_path), lambda _: "", "tcp:/x", tmp_path))


def test_without_dask_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install '\.\[lab\]'"):
        list(sweep._on_dask(cells(tmp_path), lambda _: "", "tcp://x:1", tmp_path))


def test_dask_gives_the_same_table_and_goes_on_after_a_failure(tmp_path, training):
    distributed = pytest.importorskip("distributed")
    file = write(tmp_path, GRID | {"set": {"rl.learning_rate": [1e-3, 2e-3, -1.0]}})
    here, _ = run_sweep(file, tmp_path / "here", Workers(jobs=1))
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0", protocol="tcp"
    ) as cluster:
        there, _ = run_sweep(file, tmp_path / "there", Workers(scheduler=cluster.scheduler_address, device="cpu"))
        again, _ = run_sweep(file, tmp_path / "there", Workers(scheduler=cluster.scheduler_address))
    assert here.failed.keys() == there.failed.keys()
    assert len(here.failed) == 2
    tables = [pd.read_parquet(tmp_path / name / "table.parquet") for name in ("here", "there")]
    assert tables[0].equals(tables[1])
    assert again == there
    assert len(training) == 8


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_costs_nothing(tmp_path):
    """Two workers, one killed while both train: every cell finishes once, as on one machine without any kill."""
    distributed = pytest.importorskip("distributed")
    file = write(tmp_path, {"recipe": "small.yaml", "set": {"rl.steps": [8, -1]}, "seeds": 4}, TINY)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        with distributed.Client(cluster) as client:
            workers = client.run(os.getpid)
        killed, done = [], []

        def kill() -> None:
            """Once both workers are in the middle of a stage."""
            while not killed:
                time.sleep(0.02)
                saved = (tmp_path / "there/cells").glob("*/training/*/checkpoint-*/progress.json")
                if len({path.parents[3] for path in saved}) == 2:
                    killed.append(next(iter(workers.values())))
                    os.kill(killed[0], signal.SIGKILL)
                    done.extend((tmp_path / "there/cells").glob("*/cell.json"))

        killer = threading.Thread(target=kill)
        killer.start()
        seen = []
        there, _ = run_sweep(
            file,
            tmp_path / "there",
            Workers(scheduler=cluster.scheduler_address, device="cpu"),
            progress=lambda *at: seen.append(at[1]),
        )
        killer.join()
        assert not done
        # the scheduler noticed: one of the first two is gone
        with distributed.Client(cluster) as client:
            assert killed[0] not in client.run(os.getpid).values()
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "there/cells").rglob("*")}
        again, _ = run_sweep(file, tmp_path / "there", Workers(scheduler=cluster.scheduler_address))
    assert seen == [4, 5, 6, 7, 8]  # the four that make no spec count as done from the start
    assert again == there
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "there/cells").rglob("*")}
    assert len(there.failed) == 4
    assert all("rl.steps=-1" in name for name in there.failed)
    here, _ = run_sweep(file, tmp_path / "here", Workers(jobs=2, device="cpu"))
    tables = [pd.read_parquet(tmp_path / name / "table.parquet") for name in ("here", "there")]
    assert len(tables[0]) == 8
    assert tables[0].equals(tables[1])
    assert here.rows == there.rows
