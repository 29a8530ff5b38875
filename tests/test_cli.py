"""The command line: what goes to which stream, and one clear line for every kind of bad input."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from stored import few_nulls

from mixturelens.lab.organism import RECIPES

PAIRS = Path(__file__).with_name("pairs")
TINY = Path(__file__).with_name("tiny.yaml")
REFERENCE = Path(__file__).parents[1] / "artifacts" / "reference"

Run = Callable[..., tuple[int, str, str]]


def pair(shape: str = "llama", after: str = "R-routing", **changes: object) -> list[object]:
    options = {"before": PAIRS / shape / "S", "after": PAIRS / shape / after, "suite": PAIRS / shape / "suite.yaml"}
    return [part for key, value in (options | changes).items() for part in (f"--{key.replace('_', '-')}", value)]


def refused(result: tuple[int, str, str], *culprits: object, status: int = 2) -> None:
    """One line on standard error that names the culprits; nothing on standard output."""
    code, out, err = result
    assert code == status, err
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    for culprit in culprits:
        assert str(culprit) in lines[0], lines[0]


# --- what it prints ---------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from mixturelens import cli; print([m for m in ('torch', 'trl', 'plotly') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_recipes_are_listed(run: Run) -> None:
    status, out, _ = run("train", "--list")
    assert status == 0
    for name in ("default", "full", "adam", "phrase"):
        assert f"\n{name} " in f"\n{out}"


def test_json_is_the_record_and_nothing_else(run: Run, tmp_path: Path) -> None:
    status, out, err = run("verdict", *pair(out=tmp_path), "--json")
    assert status == 0, err
    record = json.loads(out)
    assert record["kind"] == "verdict"
    assert record["version"] == 2
    assert record["verdict"] == "routing"
    assert record["changed"] == {"selector": True, "cue_reader": False, "skill": False}
    for key in ("routing_share", "router_share"):
        assert set(record[key]) == {"value", "low", "high"}
    side = record["per_cue"]["A"]["before"]
    assert set(side["weights"]) == {"a", "b", "other"}
    assert set(side["accuracy"]) == {"a", "b"}
    assert isinstance(side["overall"], float)
    assert record["mechanism"]["verdict"] is None
    saved = tmp_path / "records" / "S--R-routing"
    assert json.loads((saved / "verdict.json").read_text()) == record
    # what was measured is not measured again
    stamp = (saved / "behaviour.json").stat().st_mtime_ns
    assert run("verdict", *pair(out=tmp_path), "--json", "--quiet") == (0, out, "")
    assert (saved / "behaviour.json").stat().st_mtime_ns == stamp


def test_the_verdict_is_a_table_and_a_sentence(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("verdict", *pair(after="R-conditioning", out=tmp_path), "--quiet")
    assert status == 0
    assert "S--R-conditioning" in out
    assert "specialist" in out
    assert "what changed is what a policy does under a cue" in out


def test_one_checkpoint_has_behaviour_but_no_verdict(run: Run, tmp_path: Path) -> None:
    alone = ["--before", PAIRS / "llama/S", "--suite", PAIRS / "llama/suite.yaml", "--out", tmp_path, "--quiet"]
    status, out, _ = run("behaviour", *alone)
    assert status == 0
    assert "before" in out
    refused(run("verdict", *alone), "--after")


def test_patch_and_repair_and_a_report_of_both(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixturelens.patching.record import PatchingRecord
    from mixturelens.routing.repair import RepairRecord

    few_nulls(monkeypatch)
    out = tmp_path / "out"
    status, text, _ = run("patch", *pair(out=out), "--json", "--quiet")
    assert status == 0
    patched = PatchingRecord.model_validate(json.loads(text))
    assert patched == PatchingRecord.load(out / "records" / "S--R-routing" / "patching.json")
    assert {(s.kind, s.checkpoint) for s in patched.sweeps} == {
        ("cue", "before"),
        ("cue", "after"),
        ("checkpoint", "after"),
    }
    assert (out / "records" / "S--R-routing" / "circuit.json").is_file()
    status, text, _ = run("repair", *pair(out=out), "--quiet")
    assert status == 0
    assert "interchange" in text
    assert str(out / "repaired") in text
    record = RepairRecord.load(out / "records" / "S--R-routing" / "repair.json")
    assert record.checkpoint == "repaired"
    assert (out / "repaired" / "model.safetensors").is_file()
    # both are read, not made again
    before = (out / "repaired" / "model.safetensors").stat().st_mtime_ns
    status, text, _ = run("repair", *pair(out=out), "--json", "--quiet")
    assert RepairRecord.model_validate(json.loads(text)) == record
    assert (out / "repaired" / "model.safetensors").stat().st_mtime_ns == before
    status, text, _ = run("report", *pair(out=out), "--quiet")
    page = Path(text.strip()).read_text(encoding="utf-8")
    assert "Where the router is" in page
    assert "Repair of transfer" in page


@pytest.mark.slow
def test_graft_and_probe_and_what_the_verdict_makes_of_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixturelens.grafting.record import GraftRecord
    from mixturelens.probing.record import ProbingRecord
    from mixturelens.routing.verdict import VerdictRecord

    few_nulls(monkeypatch)
    out = tmp_path / "out"
    records = out / "records" / "S--R-routing"
    status, text, _ = run("verdict", *pair(out=out), "--json", "--quiet")
    assert VerdictRecord.model_validate(json.loads(text)).mechanism.verdict is None
    status, text, _ = run("graft", *pair(out=out), "--quiet")
    assert status == 0
    assert "the mechanism says routing (agrees)" in text
    assert (out / "rollback" / "model.safetensors").is_file()
    status, text, _ = run("probe", *pair(out=out), "--json", "--quiet")
    assert status == 0
    assert ProbingRecord.model_validate(json.loads(text)) == ProbingRecord.load(records / "probing.json")
    # both are read, not made again
    before = (out / "rollback" / "model.safetensors").stat().st_mtime_ns
    status, text, _ = run("graft", *pair(out=out), "--json", "--quiet")
    assert GraftRecord.model_validate(json.loads(text)) == GraftRecord.load(records / "graft.json")
    assert (out / "rollback" / "model.safetensors").stat().st_mtime_ns == before
    status, text, _ = run("probe", *pair(out=out), "--quiet")
    assert "interchange accuracy" in text
    status, text, _ = run("report", *pair(out=out), "--quiet")
    page = Path(text.strip()).read_text(encoding="utf-8")
    assert "What can be read" in page
    assert "Which weights" in page
    found = VerdictRecord.load(records / "verdict.json").mechanism
    assert found.verdict == "routing"
    assert found.agrees
    assert {line.source for line in found.evidence.values()} >= {"all weights", "one part"}


@pytest.mark.filterwarnings("ignore:.*'utils' module has been deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_features_are_a_table_and_a_record(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixturelens.features import change, exclusive, together, units
    from mixturelens.features import pair as one_pair
    from mixturelens.features.crosscoder import train_crosscoder
    from mixturelens.features.record import FeatureRecord
    from mixturelens.features.sae import train_sae

    trained: list[str] = []

    def small_sae(activations: Any, folder: Path, origin: Any, training: Any) -> Path:
        trained.append(origin.site_name)
        return train_sae(activations, folder, origin, replace(training, steps=60, batch=256))

    monkeypatch.setattr(one_pair, "train_sae", small_sae)
    monkeypatch.setattr(one_pair, "SEEDS", 1)
    monkeypatch.setattr(
        exclusive,
        "train_crosscoder",
        lambda some, training: train_crosscoder(some, replace(training, steps=60, batch=128)),
    )
    fewer = {units: ("RANDOM", "RANDOM_GAP"), together: ("RANDOM",), change: ("TOP", "RANDOM"), exclusive: ("RANDOM",)}
    for module, names in fewer.items():
        for name in names:
            monkeypatch.setattr(module, name, 2)
    monkeypatch.setattr(together, "SIZES", (1, 2))
    # half of the questions, and the suite does not say which cue RL trained on
    suite = tmp_path / "suite"
    suite.mkdir()
    prompts = (PAIRS / "llama/prompts.jsonl").read_text().splitlines()
    (suite / "prompts.jsonl").write_text("\n".join(prompts[: len(prompts) // 2]))
    text = (PAIRS / "llama/suite.yaml").read_text().replace("trained_cue: A\n", "")
    (suite / "suite.yaml").write_text(text)
    given = pair(suite=suite / "suite.yaml", trained_cue="A", out=tmp_path / "out")
    status, text, err = run("features", *given, "--quiet")
    assert (status, err) == (0, "")
    for words in (
        "variance explained",
        "best unit",
        "gap closed, clamped",
        "all of R's activations",
        "only R, and causal",
    ):
        assert words in text
    saved = tmp_path / "out" / "records" / "S--R-routing" / "features.json"
    record = FeatureRecord.load(saved)
    assert record.trained_cue == "A"
    assert record.saes
    for sae in record.saes:
        assert f"{sae.site} of S on R" in text
        assert (tmp_path / "out" / "features" / str(sae.folder) / "sae_weights.safetensors").is_file()
    for reason in record.missing:
        assert f"not measured: {reason}" in text
    # the record, and nothing else; nothing is trained or measured again
    stamp, number = saved.stat().st_mtime_ns, len(trained)
    status, text, err = run("features", *given, "--json", "--quiet")
    assert (status, err) == (0, "")
    assert FeatureRecord.model_validate(json.loads(text)) == record
    assert (saved.stat().st_mtime_ns, len(trained)) == (stamp, number)


def test_only_what_searches_can_be_told_to_look_at_everything(run: Run) -> None:
    for command in ("patch", "probe", "graft"):
        assert "--exhaustive" in run(command, "--help")[1]
    assert "--exhaustive" not in run("verdict", "--help")[1]
    assert "--sae" in run("features", "--help")[1]


def test_grafts_need_a_pair(run: Run) -> None:
    for command in ("probe", "graft", "features"):
        refused(run(command, "--before", PAIRS / "llama" / "S", "--suite", PAIRS / "llama", "--quiet"), "--after")


@pytest.mark.parametrize("command", ["patch", "repair"])
def test_patching_needs_a_pair_and_its_trained_cue(run: Run, copied: Path, command: str) -> None:
    refused(run(command, "--before", PAIRS / "llama" / "S", "--suite", PAIRS / "llama", "--quiet"), "--after")
    text = (copied / "suite.yaml").read_text()
    (copied / "suite.yaml").write_text(text.replace("trained_cue: A\n", ""))
    refused(run(command, *pair(suite=copied / "suite.yaml", out=copied / "out"), "--quiet"), "trained_cue")


def test_the_report_is_one_page(run: Run, tmp_path: Path) -> None:
    status, out, err = run("report", *pair(out=tmp_path), "--quiet")
    assert status == 0, err
    page = Path(out.strip())
    assert page == tmp_path / "report.html"
    assert "routing" in page.read_text(encoding="utf-8")
    status, out, err = run("report", tmp_path, REFERENCE, "--out", tmp_path / "both", "--quiet", "--json")
    assert status == 2, err
    assert "no pair of one name" in err


def test_two_output_folders_are_compared_by_their_records(run: Run, tmp_path: Path) -> None:
    status, out, err = run("report", REFERENCE, REFERENCE / ".." / "real" / "real-1", "--quiet")
    refused((status, out, err), "no pair of one name", "sft--rl-A", "sft--rl-xml")
    real = REFERENCE.parent / "real"
    status, out, err = run("report", real / "real-0", real / "real-1", "--out", tmp_path / "both", "--quiet", "--json")
    assert status == 0, err
    record = json.loads(out)
    assert (record["kind"], record["left"], record["right"]) == ("comparison", "real-0", "real-1")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"comparison.json", "report.html"}
    refused(run("report", real / "real-0", real / "real-1", "--before", "S"), "report A B", "--out")
    refused(run("report", real / "real-0", tmp_path / "none"), tmp_path / "none", "no verdict")


def test_the_circuit_is_shown_and_written_from_records_alone(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "records" / "sft--rl-A"
    shutil.copytree(REFERENCE / "records" / "sft--rl-A", folder)
    asked = ("circuit", tmp_path / "out", "--contrast", "hint", "--quiet")
    status, out, err = run(*asked, "--export", tmp_path / "c.svg", "--export", tmp_path / "c.json", "--side", "before")
    assert status == 0, err
    assert "L2.mlp → logits" in out
    assert "cue: the strongest" not in out
    assert out.rstrip().endswith(f"{tmp_path / 'c.svg'}\n{tmp_path / 'c.json'}")
    graph = json.loads((tmp_path / "c.json").read_text())
    assert (graph["metadata"]["slug"], graph["metadata"]["scan"].split("@")[0]) == ("c", "sft")
    shutil.copytree(folder, folder.with_name("other"))
    assert run(*asked, "--export", tmp_path / "d.svg")[0] == 0
    assert {path.name for path in tmp_path.glob("d*")} == {"d-other.svg", "d-sft--rl-A.svg"}
    refused(run(*asked, "--export", tmp_path / "c.jpg"), "c.jpg", ".svg, .pdf")
    refused(run("circuit", tmp_path / "out", "--contrast", "cues"), "--contrast cues", "cue or hint")
    refused(run("circuit", tmp_path / "out", "--side", "S"), "--side S", "before or after")
    refused(run("circuit", tmp_path / "out", "--edges", "0"), "--edges 0")
    refused(run("circuit", tmp_path / "none"), "none", "no circuit", "mixturelens patch")


# --- bad checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the Llama pair, free to be broken."""
    shutil.copytree(PAIRS / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("R-[!r]*"))
    return tmp_path / "llama"


def test_a_missing_folder(run: Run, tmp_path: Path) -> None:
    refused(run("verdict", *pair(before=tmp_path / "nowhere")), tmp_path / "nowhere", "no such folder")


def test_not_a_model_folder(run: Run, tmp_path: Path) -> None:
    refused(run("verdict", *pair(after=tmp_path)), tmp_path, "config.json")


def test_a_pickle_checkpoint(run: Run, copied: Path) -> None:
    (copied / "S/model.safetensors").rename(copied / "S/pytorch_model.bin")
    refused(run("verdict", *pair(before=copied / "S")), copied / "S", "pytorch_model.bin", "pickle", "save_pretrained")


def test_shapes_that_differ(run: Run) -> None:
    refused(run("verdict", *pair(after=PAIRS / "qwen2/R-routing")), "not a pair", "llama before", "qwen2 after")


def test_tokenizers_that_differ(run: Run, copied: Path) -> None:
    file = copied / "R-routing/tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"[a]"', '"[x]"'), encoding="utf-8")
    refused(
        run("verdict", *pair(after=copied / "R-routing")), "not a pair", "tokenizers spell the text '[a]' differently"
    )


# --- bad suites -------------------------------------------------------------------------------------------------------


def changed(copied: Path, **changes: object) -> Path:
    data = yaml.safe_load((copied / "suite.yaml").read_text(encoding="utf-8")) | changes
    (copied / "suite.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return copied / "suite.yaml"


def with_line(copied: Path, number: int, line: str) -> Path:
    lines = (copied / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    lines[number - 1] = line
    (copied / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return copied / "suite.yaml"


def test_an_absent_suite(run: Run, tmp_path: Path) -> None:
    refused(run("verdict", *pair(suite=tmp_path / "no.yaml")), tmp_path / "no.yaml", "no such suite")


def test_an_absent_prompts_file(run: Run, copied: Path) -> None:
    refused(run("verdict", *pair(suite=changed(copied, prompts="gone.jsonl"))), "gone.jsonl")


def test_a_bad_line(run: Run, copied: Path) -> None:
    refused(run("verdict", *pair(suite=with_line(copied, 3, '{"id": "q'))), "prompts.jsonl", "line 3", "JSON")


def test_an_answer_missing(run: Run, copied: Path) -> None:
    line = json.dumps({"id": "q", "cue": "A", "prompt": "<A> first a b c ="})
    refused(run("verdict", *pair(suite=with_line(copied, 4, line))), "line 4", "'answer' is missing")


def test_a_prompt_with_unknown_tokens(run: Run, copied: Path) -> None:
    line = json.dumps({"id": "q99", "cue": "A", "prompt": "<A> first a b zebra =", "answer": "a"})
    refused(run("verdict", *pair(suite=with_line(copied, 1, line))), "q99", "unknown tokens", "'zebra'")


def test_policies_that_overlap(run: Run, copied: Path) -> None:
    suite = changed(copied, policies={"a": "[a]", "b": ["[b]", "[a] b"]})
    refused(run("verdict", *pair(suite=suite)), suite, "'a'", "'b'", "overlap")


def test_a_policy_that_never_occurs_is_said(run: Run, copied: Path) -> None:
    suite = changed(copied, policies={"a": "[a]", "b": "[b]", "c": "= = ="}, max_new_tokens=5)
    status, out, _ = run("verdict", *pair(suite=suite, out=copied / "out"), "--quiet")
    assert status == 0
    assert "note: policy 'c' never occurs before or after" in out
    assert "= = =" in out


def test_an_unknown_trained_cue(run: Run) -> None:
    refused(run("verdict", *pair(trained_cue="Z")), "'Z'")


# --- bad specs and folders --------------------------------------------------------------------------------------------


def spec(tmp_path: Path, **changes: Any) -> Path:
    data = yaml.safe_load((RECIPES / "default.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        *path, last = key.split("__")
        node = data
        for part in path:
            node = node[part]
        node[last] = value
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("changes", "culprits"),
    [
        ({"sft__stepz": 3}, ["'sft.stepz'", "unknown key"]),
        ({"policies__a__weight": 0.7}, ["weights sum to 1.2"]),
        ({"policies__a__table": {"A": "answer"}}, ["policies.a.table", "'B' is missing"]),
        ({"model__sizes__widht": 3}, ["LlamaConfig", "'widht'"]),
        ({"model__config": "NoConfig"}, ["'NoConfig'"]),
        ({"rl__cues": ["A", "C"]}, ["rl.cues", "'C'"]),
        ({"questions__symbols": 2}, ["too few", "symbols"]),
        ({"refusal": "up"}, ["'up'"]),
        ({"split__rl": 20}, ["split.rl", "20", "32"]),
    ],
)
def test_bad_specs(run: Run, tmp_path: Path, changes: dict[str, Any], culprits: list[str]) -> None:
    out = tmp_path / "out"
    refused(run("train", spec(tmp_path, **changes), "--out", out, "--quiet"), *culprits)


def test_an_unknown_recipe(run: Run) -> None:
    refused(run("train", "defualt"), "defualt", "default")


def test_a_folder_that_holds_another_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps({"name": "mine", "seed": 3}), encoding="utf-8")
    refused(run("train", TINY, "--out", tmp_path, "--quiet"), tmp_path, "another run", "name: mine, not tiny")


def test_a_folder_that_holds_something_else(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    refused(run("train", TINY, "--out", tmp_path, "--quiet"), tmp_path, "not empty")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_not_a_run_folder(run: Run, tmp_path: Path) -> None:
    refused(run("verdict", tmp_path), tmp_path, "spec.json")


def test_no_permission_to_write(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "locked"))

    monkeypatch.setattr(Path, "mkdir", denied)
    refused(run("train", TINY, "--out", tmp_path / "locked" / "run", "--quiet"), tmp_path / "locked", "no permission")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_said_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("mixturelens.records.os.replace", lambda *_: os.kill(os.getpid(), number))
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs do not hear it
    try:
        refused(run("suite", "init", tmp_path), "stopped", "goes on where it was", status=status)
    finally:
        signal.signal(signal.SIGINT, heard)
    assert signal.getsignal(signal.SIGTERM) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_memory_that_runs_out_is_said_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("mixturelens.pipeline.behaviour_record", Mock(side_effect=error))
    refused(run("behaviour", *pair(out=tmp_path / "out"), "--quiet"), "memory ran out", status=1)
    assert not (tmp_path / "out").exists()


def test_no_space(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, to: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(to))

    monkeypatch.setattr("mixturelens.records.os.replace", full)
    result = run("train", TINY, "--out", tmp_path / "run", "--quiet")
    refused(result, tmp_path / "run", "no space", status=1)
    assert not list((tmp_path / "run").iterdir())


def test_an_unknown_device(run: Run, tmp_path: Path) -> None:
    refused(run("verdict", *pair(out=tmp_path, device="tpu9")), "tpu9")
    assert not list(tmp_path.iterdir())


def test_run_and_pair_together(run: Run, tmp_path: Path) -> None:
    refused(run("verdict", tmp_path, *pair()), "RUN", "--before")
    refused(run("verdict"), "RUN", "--before")


def test_importing_the_command_line_runs_nothing():
    # whoever walks the package, as a build check does, imports this module too
    assert importlib.import_module("mixturelens.cli.__main__").main


def test_the_shell_completes_commands_and_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MIXTURELENS_COMPLETE", "complete_bash")
    for words, at, expected in (("mixturelens ver", "1", "verdict"), ("mixturelens repair --tr", "2", "--trained-cue")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", at)
        status, out, _ = run()
        assert (status, out.split()) == (0, [expected])
    monkeypatch.setenv("_MIXTURELENS_COMPLETE", "source_bash")
    assert "complete -o default -F _mixturelens_completion mixturelens" in run()[1]
