"""`mixturelens suite`: start a suite, and find what is wrong with one before anything long is run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixturelens.cli.progress import working
from mixturelens.cli.shared import After, Base, Before, Device, Dtype, Quiet, Seed, app, device_of, seed_of
from mixturelens.cli.tables import print_table, tell
from mixturelens.types import RunError, shown

if TYPE_CHECKING:
    from mixturelens.models import How
    from mixturelens.suite import Suite

commands = typer.Typer(name="suite", help="Start, check or export a behaviour suite.", no_args_is_help=True)
app.add_typer(commands)

SHOWN = 2
"""Questions, and completions of each side at each, that a check shows."""
UNKNOWN = 0.1
"""Share of completions of no known policy from which a verdict is `inconclusive`."""
WIDE = 70
"""Characters of a completion that are shown."""

STARTED = """\
# A behaviour suite: what is asked, and how a completion shows which policy it follows.
# `mixturelens suite check {name}` says what is wrong; docs/suites.md explains every key.

prompts: prompts.jsonl        # a line: {{"id": "q1", "cue": "plain", "prompt": "...", "answer": "..."}}, or "messages"

policies:                     # what a completion begins with, or a rule that finds it; the first that matches wins
  comply:
    regex: "(?i)^(sure|of course)"
    force: "Sure"             # a text that puts the policy in place
  decline:
    regex: "(?i)^i('m| am) sorry"
    force: "I'm sorry"

behaviours:                   # what is done behind it, where it is not the answer
  refuse: {{regex: "(?i)can't|cannot|won't|sorry"}}

trained_cue: plain            # the cue that training was on; leave it out where nobody knows
answer_match: contains        # exact, contains (as words of their own) or regex
max_new_tokens: 64
samples: 16                   # completions a prompt, where policies are rules
# chat: {{}}                    # prompts go through the tokenizer's chat template
"""
ASKED = """\
{"id": "q1", "cue": "plain", "prompt": "How many legs has a spider?", "answer": "8"}
{"id": "q1", "cue": "odd", "prompt": "## Task\\nHow many legs has a spider?", "answer": "8"}
{"id": "q2", "cue": "plain", "prompt": "What is the opposite of hot?", "answer": "cold"}
{"id": "q2", "cue": "odd", "prompt": "## Task\\nWhat is the opposite of hot?", "answer": "cold"}
"""


@commands.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where suite.yaml and prompts.jsonl go.")] = Path(),
) -> None:
    """Write a commented suite of two example questions under two cues, to be edited."""
    from mixturelens.records import write_new

    files = {folder / "suite.yaml": STARTED.format(name=folder / "suite.yaml"), folder / "prompts.jsonl": ASKED}
    write_new(files)
    tell(f"{folder / 'suite.yaml'} and its prompts.jsonl: edit them, then `mixturelens suite check {folder}`")


@commands.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A suite's YAML file, or its folder.")],
    before: Before = None,
    after: After = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Say all that is wrong, line by line; with checkpoints, show what they write and how the suite labels it."""
    from mixturelens.suite_check import check_suite_file, pitfalls, uneven

    suite, problems = check_suite_file(file)
    for problem in problems:
        print(shown(f"mixturelens: {problem}"), file=sys.stderr)
    if suite is None:
        raise SystemExit(2)
    questions = len({row.id for row in suite.neutral})
    tell(f"{file}: {questions} questions under {len(suite.cues)} cues ({', '.join(suite.cues)}); nothing is wrong.")
    for said in (*pitfalls(suite), *uneven(file)):
        tell(f"note: {said}")
    if before is None:
        return
    how: How = {"base": base, "device": device_of(device), "dtype": "float32" if dtype is None else dtype}
    with working(quiet) as (_, say):
        say("what the checkpoints write")
        notes, rows, other = _written(suite, before, after, how, seed_of(seed))
    for said in notes:
        tell(f"note: {said}")
    print_table(("checkpoint", "cue", "question", "policy", "behaviour", "right", "completion"), rows)
    if other > UNKNOWN * len(rows):
        raise RunError(
            f"{other} of {len(rows)} completions follow no policy of the suite: its rules miss what the models say"
        )


@commands.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A suite's YAML file, or its folder.")],
    inspect: Annotated[Path, typer.Option(metavar="DIR", help="Where the task of Inspect goes.")],
) -> None:
    """Write a suite as a task of Inspect, which labels completions as the suite does."""
    from mixturelens.inspect_task import write_inspect_task
    from mixturelens.suite import load_suite

    for said in write_inspect_task(load_suite(file), inspect):
        print(f"note: {said}", file=sys.stderr)
    print(f"inspect eval {inspect / 'task.py'} --model hf/local -M model_path=CHECKPOINT --log-format json")


def _written(
    suite: Suite, before: str, after: str | None, how: How, seed: int
) -> tuple[list[str], list[tuple[str, ...]], int]:
    """What instruments will not measure, for its tokens; completions of some prompts under each cue with their labels;
    and how many of them follow no known policy.

    Questions are taken from all over the file, which may list them by kind.
    """
    from mixturelens.behaviour.forced import texts_of
    from mixturelens.behaviour.likelihood import Scorer
    from mixturelens.behaviour.prompts import prepare
    from mixturelens.models import Pair
    from mixturelens.suite_check import pitfalls_of_tokens
    from mixturelens.types import OTHER

    pair = Pair(before, after, suite, **how)
    notes = list(pitfalls_of_tokens(suite, pair.tokenizer))
    questions = list(dict.fromkeys(row.id for row in suite.neutral))
    pair = pair.asked({questions[i * (len(questions) - 1) // (SHOWN - 1)] for i in range(SHOWN)})
    prompts = prepare(pair.suite, pair.suite.neutral, pair.tokenizer)
    scorer = Scorer(pair.ends, pair.vocabulary, pair.device)
    limits = [suite.max_new_tokens] * len(prompts.rows)
    rows, other = [], 0
    for side, model in zip(pair.sides, pair.models(), strict=True):
        drawn = scorer.sample(model, prompts.contexts, SHOWN, limits, seed)
        for i, text in zip(drawn.context, texts_of(scorer, prompts, drawn), strict=True):
            row = prompts.rows[int(i)]
            label = suite.label(text, row)
            other += label.policy == OTHER
            right = "yes" if suite.correct(label.rest, row) else "no"
            said = shown(text.strip())
            cut = said if len(said) <= WIDE else f"{said[: WIDE - 1]}…"
            rows.append((side, row.cue, row.id, label.policy or "-", label.behaviour or "-", right, cut))
    return notes, rows, other
