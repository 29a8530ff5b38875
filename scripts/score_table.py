"""Write the tables of docs/validation.md from a score of the proving ground.

    python scripts/score_table.py [--collect artifacts/proving]

`--collect GROUND` first keeps the record of that ground as artifacts/reference/score.json; `make score` makes one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mixturelens.lab.pages.score import score_markdown
from mixturelens.lab.proving.record import ScoreRecord
from scripts.seed_tables import ROOT, put

KEPT = ROOT / "artifacts/reference/score.json"
PAGE = ROOT / "docs/validation.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the tables of docs/validation.md from a score of the proving ground."
    )
    parser.add_argument("--collect", type=Path, metavar="GROUND")
    ground = parser.parse_args().collect
    if ground is not None:
        ScoreRecord.load(ground / "score.json").save(KEPT)
    put("score", score_markdown(ScoreRecord.load(KEPT)), "score_table", PAGE)


if __name__ == "__main__":
    main()
