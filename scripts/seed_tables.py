"""Write the tables over seeds of docs/findings.md from records: `python scripts/seed_tables.py`.

What they are made of lies in artifacts/reference/seeds/<recipe>-<seed>/<pair>/: `verdict.json`; `router.json`, the
numbers of patching, circuit and repair that the second table shows; and `weights.json`, those of grafts, for the third.
`--collect RUN ...` takes those of finished runs first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections import defaultdict
from pathlib import Path

from mixturelens.grafting.record import GraftRecord
from mixturelens.lab import runs
from mixturelens.patching.record import PatchingRecord
from mixturelens.routing.circuit import CircuitRecord
from mixturelens.routing.repair import RepairRecord
from mixturelens.routing.verdict import VerdictRecord
from mixturelens.types import Interval

ROOT = Path(__file__).resolve().parents[1]
SEEDS = ROOT / "artifacts" / "reference" / "seeds"
FINDINGS = ROOT / "docs" / "findings.md"


def collect(run: Path) -> None:
    spec = runs.load_run(run)
    for pair in runs.run_pairs(run):
        target = SEEDS / f"{spec.name}-{spec.seed}" / pair.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(pair.records / "verdict.json", target)
        if (pair.records / "repair.json").is_file():
            (target / "router.json").write_text(json.dumps(router(pair.records), indent=1) + "\n", encoding="utf-8")
        if (pair.records / "graft.json").is_file():
            (target / "weights.json").write_text(json.dumps(weights(pair.records), indent=1) + "\n", encoding="utf-8")


def router(records: Path) -> dict[str, object]:
    """The numbers of one pair's cue reader, circuit and repairs."""
    repair = RepairRecord.load(records / "repair.json")
    reader = next(
        r for r in PatchingRecord.load(records / "patching.json").readers if (r.kind, r.checkpoint) == ("cue", "after")
    )
    circuits = CircuitRecord.load(records / "circuit.json")
    harmed, trained = repair.harmed_cue, repair.trained_cue
    curve = next(c for c in circuits.circuits if (c.kind, c.checkpoint) == ("cue", "after")).faithfulness
    return {
        "heads": [str(head.model_copy(update={"position": None})) for head in reader.heads],
        "effect": reader.effect.model_dump(),
        "margin": reader.margin.model_dump(),
        "after": {"harmed": repair.after[harmed].value, "trained": repair.after[trained].value},
        "repairs": {
            each.kind: {
                "harmed": each.accuracy[harmed].model_dump(),
                "trained_change": each.trained_change.model_dump(),
                "random_median": each.random.median,
                "random_most": max(each.random.harmed),
                "other_cells": round(
                    max(
                        abs(cell.accuracy_change.value or 0.0)
                        for cell in each.cells
                        if (cell.policy, cell.cue) != (repair.policy, harmed)
                    ),
                    6,
                ),
            }
            for each in repair.repairs
        },
        "circuit": {name: getattr(curve, name).model_dump() for name in ("cpr", "cmd", "random_cpr", "random_cmd")},
        "overlap": [o.model_dump() for o in circuits.overlaps if o.kind == "cue" and o.size == 20],
    }


def weights(records: Path) -> dict[str, object]:
    """The numbers of one pair's grafts."""
    graft = GraftRecord.load(records / "graft.json")
    change = sum(graft.change[f"routing@{cue}"].value or 0.0 for cue in graft.cues) / len(graft.cues)
    verdict = VerdictRecord.load(records / "verdict.json")
    found: dict[str, object] = {
        "after": graft.provenance.after,
        "verdict": verdict.verdict,
        "mechanism": verdict.mechanism.verdict,
        "change": change,
        "attribution": {part.name: part.routing.value for part in graft.components},
        "error": max(abs(line.sum - line.change) / max(abs(line.change), 0.05) for line in graft.path),
        "suffices": {part.name: part.suffices.weight.model_dump() for part in graft.components},
        "without": {part.name: part.without.weight.model_dump() for part in graft.components},
    }
    if graft.factorial is not None:
        both = graft.factorial
        found["selector"] = list(both.selector)
        found["also"] = len(both.also)
        found["alone"] = both.selector_only.weight.model_dump()
        found["rest"] = both.rest_only.weight.model_dump()
        found["noise"] = max(abs(each.weight.value or 0.0) for each in both.noise)
    if graft.rollback is not None:
        found["needed"] = list(graft.rollback.components)
        found["also_needed"] = len(graft.rollback.also)
        found["accuracy"] = {
            cue: {side: value.value for side, value in sides.items()} for cue, sides in graft.rollback.accuracy.items()
        }
    return found


def weights_table() -> str:
    """One line a pair: which weights suffice for the new choice, which are needed, and what both verdicts say."""
    lines = [
        "| run | fewest parts of R that suffice in S | share of the choice | all other parts | random weights, most "
        "| fewest parts needed in R | rolled back: accuracy by cue (S) | largest path attributions, of all nats "
        "| mechanism (behaviour) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = ("default", "phrase", "full", "adam")
    for file in sorted(SEEDS.glob("*/*/weights.json"), key=lambda file: (order.index(file.parts[-3][:-2]), file)):
        found = json.loads(file.read_text(encoding="utf-8"))
        parts = sorted(found["attribution"].items(), key=lambda item: -abs(item[1]))[:2]
        shown = ", ".join(f"{name} {value:.1f}" for name, value in parts)
        cells = ["-"] * 6
        if "selector" in found:
            cells[:4] = [
                sets(found["selector"], found["also"]),
                bounds(found["alone"]),
                bounds(found["rest"]),
                f"{found['noise']:.3f}",
            ]
        if "needed" in found:
            accuracy = [f"{cue} {of['rollback']:.2f} ({of['before']:.2f})" for cue, of in found["accuracy"].items()]
            cells[4:] = [sets(found["needed"], found["also_needed"]), ", ".join(accuracy)]
        lines.append(
            f"| {file.parts[-3]}, {file.parts[-2].removeprefix('sft--')} | {' | '.join(cells)} "
            f"| {shown}, of {found['change']:.1f} | {found['mechanism']} ({found['verdict']}) |"
        )
    return "\n".join(lines)


def sets(parts: list[str], also: int) -> str:
    return " + ".join(parts) + (f" ({also} other set{'s' if also > 1 else ''})" if also else "")


def router_table() -> str:
    """One line a pair: the cue reader, what patching and repairing it does, and how faithful its circuit is."""
    lines = [
        "| run | cue reader | effect on held-out questions | margin over the next | harmed cue: R | interchange | zero "
        "| mean | steer | edit | random heads | CPR (random) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for file in sorted(SEEDS.glob("*/*/router.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        repairs = found["repairs"]
        cells = [f"{repairs[kind]['harmed']['value']:.3f}" for kind in ("interchange", "zero", "mean", "steer", "edit")]
        lines.append(
            f"| {file.parts[-3]}, {file.parts[-2].removeprefix('sft--')} | {' + '.join(found['heads'])} "
            f"| {bounds(found['effect'])} | {bounds(found['margin'])} | {found['after']['harmed']:.4f} "
            f"| {' | '.join(cells)} | {repairs['interchange']['random_median']:.4f} (most "
            f"{repairs['interchange']['random_most']:.3f}) | {found['circuit']['cpr']['value']:.2f} "
            f"({found['circuit']['random_cpr']['value']:.2f}) |"
        )
    return "\n".join(lines)


def bounds(value: dict[str, float | None]) -> str:
    if value["value"] is None:
        return "-"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def row(recipe: str, cue: str, records: list[VerdictRecord]) -> str:
    """Seeds, accuracies (median, worst), verdicts, routing's share of bits, and how many cells of the table moved."""
    other = next(name for name in records[0].per_cue if name != cue)

    def after(name: str) -> list[float]:
        return [r.per_cue[name].after.overall for r in records if r.per_cue[name].after is not None]  # type: ignore[union-attr]

    trained, fallen = after(cue), after(other)
    verdicts = sorted({r.verdict for r in records})
    moved = [len(r.moved_cells) for r in records]
    shares = [r.routing_share.known for r in records]
    return (
        f"| {recipe} | {cue} | {len(records)} | {statistics.median(trained):.3f} ({min(trained):.3f}) "
        f"| {statistics.median(fallen):.4f} ({max(fallen):.4f}) | {', '.join(verdicts)} "
        f"| {statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f}) | {sum(moved)} |"
    )


def table() -> str:
    groups: dict[tuple[str, str], list[VerdictRecord]] = defaultdict(list)
    for file in sorted(SEEDS.glob("*/*/verdict.json")):
        recipe = file.parts[-3].rpartition("-")[0]
        groups[recipe, file.parts[-2].removeprefix("sft--rl-")].append(VerdictRecord.load(file))
    lines = [
        "| recipe | RL on | seeds | trained cue: median (worst) | other cue: median (worst) | verdicts "
        "| share: median (range) | cells moved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = ("default", "full", "phrase", "adam")
    keys = sorted(groups, key=lambda k: (order.index(k[0]) if k[0] in order else len(order), k))
    lines += [row(recipe, cue, groups[recipe, cue]) for recipe, cue in keys]
    return "\n".join([*lines, "", *moved_cells()])


def moved_cells() -> list[str]:
    """The cells of the policy table that moved, or may have, where the verdict is not about specialists anyway."""
    lines = []
    for file in sorted(SEEDS.glob("*/*/verdict.json")):
        record = VerdictRecord.load(file)
        for cell in record.moved_cells:
            if record.verdict in ("specialist", "both"):
                continue
            intact = "cannot say" if record.dormant_intact is None else record.dormant_intact
            where = f"{file.parts[-3]}, {file.parts[-2]}"
            lines.append(
                f"- {where}: policy {cell.policy} as `{cell.announcement}` under {cell.cue}: "
                f"P({cell.behaviour}) moved by {signed(cell.behaviour_change)}, accuracy by "
                f"{signed(cell.accuracy_change)}; verdict `{record.verdict}`, silent specialists intact: {intact}"
            )
    return ["Cells that moved, or may have moved, by more than 0.02 where routing was selected:", "", *lines]


def signed(value: Interval) -> str:
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def put(name: str, made: str, script: str, page: Path = FINDINGS) -> None:
    """Write a block of a page that a script makes, in the place of what it made before."""
    head, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name}: written by scripts/{script}.py -->")
    _, end, tail = rest.partition(f"<!-- /{name} -->")
    if not end:
        raise ValueError(f"{page}: no block {name!r} of scripts/{script}.py")
    page.write_text(f"{head}{begin}\n{made}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables over seeds of docs/findings.md from records.")
    parser.add_argument("--collect", nargs="*", type=Path, default=[], metavar="RUN")
    for run in parser.parse_args().collect:
        collect(run)
    for name, made in (("seeds", table()), ("router", router_table()), ("weights", weights_table())):
        put(name, made, "seed_tables")


if __name__ == "__main__":
    main()
