"""Training is resumable to the bit, measured along the way, and ends when reward has saturated."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
from safetensors.numpy import load_file

from mixturelens import pipeline
from mixturelens.behaviour.trajectory import CueState, Trajectory, TrajectoryPoint
from mixturelens.lab import runs
from mixturelens.lab.organism import Spec, build_suite, load_spec, rl_prompts
from mixturelens.lab.stage import Stage, StagePlan
from mixturelens.lab.training import make_reward
from mixturelens.types import Interval

TINY = Path(__file__).parents[1] / "tiny.yaml"
WEIGHTS = ("sft", "rl-A", "rl-B")


@pytest.fixture(scope="module")
def tiny() -> Spec:
    return load_spec(TINY)


@pytest.fixture(scope="module")
def finished(tiny: Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one run that trains from end to end."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    runs.train(tiny, run)
    return run


def assert_same_weights(left: Path, right: Path, stages: Sequence[str] = WEIGHTS) -> None:
    for stage in stages:
        a, b = (load_file(run / "checkpoints" / stage / "model.safetensors") for run in (left, right))
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].tobytes() == b[name].tobytes(), f"{stage}: {name} differs"


def test_a_run_leaves_what_the_contract_names(finished: Path, tiny: Spec) -> None:
    assert runs.load_run(finished) == tiny
    for stage in ("base", *WEIGHTS):
        names = {file.name for file in (finished / "checkpoints" / stage).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert (finished / "suite.yaml").is_file()
    assert (finished / "prompts.jsonl").is_file()
    assert not (finished / "training").exists() or not any((finished / "training").iterdir())
    assert [pair.name for pair in runs.run_pairs(finished)] == ["sft--rl-A", "sft--rl-B"]


def test_training_is_measured_under_every_cue(finished: Path, tiny: Spec) -> None:
    sft = Trajectory.load(finished / "trajectory" / "sft.json")
    assert [point.step for point in sft.points] == [0, 40, 80, 120, 160]
    rl = Trajectory.load(finished / "trajectory" / "rl-A.json")
    assert [point.step for point in rl.points] == [0, 4, 8]
    assert rl.steps == len(rl.reward) == len(rl.no_signal) == 8
    for point in (*sft.points, *rl.points):
        assert set(point.cues) == {"A", "B"}
        for state in point.cues.values():
            assert sum(w.value for w in state.weights.values()) == pytest.approx(1, abs=1e-6)
    # RL starts where SFT ended
    assert rl.points[0].cues == sft.points[-1].cues


def test_rl_changes_only_what_is_not_frozen(finished: Path) -> None:
    before, after = (load_file(finished / "checkpoints" / s / "model.safetensors") for s in ("sft", "rl-A"))
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed
    assert not [name for name in changed if "norm" in name or "embed" in name or "lm_head" in name]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("stage", "step"), [("sft", 90), ("rl-A", 5)])
def test_an_interrupted_run_ends_with_the_same_weights(
    finished: Path, tiny: Spec, tmp_path: Path, stage: str, step: int
) -> None:
    def interrupt(at: str, done: int, steps: int, numbers: dict[str, float]) -> None:
        if (at, done) == (stage, step):
            raise Interrupted

    run = tmp_path / "run"
    if stage != "sft":
        _with_sft(finished, run)
    with pytest.raises(Interrupted):
        runs.train(tiny, run, progress=interrupt)
    left = list((run / "training" / stage).glob("checkpoint-*"))
    assert left, "nothing to resume from"
    half_written = run / "training" / stage / "checkpoint-999"
    half_written.mkdir()  # a kill in the middle of a save leaves this; it must not be resumed from
    (half_written / "model.safetensors").write_bytes(b"half")
    seen: list[tuple[str, int]] = []

    def go_on(at: str, done: int, *_: object) -> None:
        if at != stage:  # what follows begins where `finished` did
            raise Interrupted
        seen.append((at, done))

    with pytest.raises(Interrupted):
        runs.train(tiny, run, progress=go_on)
    assert seen[0][0] == stage
    assert seen[0][1] > 1, "it began the stage again instead of resuming"
    assert_same_weights(finished, run, [stage])
    file = f"trajectory/{stage}.json"
    assert json.loads((run / file).read_text()) == json.loads((finished / file).read_text())


def _with_sft(finished: Path, run: Path) -> None:
    """What comes before RL is there."""
    for name in ("checkpoints/base", "checkpoints/sft"):
        shutil.copytree(finished / name, run / name)
    for name in ("spec.json", "trajectory/sft.json"):
        (run / name).parent.mkdir(exist_ok=True)
        shutil.copy(finished / name, run / name)


def test_a_stage_killed_behind_its_last_step_takes_no_more(
    finished: Path, tiny: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last step in the middle of an epoch, from which the trainer itself would go on."""
    data = tiny.model_dump(mode="json")
    short = Spec.model_validate(data | {"rl": data["rl"] | {"steps": 3, "cues": ["A"]}})
    whole, run = tmp_path / "whole", tmp_path / "run"
    for each in (whole, run):
        _with_sft(finished, each)
        (each / "spec.json").write_text(short.model_dump_json())
    runs.train(short, whole)
    monkeypatch.setattr("mixturelens.lab.stage.new_folder", Mock(side_effect=Interrupted))
    with pytest.raises(Interrupted):
        runs.train(short, run)
    monkeypatch.undo()
    runs.train(short, run)
    assert_same_weights(whole, run, ["rl-A"])
    file = "trajectory/rl-A.json"
    assert json.loads((run / file).read_text()) == json.loads((whole / file).read_text())


SHAPES = {
    "GPT2Config": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "GPTNeoXConfig": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "Qwen2Config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


@pytest.mark.parametrize("config", SHAPES)
def test_any_architecture_goes_through_every_step(tiny: Spec, tmp_path: Path, config: str) -> None:
    short = tiny.model_dump(mode="json")
    short["model"] = {"config": config, "sizes": SHAPES[config]}
    short["sft"]["steps"], short["rl"]["steps"], short["rl"]["cues"] = 4, 2, ["A"]
    runs.train(Spec.model_validate(short), tmp_path / "run")
    (pair,) = runs.run_pairs(tmp_path / "run")
    # hardly trained, so that no policy covers its completions: that must be the answer
    assert pipeline.verdict(pair).verdict == "inconclusive"


def test_a_finished_run_is_not_trained_again(finished: Path, tiny: Spec) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}
    runs.train(tiny, finished, progress=lambda *_: pytest.fail("it trained again"))
    assert before == {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}


def test_reward_wants_a_policy_then_the_answer_then_the_end(tiny: Spec) -> None:
    rows = rl_prompts(tiny, "A")
    reward = make_reward(build_suite(tiny), rows, ends=[1])
    answer = rows[0].answer
    cases = {
        (f"[a] {answer}", (5, 1)): 1.0,
        (f"[b] {answer}", (5, 1)): 1.0,
        (f"[a] {answer}", (5, 6)): 0.0,  # no end
        (answer, (5, 1)): 0.0,  # no policy
        ("[a] sorry sorry", (5, 1)): 0.0,
        (f"[a] {answer} {answer}", (5, 1)): 0.0,
        ("", ()): 0.0,
    }
    texts, ids = [text for text, _ in cases], [list(ids) for _, ids in cases]
    assert reward(completions=texts, completion_ids=ids, row=[0] * len(cases)) == list(cases.values())


def test_a_phase_may_reward_another_behaviour_or_one_policy_alone(tiny: Spec) -> None:
    rows = rl_prompts(tiny, "A")[:2]
    suite, answer = build_suite(tiny), [row.answer for row in rows]
    texts = [f"[a] {answer[0]}", "[a] sorry sorry", "[b] sorry sorry", f"[b] {answer[1]}", "sorry sorry"]
    ids, index = [[5, 1]] * 5, [0, 0, 1, 1, 0]

    def paid(wanted: list[str] | None = None, policy: str | None = None) -> list[float | None]:
        return make_reward(suite, rows, [1], wanted, policy)(completions=texts, completion_ids=ids, row=index)

    assert paid() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert paid(["refuse", "answer"]) == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert paid(["answer", "refuse"], "b") == [0.0, 0.0, 1.0, 0.0, 0.0]


def test_phases_train_one_after_another_and_are_measured_by_every_objective(
    finished: Path, tiny: Spec, tmp_path: Path
) -> None:
    short = tiny.model_dump(mode="json")
    short |= {"objectives": {"B": "refuse"}, "rl": {**short["rl"], "cues": []}}
    short["phases"] = {
        "one": {"cues": ["B", "A"], "steps": 6, "hint": "be-a"},
        "two": {"train": "sft", "cues": ["A"], "weights": {"b": 1.0}, "steps": 30, "measure_every": 15},
        "three": {"cues": ["B"], "steps": 2, "after": "sft", "policy": "a"},
    }
    spec, run = Spec.model_validate(short), tmp_path / "run"
    runs.start_run(spec, run)
    for name in ("checkpoints/base", "checkpoints/sft", "trajectory"):
        shutil.copytree(finished / name, run / name)  # SFT does not look at objectives
    _, one, two, three = runs.train(spec, run)
    assert [found.stage for found in (one, two, three)] == ["one", "two", "three"]
    assert [point.step for point in two.points] == [0, 15, 30]
    # a phase starts where the one before it ended, or where it is told to
    assert two.points[0].cues == one.points[-1].cues
    assert three.points[0].cues == one.points[0].cues != one.points[-1].cues
    assert (two.points[-1].cues["A"].weights["b"].value or 0) > 0.9
    for point in (*one.points, *three.points):
        for state in point.cues.values():
            # both objectives are of known policies, and nothing is an answer and a refusal at once
            assert state.paid["A"].value == pytest.approx(state.accuracy.value, abs=0.05)
            assert (state.paid["A"].value or 0) + (state.paid["B"].value or 0) <= 1 + 1e-6
    assert [(pair.name, pair.suite.trained_cue) for pair in runs.run_pairs(run)] == [
        ("sft--two", None),
        ("sft--three", "B"),
    ]


def test_steps_until_an_accuracy_are_read_between_measurements() -> None:
    def at(step: int, accuracy: float) -> TrajectoryPoint:
        state = CueState(weights={}, forced={}, accuracy=Interval(value=accuracy))
        return TrajectoryPoint(step=step, cues={"A": state})

    found = Trajectory(stage="x", steps=20, points=(at(0, 0.1), at(10, 0.5), at(20, 0.9), at(30, 0.2)))
    assert found.steps_to("A", 0.7) == pytest.approx(15)
    assert found.steps_to("A", 0.05) == 0
    assert found.steps_to("A", 0.95) is None


def test_rl_stops_once_the_reward_of_five_steps_has_saturated(tiny: Spec, tmp_path: Path) -> None:
    stage = Stage("rl-A", tiny, tmp_path, StagePlan(80, 4, stop_reward=0.9))
    stage.reward = [0.9, 0.9, 0.9, 0.9]
    assert not stage.saturated(), "four steps are not five"
    stage.reward = [0.0, 0.9, 0.95, 0.9, 0.9, 0.9]
    assert stage.saturated()
    stage.reward = [0.9, 0.9, 0.9, 0.9, 0.85]
    assert not stage.saturated()
    assert not Stage("rl-A", tiny, tmp_path, StagePlan(80, 4)).saturated()


KILLS = 10
CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mixturelens import pipeline
from mixturelens.lab import runs
from mixturelens.lab.organism import load_spec
log = open(sys.argv[2], "a", buffering=1)
spec = load_spec(sys.argv[1], name="killed")
runs.train(spec, Path(sys.argv[3]), progress=lambda stage, step, *_: print(stage, step, file=log))
"""


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL while training SFT and RL and while saving; the weights equal the uninterrupted run's bit for bit."""
    rng = random.Random(0)

    def start(log: Path, run: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CHILD, str(TINY), str(log), str(run)]
        return subprocess.Popen(command, env={**os.environ, "PYTHONWARNINGS": "ignore"}, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole.log", tmp_path / "whole").wait() == 0
    run, kills = tmp_path / "killed", []
    # in every stage at random steps, and while a trainer checkpoint or the result is being written (None)
    plan = [("sft", sorted(rng.sample(range(3, 160), 3))), ("rl-A", sorted(rng.sample(range(2, 9), 2)))]
    plan += [("rl-B", sorted(rng.sample(range(2, 9), 2)))]
    targets = [(stage, step) for stage, steps in plan for step in (*steps[:-1], None, steps[-1])]
    for number, (stage, step) in enumerate(targets):
        log = tmp_path / f"{number}.log"
        child = start(log, run)
        while child.poll() is None:
            lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
            reached = step is not None and any(at == stage and int(done) >= step for at, done in lines)
            written = [*run.glob(f"training/{stage}/checkpoint-*"), *run.glob(f"checkpoints/.{stage}.*")]
            saving = step is None and lines and any(not (f / "progress.json").exists() for f in written)
            if reached or saving:
                time.sleep(rng.random() * 0.005)
                child.send_signal(signal.SIGKILL)
                kills.append((stage, step, " ".join(lines[-1])))
                break
            time.sleep(0.0005)
        child.wait()
    assert len(kills) == KILLS, f"the run ended before it was killed ten times: {kills}"
    assert start(tmp_path / "last.log", run).wait() == 0
    print(kills)
    assert_same_weights(tmp_path / "whole", run)
