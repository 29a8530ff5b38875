"""Records as tables on the terminal: what each command prints for people, or as JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixturelens.types import shown

if TYPE_CHECKING:
    from mixturelens.behaviour.record import BehaviourRecord
    from mixturelens.discovery.record import DiscoveryRecord
    from mixturelens.features.record import FeatureRecord
    from mixturelens.grafting.record import GraftRecord
    from mixturelens.models import Pair
    from mixturelens.patching.record import PatchingRecord
    from mixturelens.probing.record import ProbingRecord
    from mixturelens.records import Record
    from mixturelens.routing.circuit import CircuitRecord
    from mixturelens.routing.repair import RepairRecord
    from mixturelens.routing.verdict import VerdictRecord
    from mixturelens.types import Component


def tell(text: str, end: str = "\n") -> None:
    """Print lines on standard output, in which names and texts of other people move no cursor."""
    print("\n".join(map(shown, text.split("\n"))), end=end)


def print_json(records: list[Any], run: Path | None) -> None:
    """The record, or for a RUN with several pairs a list of them."""
    typed: list[Record] = records
    texts = [json.loads(record.to_json()) for record in typed]
    found = texts if run is not None and len(texts) > 1 else texts[0]
    text = json.dumps(found, indent=1, ensure_ascii=False)
    plain = all(line == shown(line) for line in text.split("\n"))
    print(text if plain else json.dumps(found, indent=1))


def number(value: float | None) -> str:
    """Three decimals, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.3f}"


def ranged(value: Any) -> str:
    if value.value is None or value.low is None:
        return number(value.value)
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table of texts on standard output: as wide as the terminal, or 160 columns where it goes into a file."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(Text(shown(name)))  # not as markup: R[g] is a name
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    # a pipe has no width: do not wrap a table that goes into a file
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


def show_behaviour(record: BehaviourRecord) -> None:
    """Print policy weights, forced and expected accuracy of every cue before and after, and the record's notes."""
    rows = []
    for cue, state in record.per_cue.items():
        for when, side in (("before", state.before), ("after", state.after)):
            if side is None:
                continue
            weights = " ".join(f"{name} {value:.3f}" for name, value in side.weights.items())
            forced = " ".join(f"{name} {number(value)}" for name, value in side.accuracy.items())
            rows.append((cue, when, weights, forced, ranged(side.intervals["overall"])))
    print_table(("cue", "", "weights", "forced accuracy", "expected accuracy"), rows)
    _show_notes(record)


def _show_notes(record: BehaviourRecord | VerdictRecord) -> None:
    for note in record.notes:
        tell(f"note: {note}")
    for hint in (*record.check.misspelled, *record.check.hints) if record.check is not None else ():
        tell(f"note: {hint}")


def show_verdicts(pairs: list[Pair], verdicts: list[VerdictRecord]) -> None:
    """Print every pair's verdict with its numbers in one table; below it each reason in words, and the notes."""
    rows = []
    for pair, record in zip(pairs, verdicts, strict=True):
        accuracy = "  ".join(
            f"{cue} {state.before.overall:.3f} -> {state.after.overall:.3f}"
            for cue, state in record.per_cue.items()
            if state.after is not None
        )
        bits = f"{number(record.bits.routing.value)} / {number(record.bits.specialist.value)}"
        rows.append((pair.name, record.verdict, ranged(record.routing_share), bits, accuracy))
    print_table(("pair", "verdict", "routing share", "bits: routing / specialist", "accuracy before -> after"), rows)
    for pair, record in zip(pairs, verdicts, strict=True):
        tell(f"{pair.name}: {record.reason}")
        _show_notes(record)


def show_patching(pairs: list[Pair], records: list[PatchingRecord], circuits: list[CircuitRecord]) -> None:
    """Print the heads that carry each contrast in every pair, with what they move on held-out questions, and where it
    is carried if not by them; below it what was not measured.
    """
    rows = []
    for pair, record in zip(pairs, records, strict=True):
        for reader in record.readers:
            heads = " + ".join(str(head) for head in reader.heads)
            which = f"{reader.kind} reader, {reader.checkpoint}"
            rows.append((pair.name, which, heads, ranged(reader.effect), ranged(reader.margin)))
    print_table(("pair", "what", "heads", "effect, held out", "margin over the next"), rows)
    for pair, record, circuit in zip(pairs, records, circuits, strict=True):
        for said in _no_readers(record):
            tell(f"{pair.name}: {said}")
        for reason in (*record.missing, *(f"circuit of the {why}" for why in circuit.missing)):
            tell(f"{pair.name}: {unmeasured(reason)}")


_PLACES: dict[str, Component] = {"attention": "attn_out", "MLP": "mlp_out"}
"""What is patched of a layer beside single heads, by its name in words."""


def _no_readers(record: PatchingRecord) -> Iterator[str]:
    """A sentence for each reader that surely carries less than one should, with what carries more than it does."""
    from mixturelens.routing.repair import A_READER

    for reader in record.readers:
        carried, high = reader.effect.value, reader.effect.high
        if carried is None or high is None or high >= A_READER:
            continue
        effects = [
            each
            for sweep in record.sweeps
            if (sweep.kind, sweep.checkpoint, sweep.direction) == (reader.kind, reader.checkpoint, "denoise")
            for each in sweep.effects
            if each.effect.value is not None and each.effect.value > carried
        ]
        more = []
        for name, component in _PLACES.items():
            found = [(each.effect.value, str(each.site)) for each in effects if each.site.component == component]
            if found:
                more.append("{} {:.3f} ({})".format(name, *max(found)))
        # the stream carries everything behind the last layer, and at the cue itself: what tells is where that arrives
        columns = [each.site.position for each in effects if isinstance(each.site.position, int)]
        at = {max(columns, default=None), *(head.position for head in reader.heads)}
        stream = [
            each
            for each in effects
            if each.site.component == "resid_pre" and each.site.position in at and each.effect.known >= A_READER
        ]
        if stream:
            first = min(stream, key=lambda each: each.site.layer)
            more.append(f"and the stream {first.effect.known:.3f} from {first.site} on")
        yield (
            f"{reader.kind} reader, {reader.checkpoint}: hardly a reader: these heads carry {ranged(reader.effect)} of "
            f"the {reader.kind}, and a reader carries {A_READER:g} or more"
            + (f"; the strongest at one place: {', '.join(more)}" if more else "")
        )


def show_probing(pairs: list[Pair], records: list[ProbingRecord]) -> None:
    """Print how well probes read each target in S and in R, what erasing the cue leaves, and the subspaces found."""
    rows = []
    for pair, record in zip(pairs, records, strict=True):
        for readout in record.readouts:
            best = readout.best
            if best is None:
                continue
            numbers = [ranged(column.at(best)) for column in (readout.before, readout.after, readout.carried)]
            null = f"{number(readout.shuffled_high)} / {number(readout.untrained[best])}"
            rows.append((pair.name, readout.target, readout.metric, str(record.sites[best]), *numbers, null))
    header = ("pair", "target", "score", "best site in S", "S", "R", "S's probe on R", "shuffled 95% / untrained")
    print_table(header, rows)
    rows = []
    for pair, record in zip(pairs, records, strict=True):
        for what, erased in (("where the cue is read", record.used), ("readable, unused", record.unused)):
            if erased is not None:
                null = f"{min(erased.random):.3f} to {max(erased.random):.3f}" if erased.random else "-"
                rows.append(
                    (
                        *(pair.name, what, str(erased.site), ranged(erased.readable)),
                        *(ranged(erased.gap), ranged(erased.left), null),
                    )
                )
    header = ("pair", "cue erased", "site", "AUROC", "of the cue left (check)", "difference left", "random directions")
    print_table(header, rows)
    rows = []
    for pair, record in zip(pairs, records, strict=True):
        for each in record.subspaces:
            for side in each.accuracy:
                null = f"{max(each.random[side]):.3f} / {max(each.shuffled[side]):.3f}"
                where = f"{each.site}, {each.dimensions} dim."
                sign = number(each.by_sign[side].value) if side in each.by_sign else "-"
                rows.append((pair.name, each.concept, where, side, ranged(each.accuracy[side]), sign, null))
    header = ("pair", "subspace", "site", "checkpoint", "interchange accuracy", "by sign", "best random / shuffled")
    print_table(header, rows)
    show_missing(pairs, records)


def show_grafts(pairs: list[Pair], records: list[GraftRecord]) -> None:
    """Print what grafting each component or block does, then the 2 x 2 of selector and rest, beside noise.

    A third part names the checkpoints of R rolled back; what could not be measured comes last.
    """
    rows = []
    for pair, record in zip(pairs, records, strict=True):
        for each in record.components if record.search is None else record.search.blocks:
            effects = [ranged(each.suffices.routing), ranged(each.without.routing)]
            own = next((c for c in record.components if c.name == each.name), None)
            others = [ranged(own.routing), ranged(own.shapley)] if own else ["-", "-"]
            rows.append((pair.name, each.name, *effects, *others))
    print_table(("pair", "component", "S + R[g]", "R - R[g]", "path attribution, nats", "Shapley share"), rows)
    rows = []
    for pair, record in zip(pairs, records, strict=True):
        if record.factorial is not None:
            selector = " + ".join(record.factorial.selector)
            for what, effects in (
                (f"selector ({selector})", record.factorial.selector_only),
                ("all the rest", record.factorial.rest_only),
                ("both", record.factorial.both),
            ):
                rows.append((pair.name, what, ranged(effects.weight), ranged(effects.chosen), ranged(effects.done)))
            noise = (number(record.null.chosen), number(record.null.done))
            rows.append((pair.name, "noise of the size of R's change", "", *noise))
    header = ("pair", "R's weights in S", "share of the weight", "choice, bits", "what policies do, bits")
    print_table(header, rows)
    for pair, record in zip(pairs, records, strict=True):
        if record.rollback is not None and record.rollback.checkpoint is not None:
            parts = ", ".join(record.rollback.components)
            tell(f"{pair.name}: R rolled back in {parts}: {pair.made('rollback')}")
    show_missing(pairs, records)


def show_mechanism(pairs: list[Pair], verdicts: list[VerdictRecord]) -> None:
    """Print in words what the mechanism of every pair says, where it was judged, and whether behaviour agrees."""
    for pair, record in zip(pairs, verdicts, strict=True):
        found = record.mechanism
        if found.verdict is None:
            continue
        agrees = "agrees" if found.agrees else f"behaviour says {record.verdict}"
        tell(f"{pair.name}: the mechanism says {found.verdict} ({agrees}): {found.reason}")


def show_features(pairs: list[Pair], records: list[FeatureRecord]) -> None:
    """Print how good the SAEs are, which units carry each concept, what RL changed of features, and the crosscoders."""
    rows: list[tuple[str, ...]] = []
    for pair, record in zip(pairs, records, strict=True):
        for sae in record.saes:
            for side, found in sae.quality.items():
                numbers = (number(found.explained), f"{found.active:.1f}", number(found.dead))
                rows.append(
                    (
                        pair.name,
                        f"{sae.site} {'of S' if sae.pretrained is None else sae.pretrained} on "
                        + ("S" if side == "before" else "R"),
                        *numbers,
                        ranged(found.loss_recovered),
                    )
                )
    print_table(("pair", "SAE", "variance explained", "active", "dead", "loss recovered"), rows)
    for pair, record in zip(pairs, records, strict=True):
        for sae in record.saes:
            for note in sae.notes:
                tell(f"{pair.name}: note: SAE of {sae.site}: {note}")
    rows = []
    for pair, record in zip(pairs, records, strict=True):
        for table in record.tables:
            for score in table.scores:
                most = max(score.random, default=None)
                gap = ranged(score.gap_closed)
                numbers = (number(score.auroc.value), ranged(score.patch), number(most), gap)
                rows.append((pair.name, table.concept, str(score.unit), *numbers))
            for some in table.several:
                most = max(some.random, default=None)
                what = f"{len(some.units)} {some.kind}s together" + ("" if some.enough else " (more are needed)")
                numbers = ("", ranged(some.patch), number(most), ranged(some.gap_closed))
                rows.append((pair.name, table.concept, what, *numbers))
    print_table(("pair", "carries", "best unit", "AUROC", "patched", "random, most", "gap closed, clamped"), rows)
    rows = []
    for pair, record in zip(pairs, records, strict=True):
        for change in record.changes:
            for name, terms in (
                (f"{len(change.features)} features that moved most", change.together),
                ("all features", change.every),
                ("all of R's activations", change.whole),
            ):
                numbers = (ranged(terms.routing), ranged(terms.conditioning), ranged(terms.skill))
                rows.append((pair.name, f"{change.site}: {name}", *numbers))
    print_table(("pair", "R's values in S", "routing, bits", "conditioning, bits", "skill, bits"), rows)
    rows = []
    for pair, record in zip(pairs, records, strict=True):
        for fit in record.crosscoders:
            counts = (fit.shared, fit.exclusive["before"], fit.exclusive["after"], fit.false, fit.causal)
            rows.append((pair.name, f"{fit.site}, seed {fit.seed}", *map(str, counts)))
    print_table(("pair", "crosscoder", "shared", "only S", "only R", "only by norm", "only R, and causal"), rows)
    show_missing(pairs, records)


def show_missing(
    pairs: list[Pair], records: Sequence[ProbingRecord | GraftRecord | FeatureRecord | RepairRecord]
) -> None:
    """Print what each record could not measure, or measured in part, and why: one line a reason."""
    for pair, record in zip(pairs, records, strict=True):
        for reason in record.missing:
            tell(f"{pair.name}: {unmeasured(reason)}")


_IN_PART = re.compile(r"\d+ of \d+ (questions|random)|judged on \d+ questions|were looked at")
"""What a line of `missing` says of something that was measured, if not on everything."""


def unmeasured(reason: str) -> str:
    """A line of a record's `missing` as it is printed: what was measured in part is not said to be missing.

    >>> unmeasured("patching: 48 of 60 questions (--exhaustive takes all)")
    'patching: measured on 48 of 60 questions (--exhaustive takes all)'
    >>> unmeasured("repairs at heads: 4 of 24 random ones to compare with, to save time")
    'repairs at heads: 4 of 24 random ones to compare with, to save time'
    >>> unmeasured("probes for hint: the suite has no hinted prompts")
    'not measured: probes for hint: the suite has no hinted prompts'
    """
    if not _IN_PART.search(reason):
        return f"not measured: {reason}"
    return re.sub(r": (?=\d+ of \d+ questions)", ": measured on ", reason)


def show_repairs(pairs: list[Pair], records: list[RepairRecord]) -> None:
    """Print both cues' accuracies after every repair, the gap it closes and what it costs, and where the repaired
    checkpoint lies.
    """
    from mixturelens.models.source import ADAPTER
    from mixturelens.pages.mechanism import not_meant

    rows = []
    for pair, record in zip(pairs, records, strict=True):
        cues = (record.harmed_cue, record.trained_cue)
        state = [f"{cue} {number(record.after[cue].value)}" for cue in cues]
        rows.append((pair.name, "none", *state, *"----"))
        for each in record.repairs:
            state = [f"{cue} {number(each.accuracy[cue].value)}" for cue in cues]
            fallen = [
                (change, f"{cell.policy}, {cell.cue} {number(cell.accuracy_before)} -> {number(cell.accuracy_after)}")
                for cell in not_meant(record, each)
                if (change := cell.accuracy_change.value) is not None and change < 0
            ]
            _, worst = min(fallen, default=(0.0, "none"))
            gap, null = ranged(each.gap_closed), number(each.random.median)
            rows.append((pair.name, each.kind, *state, ranged(each.trained_change), gap, null, worst))
    header = ("pair", "repair", "harmed cue", "trained cue", "its change", "gap closed", "random, median")
    print_table((*header, "falls most, put in place"), rows)
    for pair, record in zip(pairs, records, strict=True):
        folder = pair.made("repaired")
        kind = "adapter" if (folder / ADAPTER).is_file() else "checkpoint"
        written = f"repaired {kind} (edit): {folder}"
        if record.checkpoint is None:
            written = (
                "no repaired checkpoint: of these repairs only an edit is one of weights, and none closed the gap for "
                "sure; the others act on activations at some tokens"
            )
        tell(f"{pair.name}: cue reader {' + '.join(map(str, record.heads))}; {written}")
    show_missing(pairs, records)


def show_story(pairs: list[Pair], verdicts: list[VerdictRecord], repaired: list[RepairRecord]) -> None:
    """What RL did to the cue that it did not train on, and what brings it back: a line a pair."""
    rows = []
    for pair, verdict, repair in zip(pairs, verdicts, repaired, strict=True):
        cues = (repair.trained_cue, repair.harmed_cue)
        trained, other = (f"{number(repair.before[cue].value)} -> {number(repair.after[cue].value)}" for cue in cues)
        best = repair.best
        back = "-" if best is None else f"{number(best.accuracy[cues[1]].value)} ({best.kind})"
        rows.append((pair.name, verdict.verdict, f"{cues[0]} {trained}", f"{cues[1]} {other}", back))
    print_table(("pair", "verdict", "trained cue", "other cue", "other cue, repaired"), rows)


def show_discovered(record: DiscoveryRecord, page: Path, suite: Path, as_json: bool) -> None:
    """What was found, from questions that it was not chosen on, and where to look at it."""
    if as_json:
        print_json([record], None)
        return
    tell(record.reason)
    if record.found:
        _show_proposal(record)
    tell(f"\n{page}")
    if record.found:
        tell(f"{suite}: read it, edit it, and give it to `mixturelens verdict --suite`; where it has rules,")
        tell(f"with --completions {page.parent}, so that nothing is sampled twice")


def _show_proposal(record: DiscoveryRecord) -> None:
    shown = [
        (each.name, " | ".join(each.wordings) or "(anything else)", each.before, each.after) for each in record.policies
    ]
    shown += [(each.name, each.wording or "(what is none)", each.before, each.after) for each in record.behaviours]
    policies = len(record.policies)
    rows = [
        ("policy" if i < policies else "behaviour", name, text, ranged(before), ranged(after))
        for i, (name, text, before, after) in enumerate(shown)
    ]
    print_table(("", "name", "wordings", "before", "after"), rows)
    for cue in record.cues:
        tell(f"cue: {' | '.join(cue.kinds)}: {ranged(cue.bits)} bits")
    spent = ", ".join(f"{name} {share:.0%}" for name, share in record.where.items())
    if record.judged is not None:
        said = f"{record.judged.completions} completions"
        tell(f"{record.judged.by} agrees with the rules in {ranged(record.judged.agreement)} of {said}")
    tell(f"of {record.nats:.2f} nats between R and S along a completion: {spent}")
