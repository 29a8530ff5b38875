"""Write what features say over seeds from records: `python scripts/features_table.py`.

What it is made of lies in artifacts/reference/seeds/<recipe>-<seed>/<pair>/features.json, the numbers of one pair
without units, cards and examples; `--collect RUN ...` takes those of finished runs first, with those of the control
pairs that scripts/control_pairs.py made. It writes a summary into docs/findings.md and every pair, with intervals, into
artifacts/reference/features.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixturelens.features.record import FeatureRecord, Several, Terms, UnitScore
from mixturelens.lab import runs
from mixturelens.types import InputError, Interval
from scripts.seed_tables import ROOT, SEEDS, bounds, put

PAGE = ROOT / "artifacts" / "reference" / "features.md"
RECIPES = ("default", "full", "adam")
KINDS = {
    "feature": "SAE feature",
    "neuron": "neuron",
    "head": "head",
    "direction": "probe direction",
    "subspace": "DAS",
}
CONTROLS = {
    "sft--taught": "specialist taught",
    "sft--sft-order": "null: S in another data order",
    "sft--sft-continued": "null: SFT continued",
}
NAME = "features_table"

Found = dict[str, Any]


def collect(run: Path) -> None:
    spec = runs.load_run(run)
    for file in sorted((run / "records").glob("*/features.json")):
        target = SEEDS / f"{spec.name}-{spec.seed}" / file.parent.name / "features.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        numbers = summary(FeatureRecord.load(file))
        target.write_text(json.dumps(numbers, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")


def summary(record: FeatureRecord) -> Found:
    return {
        "after": record.provenance.after,
        "unit": "bits",
        "saes": {
            str(sae.site): {
                "trained": sae.trained,
                "width": sae.width,
                **{
                    side: {"explained": q.explained, "dead": q.dead, "recovered": q.loss_recovered.value}
                    for side, q in sae.quality.items()
                },
            }
            for sae in record.saes
        },
        "tables": {
            table.concept: {
                "site": str(table.site),
                "best": {score.unit.kind: scored(score) for score in table.scores},
                "several": {some.kind: set_of(some) for some in table.several},
            }
            for table in record.tables
        },
        "changes": [
            {
                "site": str(change.site),
                "features": len(change.features),
                "together": bits(change.together),
                "every": bits(change.every),
                "whole": bits(change.whole),
                "random": {
                    "routing": most(each.routing.value for each in change.random),
                    "specialists": most(each.specialist.value for each in change.random),
                },
            }
            for change in record.changes
        ],
        "crosscoders": [
            {
                "site": str(fit.site),
                "seed": fit.seed,
                "explained": {side: round(value, 4) for side, value in fit.explained.items()},
                "dead": round(fit.dead, 4),
                "shared": fit.shared,
                "before": fit.exclusive["before"],
                "after": fit.exclusive["after"],
                "false": fit.false,
                "causal": fit.causal,
            }
            for fit in record.crosscoders
        ],
        "missing": list(record.missing),
    }


PARTS = ("routing", "conditioning", "skill")


def bits(terms: Terms) -> dict[str, dict[str, float | None]]:
    return {part: short(getattr(terms, part)) for part in (*PARTS, "specialist")}


def short(value: Interval) -> dict[str, float | None]:
    return {end: None if x is None else round(x, 4) for end, x in value.model_dump().items()}


def most(values: Iterable[float | None]) -> float | None:
    return max((round(value, 4) for value in values if value is not None), default=None)


def scored(score: UnitScore) -> Found:
    return {
        "unit": str(score.unit),
        "among": score.among,
        "auroc": short(score.auroc),
        "patch": short(score.patch),
        "random": most(score.random),
        "gap": short(score.gap_closed),
        "trained": short(score.trained_change),
        "random_gap": most(score.random_gap),
    }


def set_of(some: Several) -> Found:
    return {
        "number": len(some.units),
        "among": some.among,
        "enough": some.enough,
        "patch": short(some.patch),
        "random": most(some.random),
        "gap": short(some.gap_closed),
    }


# --- writing ----------------------------------------------------------------------------------------------------------


def stored(pair: str) -> Iterator[tuple[str, str, Found]]:
    """(recipe, run and pair, numbers) of every stored pair whose name fits."""
    for recipe in RECIPES:
        for file in sorted(SEEDS.glob(f"{recipe}-*/{pair}/features.json")):
            name = f"{file.parts[-3]}, {file.parts[-2].removeprefix('sft--')}"
            yield recipe, name, json.loads(file.read_text(encoding="utf-8"))


def unit() -> str:
    """Of what features change: bits; nats in runs that were collected before. A table has one."""
    found = {found.get("unit", "nats") for _, _, found in stored("*")}
    if len(found) > 1:
        raise InputError("some runs were collected in nats and some in bits: collect all of them again")
    return found.pop()


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """Median, and the range over pairs."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle, low, high = (
        f"{round(value, digits) + 0.0:.{digits}f}" for value in (statistics.median(known), min(known), max(known))
    )
    return middle + (f" ({low} to {high})" if low != high else "")


def units_table() -> list[str]:
    """One line a recipe, concept and kind: the best single unit, and how many of its kind it takes."""
    lines = [
        "| recipe | what | best single | pairs | AUROC | share moved, patched | best random | gap closed, clamped "
        "| units that carry 0.9 together | gap closed by these |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in RECIPES:
        for concept in ("cue", "selector"):
            tables = [
                found["tables"][concept]
                for r, _, found in stored("sft--rl-*")
                if r == recipe and concept in found["tables"]
            ]
            for kind, word in KINDS.items():
                best = [table["best"][kind] for table in tables if kind in table["best"]]
                some = [table["several"][kind] for table in tables if kind in table["several"]]
                if not best:
                    continue
                numbers = sorted(each["number"] for each in some if each["enough"])
                failed = len(some) - len(numbers)
                needed = ", ".join(map(str, numbers)) + (f"{'; ' if numbers else ''}{failed} x none" if failed else "")
                lines.append(
                    f"| {recipe} | {concept} | {word} | {len(best)} | {spread([b['auroc']['value'] for b in best])} "
                    f"| {spread([b['patch']['value'] for b in best])} | {spread([b['random'] for b in best])} "
                    f"| {spread([b['gap']['value'] for b in best])} | {needed or '-'} "
                    f"| {spread([s['gap']['value'] for s in some])} |"
                )
    return lines


def change_table() -> list[str]:
    """One line a kind of pair: what the features that moved most bring into S, by term."""
    lines = [
        f"| pairs | number | moved most: routing, {unit()} | conditioning + skill | nulls, most: routing "
        "| conditioning + skill | all features: routing | conditioning + skill | R's activations: routing "
        "| conditioning + skill |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, pairs in groups():
        found = [max(p["changes"], key=total) for p in pairs if p["changes"]]
        if not found:
            continue
        cells = [spread([each["together"]["routing"]["value"] for each in found])]
        cells.append(spread([specialists(each["together"]) for each in found]))
        cells += [spread([each["random"][part] for each in found]) for part in ("routing", "specialists")]
        for what in ("every", "whole"):
            cells.append(spread([each[what]["routing"]["value"] for each in found]))
            cells.append(spread([specialists(each[what]) for each in found]))
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return lines


def crosscoder_table() -> list[str]:
    lines = [
        "| pairs | crosscoders | variance explained, least | shared latents | only S | only R | only by norm "
        "| only R, and causal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, pairs in groups():
        fits = [fit for p in pairs for fit in p["crosscoders"]]
        if not fits:
            continue
        least = min(value for fit in fits for value in fit["explained"].values())
        counts = [spread([fit[key] for fit in fits], 0) for key in ("shared", "before", "after", "false", "causal")]
        lines.append(f"| {name} | {len(fits)} | {least:.3f} | {' | '.join(counts)} |")
    return lines


def groups() -> Iterator[tuple[str, list[Found]]]:
    for recipe in RECIPES:
        yield f"{recipe}: RL", [found for r, _, found in stored("sft--rl-*") if r == recipe]
    for pair, name in CONTROLS.items():
        yield name, [found for _, _, found in stored(pair)]


def total(change: Found) -> float:
    return sum(change["whole"][part]["value"] or 0.0 for part in PARTS)


def specialists(terms: Found) -> float | None:
    if "specialist" in terms:
        return terms["specialist"]["value"]
    known = [terms[part]["value"] for part in ("conditioning", "skill") if terms[part]["value"] is not None]
    return sum(known) if known else None


def page() -> str:
    """Every pair with its intervals."""
    lines = [
        "# Features over seeds, pair by pair",
        "",
        "Written by `scripts/features_table.py` from the records in `seeds/`. Share: of the contrast, moved by the "
        "best unit of a kind, chosen on one half of the questions and judged on the other, with 95% intervals "
        "over questions. Random: the best of 24 controls: other units of like strength, and the unit's own change "
        "written along random directions of equal norm (heads: all others). Gap: closed under the harmed cue "
        "by clamping it in R, with the change under the trained cue. Together: the fewest units that carry 0.9.",
        "",
        "| pair | what | site | unit | AUROC | share | random | gap closed | trained cue | together | share "
        "| gap closed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for _, name, found in stored("*"):
        for concept, table in found["tables"].items():
            for kind, best in table["best"].items():
                some = table["several"].get(kind)
                together = ["-"] * 3
                if some:
                    number = f"{some['number']} of {some['among']}" + ("" if some["enough"] else ", not enough")
                    together = [number, bounds(some["patch"]), bounds(some["gap"])]
                random = "-" if best["random"] is None else f"{best['random']:.3f}"
                lines.append(
                    f"| {name} | {concept} | {table['site']} | {KINDS[kind]}: {best['unit']} | {bounds(best['auroc'])} "
                    f"| {bounds(best['patch'])} | {random} | {bounds(best['gap'])} | {bounds(best['trained'])} "
                    f"| {' | '.join(together)} |"
                )
    lines += [
        "",
        "## SAEs",
        "",
        "| pair | site | features trained, kept | variance explained in S, in R | dead in S "
        "| loss recovered in S, in R |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for _, name, found in stored("sft--rl-*"):
        for site, sae in found["saes"].items():
            s, r = sae["before"], sae["after"]
            recovered = ", ".join("-" if x is None else f"{x:.3f}" for x in (s["recovered"], r["recovered"]))
            lines.append(
                f"| {name} | {site} | {sae['trained']}, {sae['width']} | {s['explained']:.3f}, {r['explained']:.3f} "
                f"| {s['dead']:.3f} | {recovered} |"
            )
    lines += [
        "",
        "## What RL changed: R's values in S",
        "",
        f"| pair | site | features | routing, {unit()} | conditioning | skill | nulls, most: routing "
        "| conditioning + skill | all of R's: routing | conditioning | skill |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for _, name, found in stored("*"):
        for change in found["changes"]:
            own, whole = ([bounds(change[what][part]) for part in PARTS] for what in ("together", "whole"))
            random = [change["random"][part] for part in ("routing", "specialists")]
            lines.append(
                f"| {name} | {change['site']} | {change['features']} | {' | '.join(own)} "
                f"| {' | '.join('-' if x is None else f'{x:.3f}' for x in random)} | {' | '.join(whole)} |"
            )
    lines += ["", "## Not measured", ""]
    lines += [f"- {name}: {reason}" for _, name, found in stored("*") for reason in found["missing"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what features say over seeds from records.")
    parser.add_argument("--collect", nargs="*", type=Path, default=[], metavar="RUN")
    for run in parser.parse_args().collect:
        collect(run)
    put(
        "features", "\n\n".join("\n".join(table) for table in (units_table(), change_table(), crosscoder_table())), NAME
    )
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
