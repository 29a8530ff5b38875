"""How often `discover` finds what the proving ground's pairs are made of: `python -m scripts.score_discovery`.

Each pair of the ground whose policies are announced is asked with its prompts and answers alone; nothing says which cue
they show. A line a pair: how well completions are parted into policies (adjusted Rand index against the true suite's
labels), the place of the true cue among the candidates, and the verdict of the proposed suite beside that of the true
one on the same questions. `--half held-out` (the default) is the half that nothing was tuned on. What is there is kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import mixturelens as ml
from mixturelens.discovery.asked import read_prompts
from mixturelens.discovery.draws import Draws, stored
from mixturelens.discovery.propose import propose
from mixturelens.lab.proving.pairs import GroundCell, grid, make_pair
from mixturelens.lab.runs import run_pairs
from mixturelens.models import Pair
from mixturelens.records import Provenance, Record, with_versions, write_text
from mixturelens.suite import Suite
from scripts.seed_tables import ROOT, put

KEPT = ROOT / "artifacts/reference/discovery.json"
PAGE = ROOT / "docs/discover.md"
NULLS = 20
FOUND = 0.9
"""Adjusted Rand index from which two ways to part are the same."""


class Scored(Record):
    """One pair: what was found of what is true."""

    KIND = "scored-discovery"

    pair: str
    truth: str
    """The verdict by enumeration."""
    found: bool
    policies: int
    rand: float
    """Adjusted Rand index of all completions."""
    cue: int | None
    """Place of the true cue among the candidates, from 1; null: it is not among them."""
    verdict: str | None
    """Of the proposed suite; null where nothing was proposed."""
    true_verdict: str
    """Of the true suite, on the same questions."""


class Scores(Record):
    KIND = "scored-discoveries"
    INDENT = None

    pairs: tuple[Scored, ...]
    pretrained: tuple[Scored, ...] = ()
    """Pairs of pretrained models."""


def cells(half: str) -> list[GroundCell]:
    """One way to ask each pair of policies that announce themselves."""
    kept: dict[tuple[str, str], GroundCell] = {}
    for cell in grid():
        if cell.organism.announced != "none" and cell.half == half:
            kept.setdefault((cell.organism.name, cell.recipe.name), cell)
    return list(kept.values())


def ask(suite: Suite, path: Path) -> Path:
    """The neutral prompts of a suite and their answers, in any order but that of their cues."""
    rows = [suite.neutral[i] for i in np.random.default_rng(0).permutation(len(suite.neutral))]
    system = suite.chat.system if suite.chat else None
    said: list[dict[str, object]] = []
    for row in rows:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": row.text}]
        said.append({"id": row.id, **({"messages": turns} if system else {"prompt": row.text}), "answer": row.answer})
    write_text(path, "".join(json.dumps(line) + "\n" for line in said))
    return path


def score(cell: GroundCell, ground: Path) -> Scored:
    """One pair of the proving ground, whose truth was enumerated."""
    made = make_pair(cell, ground)
    suite = made.load_suite()
    pair = Pair(made.before, made.after, suite, out=ground / "discovered" / cell.key)
    return score_pair(pair, cell.name, made.truth.verdict, (cell.tokens or suite.max_new_tokens, 16))


def score_run(run: Path, base: str | None) -> list[Scored]:
    """Every pair of a run of a pretrained model: its policies are those of the suite that it was trained with."""
    found = []
    for grown in run_pairs(run, base=base):
        pair = Pair(grown.before, grown.after, grown.suite, out=run / "discovered" / grown.name)
        name = f"{run.name}, {grown.name.removeprefix('sft--')}"
        found.append(score_pair(pair, name, "not enumerated", (grown.suite.max_new_tokens, 8)))
    return found


def score_pair(pair: Pair, name: str, truth: str, size: tuple[int, int]) -> Scored:
    """What is found from the prompts of a pair alone, beside what its suite says. Its folder keeps all that is made.

    `size`: tokens of a completion, at most, and completions of each side at a prompt.
    """
    from sklearn.metrics import adjusted_rand_score

    true, out = pair.suite, pair.out
    templated = true.chat is not None and true.chat.system is None  # messages are anyway
    given = ask(true, out / "given.jsonl")
    asked = read_prompts(given, chat=templated, max_new_tokens=size[0], samples=size[1])
    record = ml.discover(Pair(pair.before, pair.after, asked.suite, out=out), asked)
    _, draws = stored(out)
    proposal = propose(asked, draws, 0, record.provenance)
    rows = {row.text: row for row in true.neutral}
    own = [rows[prompt.text] for prompt in asked.prompts]
    labels = [true.label(each.text, own[each.prompt]).policy for each in draws.drawn]
    cues = [row.cue for row in own]
    place = next((k for k, c in enumerate(proposal.cues, 1) if adjusted_rand_score(cues, c.of) >= FOUND), None)
    held = {row.id for row in (proposal.suite.prompts if proposal.suite else asked.rows)}
    again = true.model_copy(update={"prompts": tuple(row for row in true.prompts if row.id in held)})
    again.save(out / "true" / "suite.yaml")
    verdicts = [
        ml.verdict(Pair(pair.before, pair.after, file, out=out / part)).verdict
        for part, file in (("of-true", out / "true" / "suite.yaml"), ("of-found", out / "suite.yaml"))
        if part == "of-true" or record.found
    ]
    return Scored(
        provenance=with_versions(Provenance(before=record.provenance.before, after=record.provenance.after)),
        pair=name,
        truth=truth,
        found=record.found,
        policies=len(record.policies),
        rand=float(adjusted_rand_score(labels, proposal.parted.policy)),
        cue=place,
        verdict=verdicts[1] if record.found else None,
        true_verdict=verdicts[0],
    )


def nulls(out: Path, times: int) -> dict[str, int]:
    """How often something is found in stored completions where nothing is: sides shuffled, and S against S.

    Sides are shuffled at each prompt; S's completions at each prompt are dealt to two sides.
    """
    asked, draws = stored(out)
    prompt = np.array([each.prompt for each in draws.drawn])
    own = np.array([not each.after for each in draws.drawn])
    found = {"shuffled": 0, "S and S": 0}
    for seed in range(times):
        rng = np.random.default_rng(seed)
        for name, kept in (("shuffled", np.ones(len(prompt), dtype=bool)), ("S and S", own)):
            after = np.zeros(len(prompt), dtype=bool)
            for i in np.unique(prompt):
                at = rng.permutation(np.flatnonzero(kept & (prompt == i)))
                after[at[: len(at) // 2]] = True
            some = np.flatnonzero(kept).tolist()
            dealt = Draws(
                tuple(replace(draws.drawn[i], after=bool(after[i])) for i in some),
                tuple(draws.tokens[i] for i in some),
                tuple(draws.along[i] for i in some),
            )
            found[name] += propose(asked, dealt, seed, with_versions(Provenance())).record.found
    return found


def table(pairs: Sequence[Scored]) -> str:
    lines = [
        "| pair | truth | policies | Rand index | true cue | verdict, proposed | verdict, true suite |",
        "| --- |" * 7,
    ]
    lines[1] = lines[1].replace("||", "|")
    for each in pairs:
        cue = "–" if each.cue is None else str(each.cue)
        said = (each.pair, each.truth, str(each.policies), f"{each.rand:.3f}", cue)
        lines.append(f"| {' | '.join((*said, each.verdict or 'nothing found', each.true_verdict))} |")
    return "\n".join(lines)


def summary(pairs: Sequence[Scored]) -> str:
    moved = [each for each in pairs if each.truth != "neither"]
    still = [each for each in pairs if each.truth == "neither"]
    proposed = [each for each in moved if each.found]
    return (
        f"{len(moved)} pairs in which something changed: proposed {len(proposed)}; Rand index "
        f"{np.median([each.rand for each in moved]):.3f} in the median, at least {FOUND} in "
        f"{sum(each.rand >= FOUND for each in moved)}; true cue among the first two in "
        f"{sum(each.cue in (1, 2) for each in moved)}; same verdict as the true suite in "
        f"{sum(each.verdict == each.true_verdict for each in proposed)} of {len(proposed)}. {len(still)} pairs that "
        f"are `neither`: nothing found in {sum(not each.found for each in still)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="How often `discover` finds what the pairs are made of.")
    parser.add_argument("--ground", type=Path, default=Path("artifacts/proving"))
    parser.add_argument("--half", default="held-out", choices=("open", "held-out"))
    parser.add_argument("--only", default="", help="Pairs whose name holds this.")
    parser.add_argument("--keep", action="store_true", help="Keep the scores, and write them into docs/discover.md.")
    parser.add_argument("--null", type=Path, metavar="FOUND", help="Instead: the nulls of what discover left there.")
    parser.add_argument("--run", type=Path, action="append", help="Instead: the pairs of runs of a pretrained model.")
    parser.add_argument("--base", help="The weights that the adapters of these runs are applied on.")
    arguments = parser.parse_args()
    if arguments.null is not None:
        print(", ".join(f"{name}: found in {times} of {NULLS}" for name, times in nulls(arguments.null, NULLS).items()))
        return
    kept = Scores.load(KEPT) if KEPT.is_file() else Scores(pairs=())
    if arguments.run:
        done = [each for run in arguments.run for each in score_run(run, arguments.base)]
        print(table(done))
        kept = kept.model_copy(update={"pretrained": tuple(done)})
    else:
        done = []
        for cell in cells(arguments.half):
            if arguments.only not in cell.name:
                continue
            file = arguments.ground / "discovered" / f"{cell.key}.json"
            if not file.is_file():
                score(cell, arguments.ground).save(file)
            done.append(Scored.load(file))
            print(table(done[-1:]).splitlines()[-1], flush=True)
        print(summary(done))
        kept = kept.model_copy(update={"pairs": tuple(done)})
    if arguments.keep:
        kept.save(KEPT)
        if arguments.run:
            put("pretrained", table(kept.pretrained), "score_discovery", PAGE)
        else:
            put("discovery", f"{summary(kept.pairs)}\n\n{table(kept.pairs)}", "score_discovery", PAGE)


if __name__ == "__main__":
    main()
