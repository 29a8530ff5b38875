"""What several rooms share: the stored pairs, loaded once."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start: two of them share the cores

import checker  # noqa: F401  # before anything that it checks
import pytest
import torch

from mixturelens import cli
from mixturelens.behaviour import measure
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.models import end_tokens, load_model, load_tokenizer
from mixturelens.suite import Suite, load_suite

torch.set_num_threads(1)

PAIRS = Path(__file__).parent / "pairs"


# what hooks and models do they do on every architecture; what is built on them is tried on these two less often
SELDOM = {"gpt_neox", "qwen2"}
ON_EVERY_ARCHITECTURE = ("hooks", "models")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Above hooks and models, two architectures stand for four in `make test`; `make test-slow` has the others."""
    rooms = tuple(Path(__file__).parent / room for room in ON_EVERY_ARCHITECTURE)
    for item in items:
        given = None if any(item.path.is_relative_to(room) for room in rooms) else getattr(item, "callspec", None)
        if given and any(isinstance(value, str) and value in SELDOM for value in given.params.values()):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """What is there by now stays until the end: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


class Pair(NamedTuple):
    scorer: Scorer
    before: Any
    after: Any
    suite: Suite
    tokenizer: Any
    prompts: Prompts


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; (exit status, standard output, standard error).

    Completions of literals are not listed, which takes seconds for the stored pairs, and is no business of a command.
    """
    monkeypatch.setattr(measure, "ENUMERATE_AT_MOST", 0)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mixturelens", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


@functools.cache
def _model(folder: Path) -> Any:
    return load_model(folder)


@functools.cache
def _pair(shape: str, after: str) -> Pair:
    folder = PAIRS / shape
    suite, tokenizer = load_suite(folder), load_tokenizer(folder / "S")
    before = _model(folder / "S")
    scorer = Scorer(end_tokens(before, tokenizer), before.config.vocab_size)
    return Pair(scorer, before, _model(folder / after), suite, tokenizer, prepare(suite, suite.neutral, tokenizer))


@pytest.fixture(scope="session")
def pairs() -> Path:
    """The folder of the stored pairs, made by tests/pairs/make_pairs.py and make_chat_pair.py."""
    return PAIRS


@pytest.fixture(scope="session")
def load_pair() -> Callable[[str, str], Pair]:
    """(shape, name of R) -> the loaded pair; every model is loaded once a session."""
    return _pair
