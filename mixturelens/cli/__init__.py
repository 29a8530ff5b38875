"""The command line: parse, call, print. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import contextlib
import errno
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixturelens.cli.tables import (
    number,
    print_json,
    print_table,
    show_behaviour,
    show_discovered,
    show_features,
    show_forecasts,
    show_grafts,
    show_mechanism,
    show_patching,
    show_probing,
    show_repairs,
    show_score,
    show_structure,
    show_sweep,
    show_verdicts,
)
from mixturelens.types import InputError, RunError

if TYPE_CHECKING:
    from mixturelens.behaviour.record import BehaviourRecord
    from mixturelens.discovery.judge import Judge
    from mixturelens.features.record import FeatureRecord
    from mixturelens.grafting.record import GraftRecord
    from mixturelens.models import Budget
    from mixturelens.patching.record import PatchingRecord
    from mixturelens.pipeline import Case
    from mixturelens.probing.record import ProbingRecord
    from mixturelens.routing.repair import RepairRecord
    from mixturelens.routing.verdict import VerdictRecord

app = typer.Typer(
    name="mixturelens",
    help="Did post-training change the router, or the specialists?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Run = Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of a run made by `mixturelens train`.")]
Before = Annotated[
    str | None,
    typer.Option(metavar="SRC", help="Checkpoint before post-training (S): a folder, a hub id, or a LoRA adapter."),
]
After = Annotated[str | None, typer.Option(metavar="SRC", help="Checkpoint after post-training (R), likewise.")]
Base = Annotated[
    str | None, typer.Option(metavar="SRC", help="What adapters are applied on, where their configs do not say.")
]
Dtype = Annotated[str | None, typer.Option(help="float32 (default), bfloat16 or float16.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto, balanced or sequential: spread a model over devices (behaviour and verdict).")
]
SuiteFile = Annotated[Path | None, typer.Option("--suite", metavar="FILE", help="Behaviour suite of the pair.")]
TrainedCue = Annotated[str | None, typer.Option(help="Cue that RL trained on, where the suite does not say.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Where results go; default: under artifacts/.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU when there is one.")]
Seed = Annotated[int, typer.Option(help="Seed of samples and bootstrap.")]
Minutes = Annotated[float | None, typer.Option(help="Time that an instrument may take: with less it looks at less.")]
Memory = Annotated[float | None, typer.Option(metavar="GB", help="Memory that an instrument may take, likewise.")]
Exhaustive = Annotated[bool, typer.Option("--exhaustive", help="Look everywhere, however long it takes.")]
Saes = Annotated[
    list[Path] | None,
    typer.Option(
        "--sae", metavar="FOLDER", help="Pretrained SAE in SAELens' format, instead of ours; may be repeated."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the record, and nothing else, on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]


@app.command()
def demo(out: Out = None, device: Device = None, quiet: Quiet = False) -> None:
    """Train the formatting-tag organism, say what RL did to it, find the router, repair it, and write a report."""
    from mixturelens import pipeline
    from mixturelens.organism import load_spec

    folder = out or Path("artifacts/demo")
    with _working(quiet) as (progress, say):
        where = _device(device)
        pipeline.train(load_spec("default"), folder, where, progress)
        pairs = pipeline.run_pairs(folder, device=where)
        patched = [pipeline.patch(pair, say=say) for pair in pairs]
        for pair in pairs:
            pipeline.circuit(pair, pairs, say=say)
        grafted = [pipeline.graft(pair, say=say) for pair in pairs]
        probed = [pipeline.probe(pair, say=say) for pair in pairs]
        repaired = [pipeline.repair(pair, say=say) for pair in pairs]
        verdicts = [pipeline.verdict(pair) for pair in pairs]  # now with what the weights say
        page = pipeline.report(pairs)
    show_verdicts(pairs, verdicts)
    print()
    show_patching(pairs, patched)
    show_probing(pairs, probed)
    show_grafts(pairs, grafted)
    show_mechanism(pairs, verdicts)
    show_repairs(pairs, repaired)
    print(f"\nReport: {page}")


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
    from mixturelens.organism import load_spec, recipes, with_settings

    if list_recipes:
        width = max(map(len, recipes()))
        for name, description in recipes().items():
            print(f"{name:{width}} {description}")
        return
    loaded = load_spec(spec, **({} if seed is None else {"seed": seed}))
    if settings:
        loaded = with_settings(loaded, _settings(settings), "--set")
    folder = out or Path("artifacts") / f"{loaded.name}-{loaded.seed}"
    from mixturelens import pipeline

    with _working(quiet) as (progress, _):
        trajectories = pipeline.train(loaded, folder, _device(device), progress)
    rows = []
    for trajectory in trajectories:
        for cue, state in trajectory.points[-1].cues.items():
            weights = " ".join(f"{name} {value.value:.3f}" for name, value in state.weights.items())
            rows.append((trajectory.stage, str(trajectory.steps), cue, weights, number(state.accuracy.value)))
    print_table(("stage", "steps", "cue", "weights", "accuracy"), rows)
    print(f"\nRun: {folder}")


def _settings(given: list[str]) -> dict[str, Any]:
    """KEY=VALUE, with a value as YAML has it."""
    import yaml

    found = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals or not key:
            raise InputError(f"--set {each}: give KEY=VALUE, as rl.steps=20")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[key] = value
    return found


Options = dict[str, Any]
"""`seed` and `say` for the functions of the pipeline."""
Work = Callable[..., tuple[list[Any], Callable[[], None]]]
"""Takes the pairs and Options, and perhaps options of its own."""


def _on_pairs(work: Work) -> Work:
    """Make a command of a function that measures pairs: it returns their records, and what prints them for people.

    Its parameters behind `pairs` and `options` are options of that command alone.
    """

    def command(
        run: Run = None,
        before: Before = None,
        after: After = None,
        suite: SuiteFile = None,
        trained_cue: TrainedCue = None,
        base: Base = None,
        out: Out = None,
        device: Device = None,
        device_map: DeviceMap = None,
        dtype: Dtype = None,
        minutes: Minutes = None,
        memory: Memory = None,
        seed: Seed = 0,
        as_json: Json = False,
        quiet: Quiet = False,
        **own: Any,
    ) -> None:
        outside = {"base": base, "device_map": device_map}
        with _working(quiet) as (_, say):
            budget = _budget(minutes, memory)
            pairs = _pairs(run, before, after, suite, trained_cue, out, outside, device, dtype, budget)
            records, show = work(pairs, {"seed": _seed(seed), "say": say}, **own)
        if as_json:
            print_json(records, run)
        else:
            show()

    # options of its own follow those that all have
    own = list(inspect.signature(work).parameters.values())[2:]
    shared = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [*shared, *(p.replace(annotation=globals()[p.annotation], kind=p.KEYWORD_ONLY) for p in own)]
    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(work.__name__, help=work.__doc__)(command)
    return work


@_on_pairs
def behaviour(pairs: list[Case], options: Options) -> tuple[list[BehaviourRecord], Callable[[], None]]:
    """Weights, forced and expected accuracy under each cue, of a checkpoint or a pair."""
    from mixturelens import pipeline

    records = [pipeline.behaviour(pair, **options) for pair in pairs]

    def show() -> None:
        for pair, record in zip(pairs, records, strict=True):
            print(f"{pair.name}: {record.questions} questions, {record.method}")
            show_behaviour(record)

    return records, show


@_on_pairs
def verdict(pairs: list[Case], options: Options) -> tuple[list[VerdictRecord], Callable[[], None]]:
    """Say whether the router or the specialists changed, with intervals and a reason."""
    from mixturelens import pipeline

    records = [pipeline.verdict(pair, **options) for pair in pairs]
    return records, lambda: show_verdicts(pairs, records)


@_on_pairs
def patch(
    pairs: list[Case], options: Options, exhaustive: Exhaustive = False
) -> tuple[list[PatchingRecord], Callable[[], None]]:
    """Find the router: patch every site between cues, between hints, and from S into R."""
    from mixturelens import pipeline

    records = [pipeline.patch(pair, exhaustive=exhaustive, **options) for pair in pairs]
    circuits = [pipeline.circuit(pair, pairs, exhaustive=exhaustive, **options) for pair in pairs]

    def show() -> None:
        show_patching(pairs, records)
        for pair, record, circuit in zip(pairs, records, circuits, strict=True):
            for reason in (*record.missing, *(f"circuit of the {why}" for why in circuit.missing)):
                print(f"{pair.name}: not measured: {reason}")

    return records, show


@_on_pairs
def probe(
    pairs: list[Case], options: Options, exhaustive: Exhaustive = False
) -> tuple[list[ProbingRecord], Callable[[], None]]:
    """Say what can be read where in S and in R, what erasing it does, and which subspaces carry it."""
    from mixturelens import pipeline

    records = [pipeline.probe(pair, exhaustive=exhaustive, **options) for pair in pairs]
    return records, lambda: show_probing(pairs, records)


@_on_pairs
def graft(
    pairs: list[Case], options: Options, exhaustive: Exhaustive = False
) -> tuple[list[GraftRecord], Callable[[], None]]:
    """Say which components of R carry the change, of routing and of specialists, and roll R back without them."""
    from mixturelens import pipeline

    records = [pipeline.graft(pair, exhaustive=exhaustive, **options) for pair in pairs]
    verdicts = [pipeline.verdict(pair, **options) for pair in pairs]

    def show() -> None:
        show_grafts(pairs, records)
        show_mechanism(pairs, verdicts)

    return records, show


@_on_pairs
def features(
    pairs: list[Case], options: Options, *, sae: Saes = None
) -> tuple[list[FeatureRecord], Callable[[], None]]:
    """Train SAEs and crosscoders, and say what their features do that heads, neurons and directions do not."""
    from mixturelens import pipeline

    records = [pipeline.features(pair, saes=sae or (), **options) for pair in pairs]
    return records, lambda: show_features(pairs, records)


@_on_pairs
def repair(pairs: list[Case], options: Options) -> tuple[list[RepairRecord], Callable[[], None]]:
    """Bring the harmed cue back through the cue reader, and write the repaired checkpoint."""
    from mixturelens import pipeline

    records = [pipeline.repair(pair, **options) for pair in pairs]
    return records, lambda: show_repairs(pairs, records)


@app.command()
def report(
    run: Run = None,
    before: Before = None,
    after: After = None,
    suite: SuiteFile = None,
    trained_cue: TrainedCue = None,
    base: Base = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page, readable without a network, with the answer in words on top."""
    from mixturelens import pipeline

    with _working(quiet) as (_, say):
        pairs = _pairs(run, before, after, suite, trained_cue, out, {"base": base}, device, dtype)
        page = pipeline.report(pairs, seed=_seed(seed), say=say)
    print(page)


@app.command()
def discover(
    before: Before = None,
    after: After = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, one JSON object a line: id, and prompt or messages.")
    ] = None,
    refine: Annotated[
        Path | None,
        typer.Option(metavar="SUITE", help="Instead: measure an edited suite again, on the completions beside it."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Completions of each side at each prompt.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a completion, at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts go through the chat template, as messages do.")] = False,
    labels: Annotated[
        str | None, typer.Option(metavar="FILE:FUNCTION", help="A judge: your function of (prompt, completion).")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="A judge: an OpenAI-compatible server on this machine.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="The model to ask there.")] = None,
    base: Base = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Propose policies, behaviours and cue from prompts alone, as a suite to read, to edit and to ask with."""
    from mixturelens import pipeline

    if refine is not None:
        if before is not None or after is not None or prompts is not None:
            raise InputError("--refine reads the completions that are there; leave --before, --after and --prompts out")
        record, folder = pipeline.refine_discovery(refine, out, seed=_seed(seed))
        show_discovered(record, folder / "refine.html", refine, as_json)
        return
    if before is None or after is None or prompts is None:
        raise InputError("give --before SRC, --after SRC and --prompts FILE; or --refine SUITE")
    for flag, number_of in (("--samples", samples), ("--max-new-tokens", max_new_tokens)):
        if number_of < (2 if flag == "--samples" else 1):
            raise InputError(f"{flag} {number_of}: too few")
    second = _judge(labels, judge, judge_model)
    with _working(quiet) as (progress, say):
        record, folder = pipeline.discover(
            before,
            after,
            prompts,
            out,
            samples=samples,
            max_new_tokens=max_new_tokens,
            chat=chat,
            base=base,
            device=_device(device),
            dtype="float32" if dtype is None else dtype,
            seed=_seed(seed),
            judge=second,
            judged_by=labels or f"{judge_model} at {judge}",
            progress=lambda done, total: progress("completions", done, total, {}),
            say=say,
        )
    show_discovered(record, folder / "discover.html", folder / "suite.yaml", as_json)


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
    from mixturelens import pipeline

    with _working(quiet) as (_, say):
        record = pipeline.structure(run, end, device=_device(device), seed=seed, say=say)
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
    from mixturelens import pipeline

    with _working(quiet) as (_, say):
        records = pipeline.forecast(run, device=_device(device), seed=seed, say=say)
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
    from mixturelens import pipeline

    folder = out or Path("artifacts/proving-quick" if quick else "artifacts/proving")
    with _working(quiet) as (progress, _):
        record, page = pipeline.score(folder, quick=quick, jobs=jobs, progress=_timed(progress))
    if as_json:
        print_json([record], None)
        return
    show_score(record)
    print(f"\nReport: {page}")


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
    from mixturelens.sweep.run import run_sweep

    with _working(quiet) as (progress, _):
        where = device if scheduler else _device(device)  # workers may have what is missing here
        record, page = run_sweep(grid, out, jobs=jobs, scheduler=scheduler, device=where, progress=_timed(progress))
    if as_json:
        print_json([record], None)
    else:
        show_sweep(record)
        print(f"\nTable: {page.with_name('table.parquet')}\nReport: {page}")
    for cell, why in record.failed.items():
        print(f"{cell}: {why}", file=sys.stderr)
    if record.failed:
        raise RunError(f"{len(record.failed)} of {record.cells} cells failed; the same command tries them again")


# --- shared by the commands -------------------------------------------------------------------------------------------


def _pairs(
    run: Path | None,
    before: str | None,
    after: str | None,
    suite: Path | None,
    trained_cue: str | None,
    out: Path | None,
    outside: dict[str, str | None],
    device: str | None,
    dtype: str | None,
    budget: Budget | None = None,
) -> list[Case]:
    """RUN, or --before [--after] --suite, but not both. `outside` is for pairs that mixturelens did not train."""
    from mixturelens import pipeline

    placed: dict[str, Any] = {"device": _device(device), "dtype": "float32" if dtype is None else dtype}
    placed["budget"] = budget
    if run is not None:
        if before or after or suite:
            raise InputError("give either RUN or --before/--after/--suite, not both")
        for name, value in {"out": out, **outside}.items():
            if value is not None:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{flag}: the checkpoints and results of a RUN lie in its own folder; leave {flag} out"
                )
        return pipeline.run_pairs(run, **placed)
    if before is None or suite is None:
        raise InputError("give a RUN folder, or --before SRC [--after SRC] --suite FILE")
    return [pipeline.outside_pair(before, after, suite, out, trained_cue, **outside, **placed)]


def _device(wanted: str | None) -> str:
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=wanted).is_meta:
            raise InputError("--device meta: nothing is computed there; give cpu or cuda")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {wanted}: {str(error).splitlines()[0]}") from None
    return wanted


def _budget(minutes: float | None, memory: float | None) -> Budget:
    from mixturelens.models import Budget

    for flag, given in (("--minutes", minutes), ("--memory", memory)):
        if given is not None and not 0 < given < float("inf"):
            raise InputError(f"{flag} {given:g}: give a number above 0")
    return Budget(minutes=minutes, memory=memory)


def _seed(wanted: int) -> int:
    if not 0 <= wanted < 2**32:
        raise InputError(f"--seed {wanted}: a seed is a number from 0 to 4294967295")
    return wanted


def _judge(labels: str | None, url: str | None, model: str | None) -> Callable[[Path], Judge] | None:
    from mixturelens.discovery.judge import check_here, from_file, served

    if labels is not None:
        if url is not None:
            raise InputError("give --labels or --judge, not both")
        function = from_file(labels)
        return lambda _: function
    if (url is None) != (model is None):
        raise InputError("--judge URL and --judge-model NAME go together")
    if url is None or model is None:
        return None
    check_here(url)  # before anything is drawn
    return lambda cache: served(url, model, cache)


def _timed(progress: Callable[[str, int, int, dict[str, float]], None]) -> Callable[[str, int, int], None]:
    """Progress of cells done, with the time that the rest will take."""
    started: dict[str, tuple[float, int]] = {}

    def cells(what: str, done: int, number: int) -> None:
        at, first = started.setdefault(what, (time.monotonic(), done))
        each = (time.monotonic() - at) / max(1, done - first)
        progress(what, done, number, {"minutes left": each * (number - done) / 60} if done > first else {})

    return cells


LONG = 60.0
"""Seconds from which on it is said how long training will take."""


@contextlib.contextmanager
def _working(quiet: bool) -> Iterator[tuple[Callable[[str, int, int, dict[str, float]], None], Callable[[str], None]]]:
    """Progress on standard error, and nothing that a library prints on standard output."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from mixturelens.models import quiet_libraries
    from mixturelens.models.cost import said_time

    quiet_libraries()
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    live = console.is_terminal and not quiet
    with contextlib.redirect_stdout(sys.stderr), Progress(*columns, console=console, disable=not live) as bar:
        tasks: dict[str, Any] = {}
        began: dict[str, tuple[float, int]] = {}

        def progress(stage: str, step: int, steps: int, numbers: dict[str, float]) -> None:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in numbers.items())
            if not live:
                # a log gets a line now and then instead of a bar, and an early one where it will take long
                now = time.monotonic()
                start, first = began.setdefault(stage, (now, step))
                left = (now - start) / max(1, step - first) * (steps - step)
                if step % max(1, steps // 8) == 0 or (step == first + 1 and left > LONG):
                    also = f"  {said_time(left)} left" if left > LONG else ""
                    console.print(f"{stage} {step}/{steps}  {shown}{also}", highlight=False)
                return
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=steps, numbers="")
            bar.update(tasks[stage], completed=step, numbers=shown)

        def say(text: str) -> None:
            console.print(text if text.startswith("note: ") else f"measuring: {text}", style="dim", markup=False)

        yield progress, say


def main() -> None:
    """Entry point: bad input is one line on standard error and status 2, a failed run status 1."""
    try:
        app()
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it stopped", 130)
    except OSError as error:
        _fail(*_explain(error))
    except Exception as error:
        # safetensors reports a full disk as an error of its own
        if "No space left on device" in str(error):
            _fail(*_explain(OSError(errno.ENOSPC, "No space left on device")))
        raise


def _explain(error: OSError) -> tuple[str, int]:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}no permission to write; give another --out", 2
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left on the device; nothing half-written was kept: free some and run again", 1
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{where}a file is in the way of a folder; give another --out", 2
    return f"{where}{error.strerror or error}", 1


def _fail(message: str, status: int) -> None:
    print(f"mixturelens: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)
