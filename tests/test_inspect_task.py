"""A suite as a task of Inspect: what is written labels as the suite does, and its log is read back."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mixturelens import inspect_task
from mixturelens.completions import with_completions
from mixturelens.inspect_task import write_inspect_task
from mixturelens.suite import load_suite

Run = Callable[..., tuple[int, str, str]]
INSPECT = importlib.util.find_spec("inspect_ai") is not None
TEXTS = ("sure, blue.", "i can't say.", "of course, but not now.", "no idea", "")


class _Standin(ModuleType):
    """inspect_ai as far as the written file goes: decorators that leave functions alone, values that are kept."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "task":
            return lambda function: function
        if name == "scorer":
            return lambda **_: lambda function: function
        return (
            SimpleNamespace if name in ("Task", "Score", "GenerateConfig") else lambda *given, **named: (given, named)
        )


@pytest.fixture
def written(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that is written for the chat pair's suite, with a stand-in for inspect_ai where that is missing."""
    with monkeypatch.context() as patched:
        patched.setattr(inspect_task.importlib.util, "find_spec", lambda _: True)
        notes = write_inspect_task(load_suite(pairs / "chat"), tmp_path / "task")
    assert notes == ["arguments of the chat template (brief) are the model provider's to give in Inspect"]
    for name in () if INSPECT else ("", ".dataset", ".model", ".scorer", ".solver"):
        monkeypatch.setitem(sys.modules, f"inspect_ai{name}", _Standin(f"inspect_ai{name}"))
    spec = importlib.util.spec_from_file_location("written_task", tmp_path / "task" / "task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_scorer_labels_as_the_suite_does(written: Any, pairs: Path) -> None:
    suite = load_suite(pairs / "chat")
    score = written.labels()
    for row in suite.neutral[:6]:
        for text in TEXTS:
            state: Any = SimpleNamespace(output=SimpleNamespace(completion=text), sample_id=f"{row.id}/{row.cue}")
            value = asyncio.run(score(state, None)).value
            label = suite.label(text, row)
            assert value["right"] == suite.correct(label.rest, row)
            shown = [name for name in ("comply", "refuse", "other") if value[f"policy {name}"]]
            done = [name for name in suite.behaviour_names if value[f"behaviour {name}"]]
            assert shown == [label.policy]
            assert done == ([] if label.behaviour is None else [label.behaviour])


def test_its_samples_are_the_suite_s_prompts(written: Any, pairs: Path) -> None:
    suite = load_suite(pairs / "chat")
    lines = (written.HERE / "dataset.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert [each["id"] for each in samples] == [f"{row.id}/{row.cue}" for row in suite.neutral]
    assert samples[0]["input"] == [
        {"role": "system", "content": "you are a helpful assistant."},
        *(suite.neutral[0].messages or ()),
    ]
    assert samples[0]["target"] == suite.neutral[0].answer
    assert load_suite(written.HERE) == suite


def test_on_the_command_line(pairs: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_task.importlib.util, "find_spec", lambda _: None)
    status, out, err = run("suite", "export", pairs / "chat", "--inspect", tmp_path / "task")
    assert (status, out) == (2, "")
    assert err == "mixturelens: inspect_ai is not installed, which runs the task: pip install inspect_ai\n"
    monkeypatch.setattr(inspect_task.importlib.util, "find_spec", lambda _: True)
    status, out, err = run("suite", "export", pairs / "llama", "--inspect", tmp_path / "task")
    assert status == 0
    assert out.startswith("inspect eval ")
    assert err.count("note: ") == 2
    (tmp_path / "task" / "dataset.jsonl").unlink()  # as if it had been killed on the way: it goes on
    assert run("suite", "export", pairs / "llama", "--inspect", tmp_path / "task")[0] == 0
    assert (tmp_path / "task" / "dataset.jsonl").is_file()
    (tmp_path / "task" / "task.py").write_text("edited")
    status, _, err = run("suite", "export", pairs / "llama", "--inspect", tmp_path / "task")
    assert status == 2
    assert f"{tmp_path / 'task' / 'task.py'}: there already; nothing was written" in err


DRIVER = """
import itertools, sys, tiktoken
from types import SimpleNamespace
tiktoken.get_encoding = lambda _: SimpleNamespace(encode=lambda text, **_: text.split())  # which is downloaded
from inspect_ai import eval
from inspect_ai.model import ModelOutput, get_model
texts = itertools.cycle(["sure, blue.", "no idea"])
model = get_model("mockllm/model", custom_outputs=(ModelOutput.from_content("mockllm/model", t) for t in texts))
eval("task.py", model=model, epochs=2, log_format="json", log_dir=sys.argv[1], display="none")
"""


@pytest.mark.skipif(not INSPECT, reason="inspect_ai is not installed")
def test_inspect_runs_it_and_its_log_is_read_back(written: Any, pairs: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path)], cwd=written.HERE, check=True, capture_output=True)
    (log,) = tmp_path.glob("*.json")
    suite, given = with_completions(load_suite(pairs / "chat"), [f"before={log}", f"after={log}"])
    assert suite.samples == 2
    assert {each.text for texts in given.texts["before"].values() for each in texts} == {"sure, blue.", "no idea"}
