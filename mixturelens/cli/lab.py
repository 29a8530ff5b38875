"""Commands of the laboratory: grow organisms, foresee what RL does to them, and hold the instruments against them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mixturelens.cli.lab_tables import show_forecasts, show_score, show_structure, show_sweep
from mixturelens.cli.progress import working
from mixturelens.cli.shared import Device, Json, Out, Quiet, Seed, app, device_of, seed_of
from mixturelens.cli.tables import number, print_json, print_table, show_story, tell
from mixturelens.types import InputError, RunError, shown


@app.command()
def demo(out: Out = None, device: Device = None, quiet: Quiet = False) -> None:
    """Train the formatting-tag organism, say what RL did to it, find the router, repair it, and write a report."""
    import os

    import mixturelens as ml
    from mixturelens.lab import demo as lab_demo
    from mixturelens.lab import runs

    folder = out or Path("artifacts/demo")
    with working(quiet) as (progress, say):
        where = device_of(device)
        jobs = min(2, os.cpu_count() or 1) if where == "cpu" else 1
        pairs = lab_demo.demo(folder, where, jobs, progress, say)
        repaired = [ml.repair(pair) for pair in pairs]
        verdicts = [ml.verdict(pair) for pair in pairs]  # with what the weights say
        say("report")
        page = runs.report(folder, pairs)
    tell(f"{verdicts[0].reason}\n")
    show_story(pairs, verdicts, repaired)
    tell(f"Everything else is on the page: {page}")


@app.command()
def train(
    spec: Annotated[str, typer.Argument(metavar="[SPEC]", help="Recipe by name, or a YAML file.")] = "default",
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes that ship with mixturelens.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed instead of the spec's.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of the spec, by its path: model.pretrained=FOLDER."),
    ] = None,
    out: Out = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train an organism from a spec: SFT makes the mixture, RL on each cue selects."""
    from mixturelens.lab.organism import load_spec, recipes, with_settings

    if list_recipes:
        width = max(map(len, recipes()))
        for name, description in recipes().items():
            tell(f"{name:{width}} {description}")
        return
    loaded = load_spec(spec, **({} if seed is None else {"seed": seed}))
    if settings:
        loaded = with_settings(loaded, _settings(settings), "--set")
    folder = out or Path("artifacts") / f"{loaded.name}-{loaded.seed}"
    from mixturelens.lab import runs

    with working(quiet) as (progress, _):
        trajectories = runs.train(loaded, folder, device_of(device), progress)
    rows = []
    for trajectory in trajectories:
        for cue, state in trajectory.points[-1].cues.items():
            weights = " ".join(f"{name} {value.value:.3f}" for name, value in state.weights.items())
            rows.append((trajectory.stage, str(trajectory.steps), cue, weights, number(state.accuracy.value)))
    print_table(("stage", "steps", "cue", "weights", "accuracy"), rows)
    tell(f"\nRun: {folder}")


def _settings(given: list[str]) -> dict[str, Any]:
    """KEY=VALUE, with a value as YAML has it."""
    from mixturelens.files import yaml_of

    found = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals or not key:
            raise InputError(f"--set {each}: give KEY=VALUE, as rl.steps=20")
        found[key] = yaml_of(value, f"--set {key}")
    return found


@app.command()
def structure(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run whose recipe has `phases`.")],
    end: Annotated[str | None, typer.Option(help="Phase that ends the schedule; default: the last.")] = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a schedule of objectives left: a generalist, a conditional policy, churn, a mix, or nested ones."""
    from mixturelens.lab import runs
    from mixturelens.lab.structure import StructureSettings

    with working(quiet) as (_, say):
        record = runs.structure(run, StructureSettings(end, device=device_of(device), seed=seed_of(seed)), say)
    if as_json:
        print_json([record], None)
    else:
        show_structure(record)


@app.command()
def forecast(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, trained up to SFT at least.")],
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what RL will do to every cue, from SFT and the reward alone; and how right that was, once RL is done."""
    from mixturelens.lab import runs

    with working(quiet) as (_, say):
        records = runs.forecast(run, device=device_of(device), seed=seed_of(seed), say=say)
    if as_json:
        print_json(records, run)
    else:
        show_forecasts(records)


@app.command()
def score(
    quick: Annotated[bool, typer.Option("--quick", help="Four pairs only, one of each verdict.")] = False,
    out: Out = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at once, each on one thread.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hold every instrument against pairs and organisms whose truth is known; goes on where it was stopped."""
    from mixturelens.lab import runs

    folder = out or Path("artifacts/proving-quick" if quick else "artifacts/proving")
    with working(quiet) as (progress, _):
        record, page = runs.score(folder, quick=quick, jobs=jobs, progress=_counted(progress))
    if as_json:
        print_json([record], None)
        return
    show_score(record)
    tell(f"\nReport: {page}")


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Recipes, settings, seeds and instruments.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where runs, table and page go; finished cells stay.")],
    jobs: Annotated[int | None, typer.Option(min=1, help="Cells at once, each on one thread; default: cores.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="tcp://...", help="Dask cluster to run on; it must see the same files.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a grid of recipes, settings and seeds: one table, and a page of heat maps. Goes on where it was stopped."""
    if scheduler and jobs:
        raise InputError("--jobs is about this machine, and --scheduler about others; give one of them")
    from mixturelens.lab.sweep.run import Workers, run_sweep

    with working(quiet) as (progress, _):
        where = device if scheduler else device_of(device)  # workers may have what is missing here
        record, page = run_sweep(grid, out, Workers(jobs, scheduler, where), _counted(progress))
    if as_json:
        print_json([record], None)
    else:
        show_sweep(record)
        tell(f"\nTable: {page.with_name('table.parquet')}\nReport: {page}")
    for cell, why in record.failed.items():
        print(shown(f"{cell}: {why}"), file=sys.stderr)
    if record.failed:
        raise RunError(f"{len(record.failed)} of {record.cells} cells failed; the same command tries them again")


def _counted(progress: Callable[[str, int, int, dict[str, float]], None]) -> Callable[[str, int, int], None]:
    """Progress of what is only counted."""
    return lambda what, done, number: progress(what, done, number, {})
