"""Records of the lab as tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixturelens.cli.tables import number, print_table, ranged, tell, unmeasured

if TYPE_CHECKING:
    from mixturelens.lab.forecast.record import ForecastRecord
    from mixturelens.lab.proving.record import ScoreRecord
    from mixturelens.lab.structure import StructureRecord
    from mixturelens.lab.sweep.run import SweepRecord


def show_forecasts(records: list[ForecastRecord]) -> None:
    """Print what each cue is forecast to do halfway up the trained cue's rise, beside two drifts and two nulls.

    Where RL has been run, a second table holds the errors of the forecasts.
    """
    rows = []
    for record in records:
        half = len(record.on) // 2
        for cue, curves in record.off.items():
            answers = (curves.softmax, curves.replicator, curves.constant, curves.renormalised)
            numbers = (ranged(curves.forecast[half]), *(number(answer[half]) for answer in answers))
            rows.append((f"RL on {record.trained_cue}", number(record.on[half]), cue, *numbers))
    header = ("", "trained cue at", "cue", "forecast", "softmax", "replicator", "as in S", "renormalised")
    print_table(header, rows)
    rows = [
        (f"RL on {record.trained_cue}", cue, *map(number, (*score.errors.values(), score.covered)))
        for record in records
        if record.happened is not None
        for cue, score in record.happened.scores.items()
    ]
    if rows:
        header = ("mean error", "cue", "forecast", "softmax", "replicator", "as in S", "renormalised", "covered")
        print_table(header, rows)
    for record in records:
        for reason in record.missing:
            tell(f"RL on {record.trained_cue}: {reason}")
        if record.happened is None:
            tell(f"RL on {record.trained_cue} is not done yet: nothing to compare")
        elif record.happened.clock.covered is None:
            tell(f"RL on {record.trained_cue}: no measured step lies away from both ends, so none is compared")
        else:
            clock = record.happened.clock
            tell(
                f"RL on {record.trained_cue}, its own accuracy step by step: mean error "
                f"{number(clock.errors['forecast'])}, covered {number(clock.covered)}; "
                f"forced accuracy moved by {number(record.happened.specialists)}"
            )


def show_structure(record: StructureRecord) -> None:
    """The structure of a schedule: what two regimes' behaviour is made of, and the router between them."""
    names = ("generality", "conditionality", "oscillation", "fixed")
    rows = []
    for each in record.pairs:
        shares = [ranged(getattr(each.shares, name)) for name in names]
        rows.append((f"{each.first}, {each.second}", each.structure, *shares))
    print_table(("regimes", "structure", *names), rows)
    tell(f"structure: {record.structure} " + " | ".join(", ".join(group) for group in record.groups))
    tell(f"retention: {', '.join(f'{cue} {ranged(value)}' for cue, value in record.retention.items())}")
    tell(f"fragility: {ranged(record.fragility)}")
    for each in record.culled:
        gone = ", ".join(f"{ranged(value)} under {cue}" for cue, value in each.under.items())
        tell(f"culled by {each.phase} of what {each.trait} pays: {gone}")
    for each in record.pairs:
        if each.mechanism is not None:
            found = each.mechanism
            tell(
                f"{each.first}, {each.second}: decoded {ranged(found.decoded)} (shuffled {number(found.shuffled)}), "
                f"router {' + '.join(map(str, found.heads)) or '-'} carries {ranged(found.carried)} "
                f"(best others {ranged(found.rival)}), overlap {ranged(found.overlap)}"
            )
    for reason in record.missing:
        tell(unmeasured(reason))


WORDS = ("routing", "specialist", "both", "neither", "inconclusive")


def show_score(record: ScoreRecord) -> None:
    """Confusion matrices, and how each method finds planted addresses."""
    tell(f"{record.done} of {record.cells} pairs are scored")
    for sums in record.verdicts:
        tell(f"\n{sums.instrument} verdict, {sums.half} half: right on {ranged(sums.right)} of {sums.pairs} pairs;")
        tell(f"{sums.false_alarms} of {sums.nothing} called changed where nothing had; ", end="")
        tell(f"{sums.near_ok} of {sums.near} near misses right or inconclusive")
        rows = [
            (truth, *(str(said.get(word, 0) or "") for word in WORDS))
            for truth, said in ((word, sums.confusion[word]) for word in WORDS if word in sums.confusion)
        ]
        print_table(("truth", *WORDS), rows)
    if record.methods:
        print_table(
            ("method", "looks for", "AUROC", "best is planted", "IoU", "decoys rejected", "seconds"),
            [
                (m.method, m.contrast, *(ranged(x) for x in (m.auroc, m.top, m.iou, m.decoys)), f"{m.seconds:.2f}")
                for m in record.methods
            ],
        )
    held = [each.held for each in record.coverage if not each.boundary]
    if held:
        tell(f"95% intervals hold the truth in {min(held):.3f} to {max(held):.3f} of suites ({len(held)} cases)")
    for each in record.broken:
        caught = "caught" if each.caught else "NOT CAUGHT"
        tell(f"broken on purpose, {each.name}: {caught} ({each.sound:.2f} -> {each.broken:.2f})")
    for reason in record.failed:
        tell(f"not scored: {reason}")
    for each in record.mistakes:
        tell(f"wrong: {each.instrument} verdict on {each.pair}: {each.verdict}, truth {each.truth}. {each.reason}")


def show_sweep(record: SweepRecord) -> None:
    """A line for each checkpoint after training: verdict, routing share, accuracy under each cue."""
    rows = []
    for row in record.rows:
        accuracy = "  ".join(
            f"{name.split('.', 1)[1].removesuffix('.after')} {value:.3f}"
            for name, value in row.items()
            if name.startswith("accuracy.") and name.endswith(".after") and isinstance(value, float)
        )
        share = row.get("routing_share")
        known = number(share) if isinstance(share, float) else "-"
        rows.append((str(row["cell"]), str(row["after"]), str(row.get("verdict", "-")), known, accuracy))
    print_table(("cell", "after", "verdict", "routing share", "accuracy after"), rows)
