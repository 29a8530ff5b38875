"""Any pair in, by the command line: adapters, ids of the hub, half precision; what is refused is one line and no file.

Stored records are given back only where nothing that they depend on has changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from mixturelens.behaviour.pair import behaviour_record
from mixturelens.models import Pair
from mixturelens.routing.verdict import VerdictRecord, judge
from mixturelens.suite import load_suite

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]

Run = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str], *culprits: object, out: Path) -> None:
    """Status 2, one line on standard error that names the culprits, and nothing anywhere else."""
    code, printed, err = result
    assert code == 2, err
    assert printed == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("mixturelens: ")
    for culprit in culprits:
        assert str(culprit) in lines[0], lines[0]
    assert not out.exists() or not [file for file in out.rglob("*") if file.is_file()]


# --- one pair in many forms -------------------------------------------------------------------------------------------


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


def store(folder: Path, weights: dict[str, torch.Tensor], name: str = WEIGHTS) -> None:
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / name, metadata={"format": "pt"})


def make_adapter(folder: Path, changes: dict[str, torch.Tensor], base: str | None) -> None:
    """An adapter whose products are these changes of weights exactly, by their singular values."""
    folder.mkdir()
    held = {}
    for name, change in changes.items():
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        empty = 32 - len(s)
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        held[f"{prefix}.lora_A.weight"] = torch.nn.functional.pad(v, (0, 0, 0, empty))
        held[f"{prefix}.lora_B.weight"] = torch.nn.functional.pad(u * s, (0, empty))
    store(folder, held, ADAPTER)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 32, "lora_alpha": 32, "target_modules": LINEAR}
    edit_json(folder / "adapter_config.json", **config, base_model_name_or_path=base)


def shard(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    names = {name: f"model-{1 + k % 3:05}-of-00003.safetensors" for k, name in enumerate(weights)}
    for file in set(names.values()):
        store(folder, {name: weight for name, weight in weights.items() if names[name] == file}, file)
    (folder / WEIGHTS).unlink()
    edit_json(folder / f"{WEIGHTS}.index.json", metadata={}, weight_map=names)


def write_suite(folder: Path, source: Path, questions: int = 8, **changes: str) -> None:
    """The first questions of a suite, with completions so short that all of them are listed."""
    folder.mkdir()
    lines = (source / "prompts.jsonl").read_text().splitlines()
    (folder / "prompts.jsonl").write_text("\n".join(lines[: 2 * questions]))
    text = (source / "suite.yaml").read_text().replace("max_new_tokens: 3", "max_new_tokens: 2")
    (folder / "suite.yaml").write_text(text + "".join(f"{key}: {value}\n" for key, value in changes.items()))


@pytest.fixture(scope="module")
def home(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """S and R as folders, R as adapter, and both as ids in a cache; nobody may change anything here."""
    home = tmp_path_factory.mktemp("sources")
    write_suite(home / "suite", pairs / "llama")
    shutil.copytree(pairs / "llama" / "S", home / "S")
    s, r = load_file(home / "S" / WEIGHTS), load_file(pairs / "llama" / "R-routing" / WEIGHTS)
    changes = {name: r[name] - s[name] for name in s if name.split(".")[-2] in LINEAR}
    shutil.copytree(home / "S", home / "R")
    store(home / "R", {name: s[name] + changes.get(name, 0) for name in s})
    make_adapter(home / "adapter", changes, "../S")
    make_adapter(home / "nameless", changes, None)
    make_adapter(home / "nothing", {name: torch.zeros_like(change) for name, change in changes.items()}, "../S")
    shard(Path(shutil.copytree(home / "R", home / "sharded")))
    for name, folder in (("sft", "S"), ("rl", "adapter")):
        model = home / "hub" / f"models--org--{name}"
        snapshot = Path(shutil.copytree(home / folder, model / "snapshots" / ("a" * 40)))
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("a" * 40)
        if (snapshot / ADAPTER).is_file():
            edit_json(snapshot / "adapter_config.json", base_model_name_or_path="org/sft")
    return home


@pytest.fixture(scope="module")
def reference(home: Path) -> VerdictRecord:
    record = judge(behaviour_record(Pair(home / "S", home / "R", load_suite(home / "suite"))))
    assert record.verdict == "routing"
    return record


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the hub is that of `home`; the hub's client has read its environment long ago."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """All of it, free to be broken."""
    return Path(shutil.copytree(home, tmp_path / "copied", ignore=shutil.ignore_patterns("hub")))


def given(home: Path, out: Path, before: object = "S", after: object = "R", **more: object) -> list[object]:
    """Arguments; names of folders are those of `home`, and whatever holds a slash is given as it is."""
    sides = [side if "/" in str(side) else home / str(side) for side in (before, after)]
    flags = [part for key, value in more.items() for part in (f"--{key.replace('_', '-')}", value)]
    return ["--before", sides[0], "--after", sides[1], "--suite", home / "suite", "--out", out, *flags, "--quiet"]


@pytest.mark.parametrize(
    ("before", "after", "more", "name"),
    [
        ("S", "adapter", {}, "S--adapter"),
        ("nothing", "adapter", {}, "nothing--adapter"),
        ("S", "nameless", {"base": "S"}, "S--nameless"),
        ("S", "sharded", {}, "S--sharded"),
        ("org/sft", "org/rl", {}, "org--sft--org--rl"),
        ("org/sft@main", "R", {}, "org--sft@main--R"),
        ("S", "nameless", {"base": "org/sft"}, "S--nameless"),
        ("S", "R", {"device_map": "auto"}, "S--R"),
        ("S", "adapter", {"device_map": "auto"}, "S--adapter"),
        ("S", "adapter", {"dtype": "bfloat16"}, "S--adapter"),
        ("S", "R", {"dtype": "float32"}, "S--R"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_one_pair_in_many_forms(
    run: Run,
    home: Path,
    tmp_path: Path,
    reference: VerdictRecord,
    before: str,
    after: str,
    more: dict[str, str],
    name: str,
) -> None:
    more = {key: str(home / value) if value == "S" else value for key, value in more.items()}
    status, text, err = run("verdict", *given(home, tmp_path / "out", before, after, **more), "--json")
    assert (status, err) == (0, "")
    record = json.loads(text)
    assert record["verdict"] == "routing"
    exact = more.get("dtype") != "bfloat16"
    assert record["routing_share"]["value"] == pytest.approx(reference.routing_share.value, abs=1e-5 if exact else 0.02)
    assert record["bits"]["routing"]["value"] == pytest.approx(
        reference.bits.routing.value, abs=1e-5 if exact else 0.02
    )
    assert record["provenance"]["dtype"] == more.get("dtype", "float32")
    saved = tmp_path / "out" / "records" / name
    assert json.loads((saved / "verdict.json").read_text()) == record
    assert (saved / "behaviour.json").is_file()


def test_what_may_matter_is_said(run: Run, copied: Path, tmp_path: Path) -> None:
    """On standard error while it is measured, and in the record ever after."""
    edit_json(copied / "R" / "generation_config.json", eos_token_id=[1, 0])
    arguments = given(copied, tmp_path / "out")[:-1]
    status, text, err = run("verdict", *arguments, "--json")
    assert status == 0
    assert "end tokens differ (<eos> (1) before" in " ".join(err.split())
    (note,) = json.loads(text)["notes"]
    assert note.startswith("end tokens differ (<eos> (1) before, <eos> (1), <pad> (0) after)")
    assert "`ends:` chooses" in note


def test_a_checkpoint_by_its_place(run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home / "S")
    arguments = ["--before", ".", "--after", "../R/", "--suite", "../suite/suite.yaml", "--out", tmp_path / "out here"]
    status, _, err = run("verdict", *arguments, "--quiet")
    assert (status, err) == (0, "")
    assert (tmp_path / "out here" / "records" / "S--R" / "verdict.json").is_file()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hub")
def test_sources_that_are_not_there(run: Run, home: Path, copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for side in ("before", "after"):
        refused(
            run("verdict", *given(home, out, **{side: "org/absent"})),
            "org/absent: no such folder, and no such model in the cache of the hub",
            "HF_HUB_OFFLINE",
            out=out,
        )
    refused(run("verdict", *given(home, out, after="org/rl:gone")), "no folder 'gone'", out=out)
    refused(run("verdict", *given(home, out, after="nameless")), home / "nameless", "adapter", "--base", out=out)
    edit_json(copied / "adapter" / "adapter_config.json", base_model_name_or_path="org/absent")
    refused(run("verdict", *given(copied, out, after="adapter")), copied / "adapter", "'org/absent'", "--base", out=out)
    refused(run("verdict", *given(home, out, base=home / "S")), "--base", "neither checkpoint is an adapter", out=out)
    refused(run("verdict", *given(home, out, after="nameless", base="org/none")), "org/none", "no such model", out=out)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_adapters_that_do_not_fit(run: Run, home: Path, copied: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # a base of another shape: S's own, with narrower layers
    config = json.loads((copied / "S" / "config.json").read_text())
    weights = load_file(copied / "S" / WEIGHTS)
    narrow = {name: w[:, :40] if "down_proj" in name else w[:40] for name, w in weights.items() if "mlp" in name}
    shutil.copytree(copied / "S", copied / "narrow")
    store(copied / "narrow", weights | narrow)
    (copied / "narrow" / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    for before in ("narrow", "nothing"):
        arguments = given(copied, out, before=before, after="nameless", base=copied / "narrow")
        refused(run("verdict", *arguments), "does not fit its base", copied / "narrow", out=out)
    refused(
        run("verdict", *given(home, out, after="nameless", base=pairs / "gpt2" / "S")),
        "llama before, and gpt2",
        out=out,
    )
    adapter = copied / "adapter"
    for modules, words in (
        (["c_attn"], ["does not fit its base", "c_attn"]),
        (["q_proj"], ["the adapter has base_model.model.", "lora_A"]),
        ([*LINEAR, "embed_tokens"], ["the adapter lacks base_model.model.", "embed_tokens"]),
    ):
        edit_json(adapter / "adapter_config.json", target_modules=modules)
        refused(run("verdict", *given(copied, out, after="adapter")), adapter, *words, out=out)
    edit_json(adapter / "adapter_config.json", target_modules=LINEAR, peft_type="IA3")
    refused(run("verdict", *given(copied, out, after="adapter")), adapter, "type IA3", "merge it", out=out)
    edit_json(adapter / "adapter_config.json", peft_type="LORA")
    (adapter / ADAPTER).rename(adapter / "adapter_model.bin")
    refused(run("verdict", *given(copied, out, after="adapter")), adapter, "adapter_model.bin is a pickle", out=out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, ["quantised (awq)", "save it dequantised"]),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, ["auto_map", "never run", "save it again"]),
        ({"model_type": "martian"}, ["describes no model that transformers knows"]),
        ({"hidden_act": "wiggle"}, ["wiggle"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
    ],
)
def test_configs_that_cannot_be_used(
    run: Run, copied: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    out = tmp_path / "out"
    edit_json(copied / "R" / "config.json", **changes)
    refused(run("verdict", *given(copied, out)), copied / "R", *words, out=out)
    shutil.rmtree(copied / "S")
    shutil.move(copied / "R", copied / "S")  # the base of an adapter
    refused(run("verdict", *given(copied, out, before="sharded", after="adapter")), copied, *words, out=out)


def test_weights_that_are_no_numbers(run: Run, copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, file in (("R", WEIGHTS), ("adapter", ADAPTER)):
        weights = load_file(copied / name / file)
        next(w for key, w in weights.items() if "lm_head" in key)[2, 1] = float("nan")
        store(copied / name, weights, file)
        refused(run("verdict", *given(copied, out, after=name)), copied / name, "lm_head", "NaN", out=out)


def test_end_tokens_that_nobody_names(run: Run, copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for folder in ("S", "R"):
        for name in ("config.json", "generation_config.json"):
            edit_json(copied / folder / name, eos_token_id=None)
        edit_json(copied / folder / "tokenizer_config.json", eos_token=None)
    refused(run("verdict", *given(copied, out)), copied / "S", "end-of-text", "eos_token_id", "`ends`", out=out)


def test_vocabularies_that_differ_on_the_suites_words(run: Run, copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = copied / "R" / "tokenizer.json"
    original = json.loads(file.read_text())
    for words, culprits in ((("<A>", "<B>"), ["'q00'", "'<A>'"]), (("sorry", "[a]"), ["the text '[a]'"])):
        vocabulary = dict(original["model"]["vocab"])
        vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
        file.write_text(json.dumps(original | {"model": original["model"] | {"vocab": vocabulary}}))
        refused(run("verdict", *given(copied, out)), "are not a pair", "tokenizers spell", *culprits, out=out)


def test_hooks_need_a_model_on_one_device(run: Run, home: Path, tmp_path: Path) -> None:
    """Refused before anything is measured."""
    out = tmp_path / "out"
    for command in ("patch", "probe", "graft", "repair"):
        result = run(command, *given(home, out, device_map="auto"))
        refused(result, "--device-map", "give --device instead", out=out)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "-1"], ["--seed -1"]),
        (["--seed", str(2**70)], [f"--seed {2**70}"]),
        (["--device", "gpu"], ["--device gpu"]),
        (["--device", "cuda:7"], ["--device cuda:7"]),
        (["--device", "meta"], ["--device meta", "nothing is computed there"]),
        (["--device", ""], ["--device"]),
        (["--device-map", "everywhere"], ["--device-map", "everywhere"]),
        (["--dtype", "float8"], ["dtype 'float8'", "bfloat16"]),
        (["--dtype", ""], ["dtype ''"]),
        (["--trained-cue", ""], ["the trained cue ''"]),
        (["--trained-cue", "nowhere"], ["the trained cue 'nowhere'"]),
        (["--base", ""], ["--base"]),
    ],
)
def test_flags_that_cannot_be(run: Run, home: Path, tmp_path: Path, flags: list[str], words: list[str]) -> None:
    refused(run("verdict", *given(home, tmp_path / "out"), *flags), *words, out=tmp_path / "out")


def test_a_run_brings_its_own_checkpoints(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for flag, value in (("--base", "org/sft"), ("--device-map", "auto"), ("--out", str(out))):
        refused(run("verdict", tmp_path, flag, value), flag, "leave", "out", out=out)


# --- stored records ---------------------------------------------------------------------------------------------------


def edit_tokenizers(copied: Path, **changes: object) -> None:
    for name in ("S", "R"):
        edit_json(copied / name / "tokenizer.json", **changes)


def processed(start: bool) -> dict[str, object]:
    """A post-processor that puts an end in front of every text, or does not."""
    single = [{"SpecialToken": {"id": "<eos>", "type_id": 0}}] * start + [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def templates(copied: Path, text: str) -> None:
    for name in ("S", "R"):
        (copied / name / "chat_template.jinja").write_text(text)


def ends(copied: Path, ids: object) -> None:
    for name in ("S", "R"):
        edit_json(copied / name / "generation_config.json", eos_token_id=ids)


def rope(copied: Path, theta: float) -> None:
    edit_json(copied / "R" / "config.json", rope_parameters={"rope_type": "default", "rope_theta": theta})


CONTENT = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
STALE: dict[str, tuple[Callable[[Path, Any], None], Any, Any]] = {
    "chat template": (templates, f"last {CONTENT}", CONTENT),
    "end tokens": (ends, [1, 7], 1),
    "rope in the config": (rope, 30.0, 10000.0),
    "post-processor": (lambda c, start: edit_tokenizers(c, post_processor=processed(start)), True, False),
}


@pytest.mark.parametrize("what", STALE)
def test_a_second_run_after_a_change_measures_anew(run: Run, copied: Path, tmp_path: Path, what: str) -> None:
    change, first, second = STALE[what]
    if what == "chat template":
        with (copied / "suite" / "suite.yaml").open("a") as file:
            file.write("chat: {}\n")
    found = []
    for value, out in ((first, "kept"), (second, "kept"), (second, "fresh")):
        change(copied, value)
        status, text, err = run("verdict", *given(copied, tmp_path / out), "--json")
        assert (status, err) == (0, "")
        found.append(json.loads(text))
    old, again, fresh = found
    assert again == fresh
    assert old["provenance"] != again["provenance"]
    assert old["bits"] != again["bits"]
    # and when nothing changed, nothing is measured
    file = tmp_path / "kept" / "records" / "S--R" / "behaviour.json"
    stamp = file.stat().st_mtime_ns
    assert json.loads(run("verdict", *given(copied, tmp_path / "kept"), "--json")[1]) == again
    assert file.stat().st_mtime_ns == stamp


def test_a_record_of_an_adapter_is_about_its_base_too(run: Run, copied: Path, tmp_path: Path) -> None:
    def measured(**more: object) -> dict[str, Any]:
        status, text, err = run("verdict", *given(copied, tmp_path / "out", after="adapter", **more), "--json")
        assert (status, err) == (0, "")
        return json.loads(text)

    first = measured()
    weights = load_file(copied / "S" / WEIGHTS)
    store(copied / "S", weights | {"lm_head.weight": weights["lm_head.weight"] * 0.9})
    second = measured()
    assert first["bits"] != second["bits"]
    assert first["provenance"]["before"] != second["provenance"]["before"]
    assert first["provenance"]["after"] != second["provenance"]["after"]
    half = measured(dtype="bfloat16")
    assert half["provenance"] == second["provenance"] | {"dtype": "bfloat16"}
    assert half["bits"] != second["bits"]


# --- instruments ------------------------------------------------------------------------------------------------------


def near(seen: Any, expected: Any, slack: float, where: str = "record") -> None:
    """Two records say the same; names of folders aside."""
    if isinstance(expected, dict):
        assert seen.keys() == expected.keys(), where
        for key in expected.keys() - {"provenance", "checkpoint", "saved"}:
            near(seen[key], expected[key], slack, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(seen) == len(expected), where
        for number, (one, other) in enumerate(zip(seen, expected, strict=True)):
            near(one, other, slack, f"{where}.{number}")
    elif isinstance(expected, float):
        assert seen == pytest.approx(expected, abs=slack, rel=slack), where
    else:
        assert seen == expected, where


@pytest.mark.slow
def test_instruments_on_an_adapter_say_what_they_say_on_folders(
    run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixturelens.routing import repair

    monkeypatch.setattr(repair, "RANDOM", 2)
    monkeypatch.setattr(repair, "DIRECTIONS", 1)
    for command in ("patch", "probe", "graft", "repair"):
        records = []
        for after in ("R", "adapter"):
            status, text, err = run(command, *given(home, tmp_path / after, after=after), "--json")
            assert (status, err) == (0, ""), (command, after)
            records.append(json.loads(text))
        near(records[1], records[0], 2e-3)
    verdicts = {}
    for made in ("rollback", "repaired"):  # plain checkpoints, which can be measured in their turn
        folder = tmp_path / "adapter" / made
        assert (folder / WEIGHTS).is_file()
        status, text, err = run("verdict", *given(home, tmp_path / "again", after=folder), "--json")
        assert (status, err) == (0, "")
        verdicts[made] = json.loads(text)["verdict"]
    assert verdicts["rollback"] == "neither"
    assert verdicts["repaired"] != "neither"


@pytest.mark.slow
def test_instruments_in_half_precision(run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixturelens.routing import repair

    monkeypatch.setattr(repair, "RANDOM", 2)
    monkeypatch.setattr(repair, "DIRECTIONS", 1)
    for command in ("patch", "probe", "graft", "repair"):
        status, text, err = run(command, *given(home, tmp_path / "out", after="adapter", dtype="bfloat16"), "--json")
        assert (status, err) == (0, ""), command
        assert json.loads(text)["provenance"]["dtype"] == "bfloat16"
