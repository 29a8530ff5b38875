"""Valid files of every kind that mixturelens reads, what reads each, and ways to spoil one."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import yaml

HERE = Path(__file__).parent
PAIRS, RECORDS = HERE / "pairs", HERE.parent / "artifacts" / "reference"

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        " ",
        "x",
        "\x1b[31m",
        "\ud800",
        "\u202e",
        "\0",
        "a\nb",
        "a" * 5000,
        "..",
        "../x",
        "/dev/zero",
        "(",
        "(a|aa)+$",
    ),
    *("{% for i in range(10**9) %}x{% endfor %}", "{{ 9 ** 9 ** 9 }}", "{{ messages[0].content.center(10**11) }}"),
    *([], {}, [[]], [None], {"a": {}}, {"": ""}, list(range(300)), [{"role": "user", "content": "x"}], ["x", "x"]),
    functools.reduce(lambda inside, _: [inside], range(90), 0),
)
SNIPPETS = (
    *("\0", "\ufeff", "\x1b", "\t", "\u2028", "{", "}", "[", "]", ":", ",", '"', "'", "\\", "\n---\n", "\n...\n"),
    *(
        "*a",
        "&a [*a]",
        "<<: *a",
        "<<: {a: 1}",
        "? [a]",
        "!!python/object/apply:os.system ['x']",
        "!!float {}",
        "!!int []",
    ),
    *("!!binary x", "!!set {x}", "!!timestamp 2001-13-99", "1:1:1:1.5", "0x_", "%YAML 9.9\n", ".nan", "1e999", "NaN"),
    *(
        "-Infinity",
        "9" * 5000,
        "[" * 500,
        "{a: " * 500,
        "\\ud800",
        "{% while %}",
        "{{ x.__class__ }}",
        "{%- macro m() %}",
    ),
)
NAMES = (
    "",
    "x",
    "auto_map",
    "__class__",
    "quantization_config",
    "num_hidden_layers",
    "chat_template",
    "regex",
    "table",
)


INSPECT = ModuleType("inspect_ai")
"""Stands for what need not be installed to write a task of it."""
INSPECT.__spec__ = ModuleSpec("inspect_ai", None)


class Kind(NamedTuple):
    """A file inside a folder of valid ones; `read` reads the folder, and says whether what it got is sensible."""

    make: Callable[[Path], None]
    file: str
    read: Callable[[Path], bool]


# --- readers ----------------------------------------------------------------------------------------------------------


def _suite(folder: Path) -> bool:
    from mixturelens.suite import load_suite
    from mixturelens.suite_check import check_suite_file, pitfalls, uneven

    _, problems = check_suite_file(folder / "suite.yaml")
    suite = load_suite(folder / "suite.yaml")
    assert not problems, "load_suite takes what the check refuses"
    list(pitfalls(suite))
    list(uneven(folder / "suite.yaml"))
    label = suite.label("okay, aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", suite.prompts[0])
    suite.correct(label.rest, suite.prompts[0])
    kept = folder.parent / "kept"
    suite.save(kept / "suite.yaml")
    again = load_suite(kept / "suite.yaml")
    shutil.rmtree(kept)
    return again == suite and suite.samples > 0 and suite.max_new_tokens > 0


def _asked(folder: Path) -> bool:
    from mixturelens.discovery.asked import read_prompts

    return len(read_prompts(folder / "prompts.jsonl").prompts) > 0


def _spec(folder: Path) -> bool:
    from mixturelens.lab.organism import build_suite, load_spec, parse_spec

    spec = load_spec(folder / "spec.yaml")
    again = parse_spec(json.loads(spec.model_dump_json()), "again")
    return again == spec and len(build_suite(spec).prompts) > 0


def _run(folder: Path) -> bool:
    from mixturelens.lab import runs

    return runs.load_run(folder).rl.learning_rate < 100


def _grid(folder: Path) -> bool:
    from mixturelens.lab.sweep.grid import cells_of, load_grid

    file = folder / "grid.yaml"
    cells = cells_of(load_grid(file), file)
    return all((cell.spec is None) == bool(cell.error) and "\n" not in cell.error for cell in cells)


def _record(folder: Path) -> bool:
    from mixturelens.behaviour.record import BehaviourRecord
    from mixturelens.behaviour.trajectory import Trajectory
    from mixturelens.patching.record import PatchingRecord
    from mixturelens.routing.circuit import CircuitRecord
    from mixturelens.routing.verdict import VerdictRecord

    kinds = (BehaviourRecord, CircuitRecord, PatchingRecord, VerdictRecord, Trajectory)
    files = [folder / f"{'sft' if kind is Trajectory else kind.KIND}.json" for kind in kinds]
    there = [at for at, file in enumerate(files) if os.path.lexists(file)] or [0]
    kind, file = kinds[there[0]], files[there[0]]
    return bool(json.loads(kind.load(file).to_json()))


def _completions(folder: Path) -> bool:
    from mixturelens.completions import with_completions
    from mixturelens.suite import load_suite

    file = next((name for name in ("log.json", "c.jsonl") if os.path.lexists(folder / name)), "c.jsonl")
    suite, given = with_completions(load_suite(PAIRS / "chat"), [str(folder / file)])
    return given is not None and bool(given.digest) and suite.samples >= 2


def _export(folder: Path) -> bool:
    """As `circuit FOLDER --export` does, from the records alone."""
    from mixturelens.cli import circuit
    from mixturelens.cli.core import Given

    kept = folder.parent / "kept"
    files = [kept / f"circuit{kind}" for kind in (".svg", ".json")]
    found = circuit.circuits_given(Given(run=folder), {})
    written = circuit.export_circuits(found, circuit.asked(files, None, 40, "after"))
    sizes = [file.stat().st_size for file in written]
    shutil.rmtree(kept)
    return len(sizes) == 2 and all(sizes)


def _compared(folder: Path) -> bool:
    """As `report A B` does."""
    from mixturelens.pipeline import compare

    kept = folder.parent / "kept"
    record, page = compare(folder / "A", folder / "B", kept)
    found = len(record.pairs) == 1 and page.is_file()
    shutil.rmtree(kept)
    return found


def _inspect(folder: Path) -> bool:
    """As `suite export --inspect` does where Inspect is installed."""
    from mixturelens.inspect_task import write_inspect_task
    from mixturelens.suite import load_suite

    kept = folder.parent / "kept"
    with mock.patch.dict(sys.modules, inspect_ai=INSPECT):
        write_inspect_task(load_suite(folder / "suite.yaml"), kept)
    samples = [json.loads(line) for line in (kept / "dataset.jsonl").read_text().split("\n") if line]
    again = load_suite(kept / "suite.yaml")
    shutil.rmtree(kept)
    return len(samples) == len(again.neutral) > 0


def _sae(folder: Path) -> bool:
    from mixturelens.features.saved import read_sae

    return read_sae(folder).dictionary is not None


def _pair(folder: Path) -> bool:
    """All but the weights, which `_weights` reads."""
    from mixturelens.models import Pair
    from mixturelens.suite import load_suite

    pair = Pair(folder, None, load_suite(PAIRS / "chat"), base=PAIRS / "llama" / "S" if _adapts(folder) else None)
    return pair.vocabulary > 0 and bool(pair.ends) and len(pair.differences) >= 0


def _adapts(folder: Path) -> bool:
    return os.path.lexists(folder / "adapter_config.json")


def _weights(folder: Path) -> bool:
    from mixturelens.models import load_model

    return bool(load_model(folder).dtype)


def _adapter(folder: Path) -> bool:
    from mixturelens.models.load import load_model
    from mixturelens.models.source import find_source

    return all(p.isfinite().all() for p in load_model(find_source(folder, PAIRS / "llama" / "S")).parameters())


# --- valid files ------------------------------------------------------------------------------------------------------


def _copy(source: Path, *names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names or [file.name for file in source.iterdir() if file.is_file()]:
            shutil.copy(source / name, folder / name)

    return make


def make_completions(folder: Path) -> None:
    """Two of each side at each prompt of two questions."""
    lines = [
        {"id": row["id"], "cue": row["cue"], "side": side, "text": f"okay, {row['answer']}", "ended": number == 1}
        for row in _asked_rows()
        for side in ("before", "after")
        for number in range(2)
    ]
    (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_log(folder: Path) -> None:
    """The same as Inspect writes it."""
    samples = [
        {
            "id": f"{row['id']}/{row['cue']}",
            "epoch": epoch,
            "input": row["messages"] if epoch == 1 else row["messages"][-1]["content"],
            "metadata": {"id": row["id"], "cue": row["cue"], "side": side},
            "output": {"choices": [{"message": {"role": "assistant", "content": said}, "stop_reason": "stop"}]},
        }
        for row in _asked_rows()
        for side in ("before", "after")
        for epoch, said in ((1, f"okay, {row['answer']}"), (2, [{"type": "text", "text": "no"}]))
    ]
    (folder / "log.json").write_text(json.dumps({"version": 2, "status": "success", "eval": {}, "samples": samples}))


def _asked_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PAIRS / "chat" / "prompts.jsonl").read_text().splitlines()[:4]]


def _measured(*names: str, under: str = "") -> Callable[[Path], None]:
    """Records of the reference as an output folder holds them, without a spec; `under`: or two such folders."""

    def make(folder: Path) -> None:
        for side in under or ".":
            at = folder / side / "records" / _MEASURED.name
            at.mkdir(parents=True)
            for name in names:
                shutil.copy(_MEASURED / name, at / name)

    return make


def _make_grid(folder: Path) -> None:
    data = {"recipe": ["default", "spec.yaml"], "set": {"rl.steps": [2, 4], "m": {"x": {"hints": None}}}, "seeds": 2}
    (folder / "grid.yaml").write_text(yaml.safe_dump(data))
    _make_spec(folder)


def _make_spec(folder: Path) -> None:
    from mixturelens.lab.organism import load_spec

    spec = load_spec("default").model_dump(mode="json")
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec | {"phases": {"later": {"cues": ["A"]}}}))


def _make_shards(folder: Path) -> None:
    _copy(PAIRS / "llama" / "S")(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = json.loads(_header(folder / "model-00001-of-00001.safetensors"))
    weights = {name: "model-00001-of-00001.safetensors" for name in names if name != "__metadata__"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def make_adapter(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "nowhere/at-all"}))
    at = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {at.format(layer, side): (2, 32)[:: 1 if side == "A" else -1] for layer in range(2) for side in "AB"}
    save_file({k: np.full(v, 0.1, np.float32) for k, v in shapes.items()}, folder / "adapter_model.safetensors")


def _make_sae(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    config = {"architecture": "standard", "d_in": 4, "d_sae": 6, "metadata": {"hook_name": "blocks.0.hook_resid_post"}}
    (folder / "cfg.json").write_text(json.dumps(config))
    shapes = {"W_enc": (4, 6), "W_dec": (6, 4), "b_enc": (6,), "b_dec": (4,)}
    save_file({k: np.ones(v, np.float32) for k, v in shapes.items()}, folder / "sae_weights.safetensors")


def _header(file: Path) -> str:
    content = file.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")].decode()


CHAT, LLAMA = PAIRS / "chat" / "S", PAIRS / "llama" / "S"
_MEASURED = RECORDS / "records" / "sft--rl-A"
_AT = f"records/{_MEASURED.name}"
KINDS = (
    Kind(_copy(PAIRS / "llama", "suite.yaml", "prompts.jsonl"), "suite.yaml", _suite),
    Kind(_copy(PAIRS / "chat", "suite.yaml", "prompts.jsonl"), "suite.yaml", _suite),
    Kind(_copy(PAIRS / "chat", "suite.yaml", "prompts.jsonl"), "prompts.jsonl", _suite),
    Kind(_copy(PAIRS / "chat", "prompts.jsonl"), "prompts.jsonl", _asked),
    Kind(_make_spec, "spec.yaml", _spec),
    Kind(_copy(RECORDS, "spec.json"), "spec.json", _run),
    Kind(_make_grid, "grid.yaml", _grid),
    Kind(_copy(_MEASURED, "verdict.json"), "verdict.json", _record),
    Kind(_copy(_MEASURED, "behaviour.json"), "behaviour.json", _record),
    Kind(_copy(_MEASURED, "patching.json"), "patching.json", _record),
    Kind(_copy(_MEASURED, "circuit.json"), "circuit.json", _record),
    Kind(_copy(RECORDS / "trajectory", "sft.json"), "sft.json", _record),
    Kind(make_completions, "c.jsonl", _completions),
    Kind(make_log, "log.json", _completions),
    *(Kind(_measured("circuit.json", "patching.json"), f"{_AT}/{n}.json", _export) for n in ("circuit", "patching")),
    *(
        Kind(_measured("verdict.json", "behaviour.json", under="AB"), f"B/{_AT}/{name}.json", _compared)
        for name in ("verdict", "behaviour")
    ),
    Kind(_copy(PAIRS / "chat", "suite.yaml", "prompts.jsonl"), "suite.yaml", _inspect),
    Kind(_make_sae, "cfg.json", _sae),
    Kind(_make_sae, "sae_weights.safetensors", _sae),
    Kind(_copy(CHAT), "config.json", _pair),
    Kind(_copy(CHAT), "generation_config.json", _pair),
    Kind(_copy(CHAT), "tokenizer.json", _pair),
    Kind(_copy(CHAT), "tokenizer_config.json", _pair),
    Kind(_copy(CHAT), "chat_template.jinja", _pair),
    Kind(_copy(LLAMA), "config.json", _weights),
    Kind(_copy(LLAMA), "model.safetensors", _weights),
    Kind(_make_shards, "model.safetensors.index.json", _weights),
    Kind(make_adapter, "adapter_config.json", _adapter),
    Kind(make_adapter, "adapter_model.safetensors", _adapter),
)


# --- ways to spoil one ------------------------------------------------------------------------------------------------


def spoil(file: Path, pick: Callable[[int], int]) -> None:
    """Spoil a file; `pick(n)` draws a number below n."""
    how = pick(12)
    if how == 0:
        return _spoil_place(file, pick)
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header, rest = content[8 : 8 + length].decode(), content[8 + length :]
        text = json.dumps(_spoiled(json.loads(header), pick)) if how < 8 else _cut(header, pick)
        new = text.encode("utf-8", "surrogatepass")
        said = len(new) if pick(4) else (0, 1, 2**31, 2**63)[pick(4)]
        file.write_bytes(said.to_bytes(8, "little") + new + (rest if pick(4) else rest[: pick(len(rest) + 1)]))
        return None
    text = content.decode()
    if how < 8 and file.suffix in (".json", ".jsonl", ".yaml"):
        lines = text.splitlines() if file.suffix == ".jsonl" else [text]
        at = pick(len(lines))
        lines[at] = _written(_spoiled(_read(lines[at], file.suffix), pick), file.suffix, pick)
        text = "\n".join(lines)
    else:
        text = _cut(text, pick)
    new = text.encode("utf-8", "surrogatepass")
    file.write_bytes(
        text.encode("utf-16", "surrogatepass") if pick(60) == 1 else b"\xff" + new if pick(60) == 1 else new
    )
    return None


def _read(text: str, suffix: str) -> Any:
    return yaml.safe_load(text) if suffix == ".yaml" else json.loads(text)


def _written(data: Any, suffix: str, pick: Callable[[int], int]) -> str:
    if suffix == ".yaml" and pick(2):
        return str(yaml.safe_dump(data, allow_unicode=bool(pick(2))))
    return json.dumps(data)  # which is YAML, too, but for numbers that are none


def _places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = data.items() if isinstance(data, dict) else enumerate(data[:20]) if isinstance(data, list) else ()
    for key, value in inside:
        yield (*at, key)
        yield from _places(value, (*at, key))


def _spoiled(data: Any, pick: Callable[[int], int]) -> Any:
    for _ in range(1 + pick(3)):
        places = list(_places(data))
        if not places:
            return copy.deepcopy(VALUES[pick(len(VALUES))])
        top = [place for place in places if len(place) <= 1 + pick(3)]
        *path, last = (top or places)[pick(len(top or places))]
        holder = functools.reduce(lambda inside, key: inside[key], path, data)
        how = pick(8)
        if how == 0:
            del holder[last]
        elif how == 1 and isinstance(holder, dict):
            holder[NAMES[pick(len(NAMES))]] = holder.pop(last)
        elif how == 2 and isinstance(holder, dict):
            holder[NAMES[pick(len(NAMES))]] = copy.deepcopy(VALUES[pick(len(VALUES))])
        elif how == 3:
            other = places[pick(len(places))]
            holder[last] = copy.deepcopy(functools.reduce(lambda inside, key: inside[key], other, data))
        else:
            holder[last] = copy.deepcopy(VALUES[pick(len(VALUES))])
    return data


def _cut(text: str, pick: Callable[[int], int]) -> str:
    at, to = sorted((pick(len(text) + 1), pick(len(text) + 1)))
    how = pick(5)
    if how == 0:
        return text[:at]
    if how == 1:
        return text[:at] + text[to:]
    if how == 2:
        return text[:to] + text[at:]  # a piece twice
    return text[:at] + SNIPPETS[pick(len(SNIPPETS))] + text[at:]


def _spoil_place(file: Path, pick: Callable[[int], int]) -> None:
    """Put something else where the file was."""
    content = file.read_bytes()
    file.unlink()
    how = pick(9)
    if how == 0:
        os.mkfifo(file)
    elif how == 1:
        file.mkdir()
    elif how == 2:
        file.symlink_to("/dev/zero")
    elif how == 3:
        file.symlink_to(file.name)  # itself
    elif how == 4:
        file.symlink_to("nowhere")
    elif how == 5:
        file.symlink_to(HERE / "conftest.py")
    elif how == 6:
        file.write_bytes(b"")
    elif how == 7:
        file.write_bytes(content)
        os.truncate(file, 1 << 40)  # holes, which take no room
