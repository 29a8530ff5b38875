"""Commands for two checkpoints: parse, call, print. Heavy imports happen inside them, so that --help is quick."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args, get_type_hints

import typer

import mixturelens as ml
from mixturelens.cli.progress import working
from mixturelens.cli.shared import (
    After,
    Against,
    Base,
    Before,
    Completions,
    Contrast,
    Device,
    DeviceMap,
    Dtype,
    Exhaustive,
    Export,
    GraphSide,
    Json,
    Memory,
    Minutes,
    Out,
    Quiet,
    Run,
    Saes,
    Seed,
    Shown,
    SuiteFile,
    TrainedCue,
    app,
    budget_of,
    device_of,
    seed_of,
)
from mixturelens.cli.tables import (
    print_json,
    show_behaviour,
    show_discovered,
    show_features,
    show_grafts,
    show_mechanism,
    show_patching,
    show_probing,
    show_repairs,
    show_verdicts,
    tell,
)
from mixturelens.types import InputError, RunError, VerdictWord

if TYPE_CHECKING:
    from mixturelens.behaviour.record import BehaviourRecord
    from mixturelens.discovery.judge import Second
    from mixturelens.features.record import FeatureRecord
    from mixturelens.grafting.record import GraftRecord
    from mixturelens.models import How, Pair
    from mixturelens.patching.record import PatchingRecord
    from mixturelens.probing.record import ProbingRecord
    from mixturelens.records import Record
    from mixturelens.routing.circuit import CircuitRecord
    from mixturelens.routing.repair import RepairRecord
    from mixturelens.routing.verdict import VerdictRecord


class Given(NamedTuple):
    """What all commands about pairs take: RUN, or two checkpoints and a suite; and how these are loaded."""

    run: Run = None
    before: Before = None
    after: After = None
    suite: SuiteFile = None
    trained_cue: TrainedCue = None
    base: Base = None
    out: Out = None
    device: Device = None
    device_map: DeviceMap = None
    dtype: Dtype = None
    minutes: Minutes = None
    memory: Memory = None
    completions: Completions = None

    def pairs(self) -> list[Pair]:
        """RUN, or --before [--after] --suite, but not both."""
        pairs = self._named()
        device = device_of(self.device)  # imports torch: whatever is wrong with files has been said before
        for pair in pairs:
            pair.device = device
        return pairs

    def _named(self) -> list[Pair]:
        how: How = {
            "dtype": "float32" if self.dtype is None else self.dtype,
            "budget": budget_of(self.minutes, self.memory),
        }
        if self.run is not None:
            from mixturelens.lab.runs import run_pairs

            if self.before or self.after or self.suite:
                raise InputError("give either RUN or --before/--after/--suite, not both")
            for name in ("out", "base", "device_map", "completions"):
                if getattr(self, name) is not None:
                    flag = f"--{name.replace('_', '-')}"
                    raise InputError(
                        f"{flag}: the checkpoints and results of a RUN lie in its own folder; leave {flag} out"
                    )
            return run_pairs(self.run, **how)
        if self.before is None or self.suite is None:
            raise InputError("give a RUN folder, or --before SRC [--after SRC] --suite FILE")
        from mixturelens.models import Pair

        how = {**how, "base": self.base, "device_map": self.device_map, "completions": self.completions}
        return [Pair(self.before, self.after, self.suite, trained_cue=self.trained_cue, out=self.out, **how)]


class _Closed(RunError):
    """The gate is closed, by records that are printed all the same where a program asks for them."""

    records: list[VerdictRecord]


Options = dict[str, Any]
"""`seed` and `say` for the instruments."""
Work = Callable[..., tuple[list[Any], Callable[[], None]]]
"""Takes Given (or the pairs) and Options, and perhaps options of its own."""


def _on_given(work: Work) -> Work:
    """Make a command of a function of Given and Options: it returns records, and what prints them for people.

    Its parameters behind these two are options of that command alone.
    """

    def command(seed: Seed = 0, as_json: Json = False, quiet: Quiet = False, **options: Any) -> None:
        given = Given(**{name: options.pop(name) for name in Given._fields})
        try:
            with working(quiet) as (_, say):
                records, show = work(given, {"seed": seed_of(seed), "say": say}, **options)
        except _Closed as closed:
            if as_json:
                print_json(closed.records, given.run)
            raise
        if as_json:
            print_json(records, given.run)
        else:
            show()

    hints = get_type_hints(Given, include_extras=True)
    parameters = [
        *(inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[n]) for n in hints),
        *list(inspect.signature(command, eval_str=True).parameters.values())[:-1],
        *list(inspect.signature(work, eval_str=False).parameters.values())[2:],
    ]
    parameters = [
        p.replace(kind=p.KEYWORD_ONLY, annotation=globals().get(str(p.annotation), p.annotation)) for p in parameters
    ]
    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(work.__name__, help=work.__doc__)(command)
    return work


def _on_pairs(work: Work) -> Work:
    """The same of a function of the pairs that are given, and of Options."""

    @functools.wraps(work)
    def on_pairs(given: Given, options: Options, **own: Any) -> tuple[list[Any], Callable[[], None]]:
        return work(given.pairs(), options, **own)

    _on_given(on_pairs)
    return work


def _run_of(pair: Pair) -> Path | None:
    """The run that a pair belongs to, if it was grown here."""
    return pair.out if (pair.out / "spec.json").is_file() else None


@_on_pairs
def behaviour(pairs: list[Pair], options: Options) -> tuple[list[BehaviourRecord], Callable[[], None]]:
    """Weights, forced and expected accuracy under each cue, of a checkpoint or a pair."""

    records = [ml.measure(pair, **options) for pair in pairs]

    def show() -> None:
        for pair, record in zip(pairs, records, strict=True):
            tell(f"{pair.name}: {record.questions} questions, {record.method}")
            show_behaviour(record)

    return records, show


@_on_pairs
def verdict(pairs: list[Pair], options: Options) -> tuple[list[VerdictRecord], Callable[[], None]]:
    """Say whether the router or the specialists changed, with intervals and a reason."""

    records = [ml.verdict(pair, **options) for pair in pairs]
    return records, lambda: show_verdicts(pairs, records)


@_on_pairs
def patch(
    pairs: list[Pair], options: Options, exhaustive: Exhaustive = False
) -> tuple[list[PatchingRecord], Callable[[], None]]:
    """Find the router: patch every site between cues, between hints, and from S into R."""

    records = [ml.patch(pair, exhaustive=exhaustive, **options) for pair in pairs]
    circuits = [ml.circuit(pair, pairs, exhaustive=exhaustive, **options) for pair in pairs]
    return records, lambda: show_patching(pairs, records, circuits)


@_on_given
def circuit(
    given: Given,
    options: Options,
    exhaustive: Exhaustive = False,
    export: Export = None,
    contrast: Contrast = None,
    edges: Shown = 40,
    side: GraphSide = "after",
) -> tuple[list[CircuitRecord], Callable[[], None]]:
    """Show the routing circuit before and after, and write it as a picture or as a graph. RUN: any output folder."""
    from mixturelens.cli.circuit import asked, circuits_given, export_circuits, show_circuits

    wanted = asked(export or (), contrast, edges, side)
    found = circuits_given(given, {"exhaustive": exhaustive, **options})
    written = export_circuits(found, wanted)
    return [each.record for each in found.values()], lambda: show_circuits(found, wanted, written)


@_on_pairs
def probe(
    pairs: list[Pair], options: Options, exhaustive: Exhaustive = False
) -> tuple[list[ProbingRecord], Callable[[], None]]:
    """Say what can be read where in S and in R, what erasing it does, and which subspaces carry it."""

    records = [ml.probe(pair, exhaustive=exhaustive, **options) for pair in pairs]
    return records, lambda: show_probing(pairs, records)


@_on_pairs
def graft(
    pairs: list[Pair], options: Options, exhaustive: Exhaustive = False
) -> tuple[list[GraftRecord], Callable[[], None]]:
    """Say which components of R carry the change, of routing and of specialists, and roll R back without them."""

    records = [ml.graft(pair, exhaustive=exhaustive, **options) for pair in pairs]
    verdicts = [ml.verdict(pair, **options) for pair in pairs]

    def show() -> None:
        show_grafts(pairs, records)
        show_mechanism(pairs, verdicts)

    return records, show


@_on_pairs
def features(
    pairs: list[Pair], options: Options, *, sae: Saes = None
) -> tuple[list[FeatureRecord], Callable[[], None]]:
    """Train SAEs and crosscoders, and say what their features do that heads, neurons and directions do not."""

    run = _run_of(pairs[0])
    if run is not None:
        from mixturelens.lab.runs import more_prompts

        options["more"] = more_prompts(run)
    records = [ml.decompose(pair, saes=sae or (), **options) for pair in pairs]
    return records, lambda: show_features(pairs, records)


@_on_pairs
def repair(pairs: list[Pair], options: Options) -> tuple[list[RepairRecord], Callable[[], None]]:
    """Bring the harmed cue back through the cue reader, and write the repaired checkpoint."""

    records = [ml.repair(pair, **options) for pair in pairs]
    return records, lambda: show_repairs(pairs, records)


Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="WORD", help="A verdict that passes, beside `neither`; may be repeated."),
]
MaxSpecialist = Annotated[
    float | None, typer.Option(metavar="BITS", help="What specialists may have moved, with all of its interval.")
]
JUnit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write the checks as JUnit XML.")]


@_on_pairs
def gate(
    pairs: list[Pair], options: Options, allow: Allow = None, max_specialist: MaxSpecialist = None, junit: JUnit = None
) -> tuple[list[VerdictRecord], Callable[[], None]]:
    """Pass (exit status 0) or fail (1) on the verdict: for continuous integration."""
    from mixturelens.records import write_text
    from mixturelens.routing import gate as gates

    unknown = [word for word in allow or () if word not in get_args(VerdictWord)]
    if unknown:
        raise InputError(f"--allow {unknown[0]}: one of {', '.join(get_args(VerdictWord))}")
    if max_specialist is not None and not max_specialist >= 0:
        raise InputError(f"--max-specialist {max_specialist:g}: bits, 0 or more")
    records = [ml.verdict(pair, **options) for pair in pairs]
    named = zip(pairs, records, strict=True)
    found = {pair.name: gates.gate(record, allow or (), max_specialist) for pair, record in named}
    if junit is not None:
        write_text(junit, gates.junit(found))
    failed = [
        f"{name}: {check.name}: {check.said}" for name, checks in found.items() for check in checks if not check.holds
    ]
    if failed:
        closed = _Closed(f"the gate is closed: {'; '.join(failed)}")
        closed.records = records
        raise closed
    return records, lambda: tell(
        "The gate is open: " + ", ".join(f"{p.name} {r.verdict}" for p, r in zip(pairs, records, strict=True))
    )


Card = Annotated[
    Path | None, typer.Option("--card", metavar="FILE", help="Also a card in Markdown, to go with a checkpoint.")
]


@_on_given
def report(
    given: Given, options: Options, card: Card = None, against: Against = None
) -> tuple[list[Record], Callable[[], None]]:
    """Write one HTML page, readable without a network, with the answer in words on top; or one that compares two."""
    if against is not None:
        return _comparison(given, against, card)
    pairs = given.pairs()
    run = _run_of(pairs[0])
    if run is None:
        page = ml.report(pairs, **options)
    else:
        from mixturelens.lab import runs

        page = runs.report(run, pairs, **options)
    written = [page] if card is None else [page, ml.card(pairs, card, **options)]
    return [ml.verdict(pair, **options) for pair in pairs], lambda: tell("\n".join(map(str, written)))


def _comparison(given: Given, against: Path, card: Path | None) -> tuple[list[Record], Callable[[], None]]:
    """Two output folders: nothing is measured, and no checkpoint is needed."""
    if (
        given.run is None
        or card is not None
        or any(getattr(given, name) for name in Given._fields[1:] if name != "out")
    ):
        raise InputError("report A B compares two output folders by their records: beside them only --out can be given")
    record, page = ml.compare(given.run, against, given.out)
    return [record], lambda: print(page)


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
    embed: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="An encoder that groups completions by their texts, in place of TF-IDF."),
    ] = None,
    base: Base = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = None,
    completions: Completions = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Propose policies, behaviours and cue from prompts alone, as a suite to read, to edit and to ask with."""

    if refine is not None:
        if before is not None or after is not None or prompts is not None:
            raise InputError("--refine reads the completions that are there; leave --before, --after and --prompts out")
        record, folder = ml.refine_discovery(refine, out, seed=seed_of(seed))
        show_discovered(record, folder / "refine.html", refine, as_json)
        return
    if before is None or after is None or prompts is None:
        raise InputError("give --before SRC, --after SRC and --prompts FILE; or --refine SUITE")
    for flag, given, least, most in (
        ("--samples", samples, 2, 10_000),
        ("--max-new-tokens", max_new_tokens, 1, 100_000),
    ):
        if not least <= given <= most:
            raise InputError(f"{flag} {given}: give {least} to {most}")
    second = _judge(labels, judge, judge_model)
    if embed is not None and not (embed / "config.json").is_file():
        raise InputError(f"--embed {embed}: no folder of an encoder with its config.json; give one, or leave it out")
    with working(quiet) as (progress, say):
        from mixturelens.discovery.asked import read_prompts
        from mixturelens.discovery.draws import draw
        from mixturelens.discovery.propose import DiscoverySettings
        from mixturelens.models import Pair

        asked = read_prompts(prompts, chat=chat, max_new_tokens=max_new_tokens, samples=samples)
        how: How = {"base": base, "dtype": "float32" if dtype is None else dtype}
        how["completions"] = completions
        pair = Pair(before, after, asked.suite, out=out, **how)
        if (pair.out / "prompts.jsonl").resolve() == prompts.resolve():
            raise InputError(f"--out {pair.out}: the prompts of the proposed suite would be written over {prompts}")
        pair.device = device_of(device)
        draw(pair, asked, seed_of(seed), say, lambda done, total: progress("completions", done, total, {}))
        record = ml.discover(pair, asked, DiscoverySettings(second, embed), seed=seed, say=say)
    show_discovered(record, pair.out / "discover.html", pair.out / "suite.yaml", as_json)


def _judge(labels: str | None, url: str | None, model: str | None) -> Second | None:
    from mixturelens.discovery.judge import Second, check_here, from_file, served

    if labels is not None:
        if url is not None:
            raise InputError("give --labels or --judge, not both")
        function = from_file(labels)
        return Second(labels, lambda _: function)
    if (url is None) != (model is None):
        raise InputError("--judge URL and --judge-model NAME go together")
    if url is None or model is None:
        return None
    check_here(url)  # before anything is drawn
    return Second(f"{model} at {url}", lambda cache: served(url, model, cache))
