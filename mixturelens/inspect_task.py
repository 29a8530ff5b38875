"""A suite as a task of Inspect (inspect_ai), whose logs `--completions` reads back."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixturelens.records import write_new
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import InputError

TASK = '''\
"""A behaviour suite as a task of Inspect: `mixturelens suite export` wrote it, and labels completions with mixturelens.

    inspect eval task.py --model hf/local -M model_path=CHECKPOINT --log-format json --log-dir logs
    mixturelens verdict --before S --after R --suite suite.yaml --completions before=LOG --completions after=LOG
"""

from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, Target, grouped, mean, scorer
from inspect_ai.solver import TaskState, generate

from mixturelens.suite import load_suite
from mixturelens.types import OTHER

HERE = Path(__file__).resolve().parent
SUITE = load_suite(HERE / "suite.yaml")
ROWS = {f"{row.id}/{row.cue}": row for row in SUITE.neutral}


def label(completion: str, sample: str) -> dict[str, int]:
    """Whether a completion of a sample is right, and which policy and behaviour it shows: 1 or 0 each."""
    row = ROWS[sample]
    found = SUITE.label(completion, row)
    shown = {f"policy {name}": int(found.policy == name) for name in (*SUITE.policies, OTHER) if SUITE.table is None}
    done = {f"behaviour {name}": int(found.behaviour == name) for name in SUITE.behaviour_names}
    return {"right": int(SUITE.correct(found.rest, row)), **shown, **done}


@scorer(metrics={"*": [grouped(mean(), "cue")]})
def labels():
    """The suite's labels of each completion, averaged under each cue."""

    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=label(state.output.completion, str(state.sample_id)), answer=state.output.completion)

    return score


@task
def suite() -> Task:
    """Every prompt of the suite, at temperature 1 and without truncation, as mixturelens samples."""
    return Task(
        dataset=json_dataset(str(HERE / "dataset.jsonl")),
        solver=generate(),
        scorer=labels(),
        config=GenerateConfig(temperature=1.0, top_p=1.0, max_tokens=SUITE.max_new_tokens),
        epochs=SUITE.samples,
    )
'''


def write_inspect_task(suite: Suite, folder: Path) -> list[str]:
    """Write a suite as an Inspect task into a folder: `task.py`, `dataset.jsonl`, and the suite with its prompts.

    Prompts with a hint are left out, as a verdict leaves them out. Returns what Inspect does otherwise than
    mixturelens, in words. Raises InputError where inspect_ai is not installed, or a file is there already.
    """
    if importlib.util.find_spec("inspect_ai") is None:
        raise InputError("inspect_ai is not installed, which runs the task: pip install inspect_ai")
    lines = [json.dumps(_sample(suite, row), ensure_ascii=False) for row in suite.neutral]
    task = {folder / "dataset.jsonl": "\n".join(lines) + "\n", folder / "task.py": TASK}
    write_new({**suite.files(folder / "suite.yaml"), **task})
    return list(_otherwise(suite))


def _sample(suite: Suite, row: PromptRow) -> dict[str, Any]:
    """A prompt as Inspect reads it: its id names question and cue."""
    turns = [dict(turn) for turn in row.messages or ({"role": "user", "content": row.text},)]
    if suite.chat is not None and suite.chat.system is not None:
        turns = [{"role": "system", "content": suite.chat.system}, *turns]
    return {
        "id": f"{row.id}/{row.cue}",
        "input": turns,
        "target": row.answer,
        "metadata": {"id": row.id, "cue": row.cue},
    }


def _otherwise(suite: Suite) -> Iterator[str]:
    if suite.chat is None:
        yield "the suite's prompts go to the models as they are; Inspect sends each as a turn of the user"
    elif suite.chat.template_kwargs:
        names = ", ".join(suite.chat.template_kwargs)
        yield f"arguments of the chat template ({names}) are the model provider's to give in Inspect"
    if any((row.messages or ({"role": "user"},))[-1]["role"] == "assistant" for row in suite.neutral):
        yield "prompts that end in a turn of the assistant are continued by mixturelens; not every provider does that"
    if suite.literal:
        yield "the suite is of literal texts, which are computed exactly: --completions will refuse the logs"
