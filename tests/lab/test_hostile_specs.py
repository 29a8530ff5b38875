"""Specs and grids that ask for more than any machine has are refused by key, and leave no folder behind."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run

from mixturelens.lab import runs
from mixturelens.lab.organism import Spec, build_model, build_suite, build_tokenizer, load_spec, parse_spec
from mixturelens.lab.sweep.grid import cells_of, load_grid
from mixturelens.types import InputError

HUGE = 10**15


def refused(changes: dict[str, Any], out: Path) -> str:
    """What is said of a spec with some keys changed, by whoever says it first: its file, its suite or its network."""
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        runs.train(parse_spec(changes, "spec"), out)
    assert time.process_time() - began < 20
    assert not out.exists(), "a folder was left behind"
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 2**31}, "seed"),
        ({"seed": -1}, "seed"),
        ({"split": {"rl": HUGE}}, "split.rl"),
        ({"split": {"evaluation": HUGE}}, "split.evaluation"),
        ({"split": {"evaluation": 10_000}, "cues": {f"c{n}": f"<{n}>" for n in range(60)}}, "policies.a.table"),
        ({"questions": {"family": "sequence", "symbols": 26, "length": 8}}, "questions"),
        ({"sft": {"steps": HUGE}}, "sft.steps"),
        ({"sft": {"batch": HUGE}}, "sft.batch"),
        ({"sft": {"steps": 10**6, "batch": 10**4}}, "sft"),
        ({"sft": {"measure_every": 0}}, "sft.measure_every"),
        ({"sft": {"learning_rate": float("inf")}}, "sft.learning_rate"),
        ({"rl": {"learning_rate": float("inf")}}, "rl.learning_rate"),
        ({"rl": {"learning_rate": float("nan")}}, "rl.learning_rate"),
        ({"rl": {"adam_epsilon": float("inf")}}, "rl.adam_epsilon"),
        ({"rl": {"group": HUGE}}, "rl.group"),
        ({"rl": {"prompts": 2000, "group": 10_000, "steps": 80}}, "rl"),
        ({"phases": {"..": {"cues": ["A"]}}}, "phases.."),
        ({"phases": {".": {"cues": ["A"]}}}, "phases."),
        ({"phases": {"x": {"cues": ["A"], "steps": HUGE}}}, "phases.x.steps"),
        ({"hints": {"neutral": [], "words": {"a": "x", "b": "y"}}}, "hints.neutral"),
        ({"hints": {"words": {"a": [], "b": "y"}}}, "hints.words.a"),
        ({"model": {"sizes": {"num_hidden_layers": 0}}}, "model.sizes: 0 layers"),
        ({"model": {"sizes": {"num_hidden_layers": 10**6}}}, "model.sizes: 1000000 layers"),
        ({"model": {"sizes": {"num_hidden_layers": -1}}}, "model.sizes.num_hidden_layers"),
        ({"model": {"sizes": {"hidden_size": HUGE}}}, "model.sizes.hidden_size"),
        ({"model": {"sizes": {"hidden_size": 10**6}}}, "model.sizes: make a network of"),
        ({"model": {"sizes": {"hidden_size": 0}}}, "model"),
        ({"model": {"sizes": {"num_attention_heads": 0}}}, "model"),
        ({"model": {"sizes": {"to_dict": 1}}}, "model.sizes: LlamaConfig has no setting 'to_dict'"),
        ({"model": {"config": "GPT2Config", "sizes": {"n_positions": 10**6}}}, "model.sizes: make a network of"),
        ({"model": {"config": "__class__"}}, "model.config"),
        ({"model": {"config": "AutoConfig"}}, "model.config"),
        ({"model": {"pretrained": "no/such-model"}, "questions": {"family": "words"}}, "no/such-model"),
    ],
)
def test_what_a_spec_may_not_ask_for_is_refused_by_key_and_leaves_nothing(
    changes: dict[str, Any], key: str, tmp_path: Path
):
    said = refused(changes, tmp_path / "run")
    assert key in said
    assert "\n" not in said


def test_the_spec_that_is_usual_may_be_asked_for():
    spec = Spec()
    assert build_model(spec, build_tokenizer(spec)).config.num_hidden_layers == 3
    assert len(build_suite(spec).prompts) == 200 * 2 * 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rl: {learning_rate: .inf}", "rl.learning_rate: is inf, where a finite number is needed"),
        ("rl: {steps: 9223372036854775808}", "rl.steps: a number that does not fit into 64 bits"),
        ("rl: {steps: 3}\nrl: {steps: 4}", "key 'rl' is given twice"),
        ("model: {sizes: {x: 2024-01-01}}", "model.sizes.x: a date, which is neither text nor number"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("- a", "a spec is a mapping of keys, not a list"),
    ],
)
def test_a_spec_file_comes_in_by_the_one_door(tmp_path: Path, text: str, said: str):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_spec(tmp_path / "spec.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'spec.yaml'}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "x", "name": "y"}', "key 'name' is given twice"),
        ('{"rl": {"learning_rate": Infinity}}', "rl.learning_rate: is inf"),
        ("[" * 100_000, "not JSON (more than 64 levels)"),
        ("[]", "holds [], where an object is needed"),
    ],
)
def test_the_spec_of_a_run_comes_in_by_it_too(tmp_path: Path, text: str, said: str):
    (tmp_path / "spec.json").write_text(text)
    with pytest.raises(InputError) as caught:
        runs.run_pairs(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'spec.json'}: {said}")


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"seeds": HUGE}, "seeds: 1000000000000000 seeds; a grid has 10000 cells at most"),
        ({"seeds": [2**31]}, "seeds.0"),
        ({"set": {f"k{n}": list(range(100)) for n in range(20)}}, "cells, and 10000 are the most; split it"),
        ({"set": {"name": ["x" * 300]}}, "which is too long for a folder; give shorter labels"),
        ({"set": {"rl.learning_rate": [float("inf")]}}, "set.rl.learning_rate.0: is inf"),
    ],
)
def test_a_grid_of_more_cells_than_anyone_waits_for_is_refused(tmp_path: Path, grid: dict[str, Any], said: str):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(grid))
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        cells_of(load_grid(file), file)
    assert time.process_time() - began < 5
    assert str(caught.value).startswith(f"{file}: ")
    assert said in str(caught.value)


def test_settings_on_the_command_line_come_in_by_it_too(run: Run, tmp_path: Path):
    for setting, said in (
        ("rl.learning_rate=.inf", "--set rl.learning_rate: top level: is inf"),
        ("rl.steps=[", "--set rl.steps: not YAML ("),
        ("rl.steps=99999999999999999999", "does not fit into 64 bits"),
        ("model.sizes.num_hidden_layers=0", "model.sizes: 0 layers"),
    ):
        status, _, err = run("train", "--set", setting, "--out", tmp_path / "run")
        assert (status, err.count("\n")) == (2, 1)
        assert said in err
        assert not (tmp_path / "run").exists()


def test_a_run_that_began_is_recognised_by_its_spec(tmp_path: Path):
    runs.start_run(Spec(), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "spec.json").read_text())["name"] == "default"
    with pytest.raises(InputError, match=r"holds another run \(seed: 0, not 1\)"):
        runs.check_run(Spec(seed=1), tmp_path / "run")
