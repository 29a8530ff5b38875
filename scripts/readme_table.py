"""Write the README's table of seeds from records: `python scripts/readme_table.py`.

Records lie in artifacts/reference/seeds/<recipe>-<seed>/<pair>/verdict.json; `--collect RUN ...` copies those of
finished runs there first.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections import defaultdict
from pathlib import Path

from mixturelens import pipeline
from mixturelens.routing.verdict import VerdictRecord
from mixturelens.types import Interval

ROOT = Path(__file__).resolve().parents[1]
SEEDS = ROOT / "artifacts" / "reference" / "seeds"
BEGIN, END = "<!-- seeds: written by scripts/readme_table.py -->", "<!-- /seeds -->"


def collect(run: Path) -> None:
    spec = pipeline.load_run(run)
    for pair in pipeline.run_pairs(run):
        target = SEEDS / f"{spec.name}-{spec.seed}" / pair.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(pair.records / "verdict.json", target)


def row(recipe: str, cue: str, records: list[VerdictRecord]) -> str:
    """Seeds, accuracies (median, worst), verdicts, share and the cell of the policy table that moved most."""
    other = next(name for name in records[0].per_cue if name != cue)

    def after(name: str) -> list[float]:
        return [r.per_cue[name].after.overall for r in records if r.per_cue[name].after is not None]  # type: ignore[union-attr]

    trained, fallen = after(cue), after(other)
    shares = [r.routing_share.value for r in records if r.routing_share.value is not None]
    verdicts = sorted({r.verdict for r in records})
    moved = [len(r.moved_cells) for r in records]
    return (
        f"| {recipe} | {cue} | {len(records)} | {statistics.median(trained):.3f} ({min(trained):.3f}) "
        f"| {statistics.median(fallen):.4f} ({max(fallen):.4f}) | {', '.join(verdicts)} "
        f"| {min(shares):.3f} to {max(shares):.3f} | {sum(moved)} |"
    )


def table() -> str:
    groups: dict[tuple[str, str], list[VerdictRecord]] = defaultdict(list)
    for file in sorted(SEEDS.glob("*/*/verdict.json")):
        recipe = file.parts[-3].rpartition("-")[0]
        groups[recipe, file.parts[-2].removeprefix("sft--rl-")].append(VerdictRecord.load(file))
    lines = [
        "| recipe | RL on | seeds | trained cue: median (worst) | other cue: median (worst) | verdicts | routing share "
        "| cells moved |",
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the README's table of seeds from records.")
    parser.add_argument("--collect", nargs="*", type=Path, default=[], metavar="RUN")
    for run in parser.parse_args().collect:
        collect(run)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    readme.write_text(f"{head}{BEGIN}\n{table()}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
