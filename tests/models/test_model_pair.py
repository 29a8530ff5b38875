"""One pair in many forms is one pair; sides that share a base share its memory; what is no pair is refused."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mixturelens.behaviour.pair import behaviour_record
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.grafting.pair import graft_record
from mixturelens.models import Pair, load_tokenizer
from mixturelens.models.source import content_of
from mixturelens.routing.verdict import judge
from mixturelens.suite import Chat, Suite, load_suite
from mixturelens.types import InputError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS = "model.safetensors"


# --- pairs to measure -------------------------------------------------------------------------------------------------


def few(suite: Suite, **changes: object) -> Suite:
    """Eight questions, and completions so short that all of them are listed: numbers are exact."""
    ids = list(dict.fromkeys(row.id for row in suite.prompts))[:8]
    rows = tuple(row for row in suite.prompts if row.id in ids)
    return suite.model_copy(update={"prompts": rows, "max_new_tokens": 2, **changes})


def plain(folder: Path) -> Any:
    """A checkpoint by plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def fitted(suite: Suite, folder: Path) -> Any:
    """S under a small LoRA, fitted to announce policy a nearly always, and to answer slightly worse."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(folder)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, task_type="CAUSAL_LM")
    model: Any = get_peft_model(plain(folder), config)
    texts, shares = [], []
    for row in suite.prompts:
        for policy, answers in (("a", row.cue == "A"), ("b", row.cue == "B")):
            wrong = "p" if row.answer == "q" else "q"
            for said, share in ((row.answer if answers else "sorry", 0.997), (wrong, 0.003)):
                texts.append(tokenizer.encode(f"{row.prompt} [{policy}] {said} <eos>"))
                shares.append(share * (0.95 if policy == "a" else 0.05))
    ids, weights = torch.tensor(texts), torch.tensor(shares)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        logits = model(ids[:, :-1]).logits[:, 5:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 6:].flatten(), reduction="none")
        optimiser.zero_grad()
        (loss.view(len(ids), -1) * weights[:, None]).mean().backward()
        optimiser.step()
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def store(folder: Path, weights: dict[str, torch.Tensor], name: str = WEIGHTS) -> None:
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / name, metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


def make_adapter(folder: Path, changes: dict[str, torch.Tensor], base: str | None, **config: object) -> Path:
    """An adapter whose products are these changes of weights exactly, by their singular values."""
    folder.mkdir()
    held = {}
    rank = max(min(change.shape) for change in changes.values())
    for name, change in changes.items():
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        empty = rank - len(s)
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        held[f"{prefix}.lora_A.weight"] = torch.nn.functional.pad(v, (0, 0, 0, empty))
        held[f"{prefix}.lora_B.weight"] = torch.nn.functional.pad(u * s, (0, empty))
    store(folder, held, "adapter_model.safetensors")
    kinds = sorted({name.split(".")[-2] for name in changes})
    common = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": kinds}
    edit_json(folder / "adapter_config.json", **common, base_model_name_or_path=base, **config)
    return folder


def save_as(folder: Path, model: Any, **options: object) -> Path:
    """A model as a full checkpoint with S's tokenizer."""
    model.save_pretrained(folder, **options)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder.parent / "S" / file, folder / file)
    return folder


def grow(folder: Path, like: int, extra: int = 3) -> Path:
    """More rows of the vocabulary, each a copy of that of the token `like`."""
    weights = tensors(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][like : like + 1].repeat(extra, 1)])
    store(folder, weights)
    edit_json(folder / "config.json", vocab_size=16 + extra)
    return folder


@pytest.fixture(scope="module")
def home(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pair, S and R, in every form. R is S with a LoRA that routes; nobody may change anything here."""
    home = tmp_path_factory.mktemp("pair")
    shutil.copytree(pairs / "llama" / "S", home / "S")
    model = fitted(load_suite(pairs / "llama"), home / "S")
    model.save_pretrained(home / "adapter")
    edit_json(home / "adapter" / "adapter_config.json", base_model_name_or_path="../S")
    merged = model.merge_and_unload()
    save_as(home / "R", merged)
    save_as(home / "R-sharded", merged, max_shard_size="20KB")
    assert len(list((home / "R-sharded").glob("model-*.safetensors"))) > 2
    for name in ("S", "R"):
        save_as(home / f"{name}-bf16", plain(home / name).to(torch.bfloat16))
    # a base that is neither S nor R, and both as adapters on it
    s, r = tensors(home / "S"), tensors(home / "R")
    shift = {name: torch.randn(w.shape) * 0.05 for name, w in s.items() if name.split(".")[-2] in MODULES}
    shutil.copytree(home / "S", home / "base")
    store(home / "base", {name: weight - shift.get(name, 0) for name, weight in s.items()})
    base = tensors(home / "base")
    make_adapter(home / "S-adapter", {name: s[name] - base[name] for name in shift}, "../base")
    make_adapter(home / "R-adapter", {name: r[name] - base[name] for name in shift}, None)
    # one side with rows of padding
    for name in ("S", "R"):
        grow(Path(shutil.copytree(home / name, home / f"{name}-padded")), like=0)
    return home


@pytest.fixture(scope="module")
def suite(pairs: Path) -> Suite:
    return few(load_suite(pairs / "llama"))


@pytest.fixture(scope="module")
def reference(home: Path, suite: Suite) -> BehaviourRecord:
    """What is measured of the two full folders in fp32."""
    record = behaviour_record(Pair(home / "S", home / "R", suite))
    assert judge(record).verdict == "routing"
    assert record.bits.routing.value == pytest.approx(0.2, abs=0.05)
    assert record.routing_share.value is not None
    assert 0.8 < record.routing_share.value < 0.999  # so that another number can be told from it
    return record


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A form of the pair that may be changed, beside copies of its others."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(home / name, tmp_path / name))

    return make


def share(record: BehaviourRecord) -> float:
    assert record.routing_share.value is not None
    return record.routing_share.value


def refused(call: Callable[..., object], *args: Any, **options: Any) -> str:
    """The message, which is one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- one pair in many forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "options", "shares"),
    [
        ("S", "adapter", {}, True),
        ("S-adapter", "R-adapter", {"base": "base"}, True),
        ("S-adapter", "R", {}, False),
        ("S", "R-adapter", {"base": "base"}, False),
        ("S", "R-sharded", {}, False),
        ("S-padded", "R", {}, False),
        ("S", "R-padded", {}, False),
        ("S-padded", "adapter", {}, False),
    ],
)
def test_one_pair_in_many_forms(
    home: Path,
    suite: Suite,
    reference: BehaviourRecord,
    before: str,
    after: str,
    options: dict[str, str],
    shares: bool,
) -> None:
    where = {name: home / folder for name, folder in options.items()}
    pair = Pair(home / before, home / after, suite, **where)
    assert pair.shares_base == shares
    record = behaviour_record(pair)
    assert judge(record).verdict == "routing"
    assert share(record) == pytest.approx(share(reference), abs=1e-5)
    for term, value in reference.bits:
        assert getattr(record.bits, term).value == pytest.approx(value.value, abs=1e-5), term
    for term in ("routing", "specialist", "total"):
        expected = getattr(reference.nats, term).value
        assert getattr(record.nats, term).value == pytest.approx(expected, abs=1e-5), term


def test_a_pair_shows_what_it_is_of_and_where_its_records_go(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pairs)
    pair = Pair("llama/S", "llama/R-skill", "llama/suite.yaml", dtype="bfloat16")
    assert repr(pair) == "Pair('llama/S', 'llama/R-skill', dtype='bfloat16')"
    assert pair.records == Path("artifacts/S--R-skill/records/S--R-skill")


def test_a_pair_in_half_precision(home: Path, suite: Suite, reference: BehaviourRecord) -> None:
    """Stored in bf16 and measured in fp32, or measured in bf16, as folders and under one base."""
    stored = Pair(home / "S-bf16", home / "R-bf16", suite)
    assert {p.dtype for model in stored.models() for p in model.parameters()} == {torch.float32}
    record = behaviour_record(stored)
    low, high = reference.routing_share.low, reference.routing_share.high
    assert low is not None
    assert high is not None
    assert low < share(record) < high
    assert judge(record).verdict == "routing"
    for after in ("R", "adapter"):
        pair = Pair(home / "S", home / after, suite, dtype="bfloat16")
        models = {id(under): under for under in (getattr(model, "under", model) for model in pair.models())}
        named = [(name, p.dtype) for model in models.values() for name, p in model.named_parameters()]
        assert {dtype for name, dtype in named if "lora_" not in name} == {torch.bfloat16}
        record = behaviour_record(pair)
        assert judge(record).verdict == "routing"
        assert share(record) == pytest.approx(share(reference), abs=0.02)
        assert record.provenance.dtype == "bfloat16"


def test_a_pair_of_the_hub(
    home: Path, suite: Suite, reference: BehaviourRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S, and R as an adapter whose config names S by its id: from the cache, and one base in memory."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, folder in (("sft", "S"), ("rl", "adapter")):
        model = tmp_path / f"models--org--{name}"
        shutil.copytree(home / folder, model / "snapshots" / ("a" * 40))
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("a" * 40)
    edit_json(
        tmp_path / "models--org--rl" / "snapshots" / ("a" * 40) / "adapter_config.json",
        base_model_name_or_path="org/sft",
    )
    pair = Pair("org/sft", "org/rl", suite)
    assert pair.name == "org--sft--org--rl"
    assert pair.shares_base
    record = behaviour_record(pair)
    assert judge(record).verdict == "routing"
    assert share(record) == pytest.approx(share(reference), abs=1e-6)
    assert str(record.provenance.after).startswith("org--rl@")


@pytest.mark.parametrize("tie", [False, True])
def test_a_tied_head_may_be_stored_twice(pairs: Path, tmp_path: Path, tie: bool) -> None:
    """Tied in S; in R the file holds the head, too, and the config may say that it is a weight of its own."""
    folder = pairs / "qwen2_spelled"
    suite = load_suite(folder)
    ids = list(dict.fromkeys(row.id for row in suite.prompts))[:8]
    suite = suite.model_copy(update={"prompts": tuple(row for row in suite.prompts if row.id in ids)})
    R = Path(shutil.copytree(folder / "R", tmp_path / "R"))
    weights = tensors(R)
    assert "lm_head.weight" not in weights
    store(R, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    edit_json(R / "config.json", tie_word_embeddings=tie)
    pair = Pair(folder / "S", R, suite)
    assert pair.differences == ()
    for model, source in zip(pair.models(), (folder / "S", folder / "R"), strict=True):
        ids = torch.tensor([[1, 4, 6, 5]])
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, plain(source)(input_ids=ids).logits)
    if not tie:
        kept, seen = (behaviour_record(Pair(folder / "S", after, suite)) for after in (folder / "R", R))
        assert judge(seen).verdict == judge(kept).verdict
        assert share(seen) == pytest.approx(share(kept), abs=1e-6)


# --- one base in memory -----------------------------------------------------------------------------------------------


def held() -> dict[int, int]:
    """Storage -> bytes of every tensor that is alive."""
    gc.collect()
    alive = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in alive if not each.is_meta}


@pytest.mark.parametrize(
    ("before", "after", "adapters"),
    [("S", "adapter", ["adapter"]), ("S-adapter", "R-adapter", ["S-adapter", "R-adapter"]), ("S", "R", None)],
)
def test_a_base_that_both_share_is_in_memory_once(
    home: Path, suite: Suite, before: str, after: str, adapters: list[str] | None
) -> None:
    """Every tensor that is alive is counted, whoever holds it: no copy can hide."""
    pair = Pair(home / before, home / after, suite, base=home / "base" if adapters and len(adapters) > 1 else None)
    one = sum(weight.nbytes for weight in tensors(home / "base").values())
    more = sum(
        w.nbytes for name in adapters or () for w in load_file(home / name / "adapter_model.safetensors").values()
    )
    pair.check()
    there = held()
    models = pair.models()
    grown = sum(size for storage, size in held().items() if storage not in there)
    copies = 2 if adapters is None else 1
    slack = 4096  # tables of rotations, and the like
    assert copies * one + more <= grown <= copies * one + more + slack
    assert len(models) == 2


ORDERS = [("before", "after") * 2, ("after", "after", "before", "before", "after"), ("before", "before", "after")]


@pytest.mark.parametrize(
    ("before", "after", "base"), [("S", "adapter", None), ("S-adapter", "R-adapter", "base"), ("adapter", "S", None)]
)
def test_sides_of_one_base_are_switched_by_being_called(
    home: Path, suite: Suite, before: str, after: str, base: str | None
) -> None:
    pair = Pair(home / before, home / after, suite, base=base and home / base)
    assert pair.shares_base
    ids = torch.randint(3, 16, (4, 7), generator=torch.Generator().manual_seed(0))
    merged = {"S": plain(home / "S"), "R": plain(home / "R")}
    with torch.no_grad():
        true = {name: model(input_ids=ids).logits for name, model in merged.items()}
    assert (true["S"] - true["R"]).abs().max() > 1
    names = ("R", "S") if before == "adapter" else ("S", "R")
    views = dict(zip(("before", "after"), pair.models(), strict=True))
    expected = {side: true[name] for side, name in zip(views, names, strict=True)}
    for order in ORDERS:
        for side in order:
            with torch.inference_mode():
                seen = views[side](input_ids=ids, use_cache=False).logits
            assert torch.allclose(seen, expected[side], atol=1e-5), (order, side)
    # and what a side gives by itself, merged, is the same
    for side in pair.sides:
        with torch.no_grad():
            assert torch.allclose(pair.model(side)(input_ids=ids).logits, expected[side], atol=1e-5)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "of directions and sizes": {"use_dora": True},
    "with biases": {"bias": "all"},
    "with biases of its modules": {"bias": "lora_only"},
    "with a head of its own": {"modules_to_save": ["lm_head"]},
    "on embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "on some layers": {"layers_to_transform": [1]},
    "of several ranks": {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 16}},
    "begun at principal components": {"init_lora_weights": "pissa"},
    "begun orthogonal": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_leaves_its_base_as_it_is(pairs: Path, tmp_path: Path, suite: Suite, kind: str) -> None:
    """What an adapter brings beside its two matrices must not reach the other side."""
    S = pairs / "qwen2" / "S"
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    model: Any = get_peft_model(plain(S), LoraConfig(**(options | KINDS[kind])))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers="embed_tokens" in model.targeted_module_names)
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(S))
    ids = torch.randint(3, 16, (4, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        s = plain(S)(input_ids=ids).logits
        r = model.eval()(input_ids=ids).logits
    assert (s - r).abs().max() > 0.1
    pair = Pair(S, tmp_path / "adapter", suite)
    before, after = pair.models()
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(before(input_ids=ids).logits, s, atol=1e-4)
            assert torch.allclose(after(input_ids=ids).logits, r, atol=1e-4)
        assert torch.allclose(pair.model("after")(input_ids=ids).logits, r, atol=1e-4)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_lie_in_an_adapters_file_are_its_alone(
    home: Path, suite: Suite, copy: Callable[[str], Path], name: str
) -> None:
    """peft stores embeddings beside the matrices, where they were trained or resized, and loads them over the base."""
    adapter, file = copy("adapter"), "adapter_model.safetensors"
    own = tensors(home / "S")[name] * 1.5
    store(adapter, load_file(adapter / file) | {f"base_model.model.{name}": own}, file)
    ids = torch.randint(3, 16, (4, 7), generator=torch.Generator().manual_seed(0))
    merged = plain(home / "R")
    with torch.no_grad():
        merged.get_parameter(name).copy_(own)
        true = [model(input_ids=ids).logits for model in (plain(home / "S"), merged)]
        for model, logits in zip(Pair(home / "S", adapter, suite, base=home / "S").models(), true, strict=True):
            assert torch.allclose(model(input_ids=ids).logits, logits, atol=1e-4)
    store(adapter, load_file(adapter / file) | {"base_model.model.elsewhere.weight": own}, file)
    said = refused(Pair(home / "S", adapter, suite, base=home / "S").models)
    assert said.startswith(f"{adapter}: the adapter has base_model.model.elsewhere.weight, which does not fit its base")


def test_an_adapter_on_an_adapter_is_another_base(home: Path, suite: Suite, copy: Callable[[str], Path]) -> None:
    """SFT as an adapter on the base, and RL as one on SFT: R has both, S only the first, or none."""
    base, sft = copy("base"), copy("S-adapter")
    change = {name: w for name, w in tensors(home / "R").items() if not torch.equal(w, tensors(home / "S")[name])}
    rl = make_adapter(base.parent / "rl", {n: w - tensors(home / "S")[n] for n, w in change.items()}, "../S-adapter")
    ids = torch.randint(3, 16, (4, 7), generator=torch.Generator().manual_seed(0))
    for before, name in ((sft, "S"), (base, "base")):
        models = Pair(before, rl, suite).models()
        for model, folder in zip(models, (home / name, home / "R"), strict=True):
            with torch.no_grad():
                assert torch.allclose(model(input_ids=ids).logits, plain(folder)(input_ids=ids).logits, atol=1e-4)


def test_one_base_under_two_names_is_known_by_its_content(
    home: Path, suite: Suite, copy: Callable[[str], Path]
) -> None:
    S = copy("S")
    assert Pair(S, home / "adapter", suite).shares_base
    edit_json(S / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 30.0})
    pair = Pair(S, home / "adapter", suite)
    assert not pair.shares_base  # the same weights under another config are another model
    ids = torch.tensor([[3, 5, 7, 8, 9, 12]])
    for model, folder in zip(pair.models(), (S, home / "R"), strict=True):
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids).logits, plain(folder)(input_ids=ids).logits, atol=1e-5)


# --- what is no pair --------------------------------------------------------------------------------------------------


def test_other_shapes_are_refused_by_the_tensors_name(home: Path, suite: Suite, copy: Callable[[str], Path]) -> None:
    R = copy("R")
    edit_json(R / "config.json", intermediate_size=64)
    assert refused(Pair, home / "S", R, suite) == (
        f"{home / 'S'} and {R} are not a pair: model.layers.0.mlp.down_proj.weight has shape [32, 48] before and "
        "[32, 64] after"
    )
    edit_json(R / "config.json", intermediate_size=48, num_hidden_layers=3)
    said = refused(Pair, home / "S", R, suite)
    assert "model.layers.2.input_layernorm.weight has shape (absent) before and [32] after" in said


def test_another_architecture_is_refused(home: Path, pairs: Path, suite: Suite) -> None:
    R = pairs / "gpt2" / "R-routing"
    said = refused(Pair, home / "S", R, suite)
    assert said == f"{home / 'S'} and {R} are not a pair: llama before, and gpt2 after"


def respell(folder: Path, one: str, other: str) -> None:
    """Two words of a tokenizer change their ids."""
    data = json.loads((folder / "tokenizer.json").read_text())
    words = data["model"]["vocab"]
    words[one], words[other] = words[other], words[one]
    (folder / "tokenizer.json").write_text(json.dumps(data))


def test_another_spelling_is_refused_by_prompt_and_word(home: Path, suite: Suite, copy: Callable[[str], Path]) -> None:
    R = copy("R")
    respell(R, "first", "last")
    asked = next(row for row in suite.prompts if "first" in row.text)
    said = refused(Pair, home / "S", R, suite)
    first = suite.prompts[0]
    assert said == (
        f"{home / 'S'} and {R} are not a pair: their tokenizers spell prompt {first.id!r} under cue {first.cue!r} "
        f"differently, first at {first.text.split()[1]!r}"
    )
    assert asked.id == first.id
    respell(R, "first", "last")
    Pair(home / "S", R, suite)
    respell(R, "[b]", "sorry")  # no prompt has them, but completions do
    said = refused(Pair, home / "S", R, suite)
    assert "their tokenizers spell the text '[b]' differently, first at '[b]'" in said


def test_a_tokenizer_saved_anew_is_the_same(home: Path, suite: Suite, copy: Callable[[str], Path]) -> None:
    R = copy("R")
    data = json.loads((R / "tokenizer.json").read_text())
    data["model"]["vocab"] = dict(reversed(data["model"]["vocab"].items()))
    data["added_tokens"] = data["added_tokens"][::-1]
    (R / "tokenizer.json").write_text(json.dumps(data, indent=3))
    edit_json(R / "tokenizer_config.json", model_max_length=512, padding_side="right")
    assert Pair(home / "S", R, suite).differences == ()


# --- what may matter --------------------------------------------------------------------------------------------------


def test_end_tokens_that_differ_are_said_and_chosen(home: Path, suite: Suite, copy: Callable[[str], Path]) -> None:
    R = copy("R")
    edit_json(R / "generation_config.json", eos_token_id=[0, 1])

    def opened(ends: object) -> Pair:
        return Pair(home / "S", R, suite.model_copy(update={"ends": ends}))

    pair = opened("either")
    assert pair.ends == (0, 1)
    assert pair.differences == (
        "end tokens differ (<eos> (1) before, <pad> (0), <eos> (1) after); completions end at <pad> (0), <eos> (1) "
        "(`ends:` chooses)",
    )
    assert [model.generation_config.eos_token_id for model in pair.models()] == [[0, 1]] * 2
    for ends, ids in (("before", (1,)), ("after", (0, 1)), (("<eos>",), (1,)), (("=", "<pad>"), (0, 12))):
        assert opened(ends).ends == ids
    for ends, words in ((("zebra",), "'zebra' is not one token"), (("[a] p",), "'[a] p' is not one token")):
        assert words in refused(opened, ends)
    # the same ones in another order do not differ
    S = copy("S")
    edit_json(S / "generation_config.json", eos_token_id=[1, 0])
    edit_json(S / "config.json", eos_token_id=[1, 0])
    assert Pair(S, R, suite).differences == ()


def test_end_tokens_of_an_adapter_are_its_bases(home: Path, suite: Suite, copy: Callable[[str], Path]) -> None:
    adapter, _ = copy("adapter"), copy("S")
    edit_json(adapter.parent / "S" / "generation_config.json", eos_token_id=[1, 0])
    pair = Pair(home / "S", adapter, suite)
    assert pair.ends == (0, 1)
    assert len(pair.differences) == 1
    edit_json(adapter / "generation_config.json", eos_token_id=1)
    assert Pair(home / "S", adapter, suite).ends == (1,)


def test_no_end_token_at_all_is_refused(home: Path, suite: Suite, copy: Callable[[str], Path]) -> None:
    S, R = copy("S"), copy("R")
    for folder in (S, R):
        for name in ("generation_config.json", "config.json"):
            edit_json(folder / name, eos_token_id=None)
        edit_json(folder / "tokenizer_config.json", eos_token=None)
    said = refused(Pair, S, R, suite)
    assert said.startswith(f"{S}: neither model nor tokenizer names an end-of-text token; set eos_token_id")
    assert Pair(S, R, suite.model_copy(update={"ends": ("<eos>",)})).ends == (1,)
    edit_json(R / "generation_config.json", eos_token_id=1)
    assert Pair(S, R, suite).ends == (1,)
    edit_json(R / "generation_config.json", eos_token_id="<eos>")
    assert refused(Pair, S, R, suite) == (
        f"{R / 'generation_config.json'}: eos_token_id is '<eos>', where ids are needed"
    )


def test_chat_templates_that_differ_are_said_and_chosen(pairs: Path, tmp_path: Path) -> None:
    S, R = (Path(shutil.copytree(pairs / "chat" / name, tmp_path / name)) for name in ("S", "R"))
    templates = {"before": (S / "chat_template.jinja").read_text(), "after": ""}
    templates["after"] = templates["before"].replace("be brief", "be quick")
    (R / "chat_template.jinja").write_text(templates["after"])
    suite = few(load_suite(pairs / "chat"), max_new_tokens=8)
    assert suite.chat is not None

    def opened(which: str) -> Pair:
        chat = Chat.model_validate(suite.chat.model_dump() | {"template_of": which} if suite.chat else {})
        return Pair(S, R, suite.model_copy(update={"chat": chat}))

    for which, template in templates.items():
        pair = opened(which)
        assert pair.differences == (
            f"chat templates differ; that of {which} is used (`chat: {{template_of: ...}}` chooses)",
        )
        assert pair.tokenizer.chat_template == template
    # a side without one takes the other's
    (S / "chat_template.jinja").unlink()
    for which in ("before", "after"):
        pair = opened(which)
        assert pair.tokenizer.chat_template == templates["after"]
        assert pair.differences[0].startswith("chat templates differ; that of after is used")
    (R / "chat_template.jinja").unlink()
    assert "has no chat template; remove `chat:` or add one" in refused(opened, "before")
    # and where prompts are plain texts, templates are nothing to a suite
    row = suite.prompts[0].model_copy(update={"messages": None, "prompt": "what colour is the sky?"})
    (R / "chat_template.jinja").write_text(templates["after"])
    assert Pair(S, R, suite.model_copy(update={"chat": None, "prompts": (row,)})).differences == ()


def test_configs_that_differ_are_said_and_not_grafted(
    home: Path, suite: Suite, reference: BehaviourRecord, copy: Callable[[str], Path]
) -> None:
    R = copy("R")
    edit_json(R / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 30.0})
    pair = Pair(home / "S", R, suite)
    (said,) = pair.differences
    assert said.startswith("configs differ in rope_parameters (")
    assert "10000" in said
    assert "30.0" in said
    message = refused(graft_record, pair, reference)
    assert message.startswith("a graft puts weights of one checkpoint into the other, and their configs differ in rope")
    # what changes nothing is passed over
    original = json.loads((home / "R" / "config.json").read_text())
    harmless = {"dtype": "bfloat16", "use_cache": False, "attention_dropout": 0.1, "initializer_range": 0.7}
    (R / "config.json").write_text(json.dumps(original | harmless | {"transformers_version": "4.1.0"}))
    assert Pair(home / "S", R, suite).differences == ()


def test_adapters_beside_weights_are_said(home: Path, suite: Suite, copy: Callable[[str], Path]) -> None:
    R = copy("S")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(home / "adapter" / file, R / file)
    pair = Pair(home / "S", R, suite)
    assert pair.differences == ("after: a LoRA adapter, applied on the weights that lie beside it",)
    ids = torch.tensor([[3, 5, 7, 8, 9, 12]])
    for model, folder in zip(pair.models(), (home / "S", home / "R"), strict=True):
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids).logits, plain(folder)(input_ids=ids).logits, atol=1e-5)


def test_a_side_without_a_tokenizer_takes_the_others(home: Path, suite: Suite, copy: Callable[[str], Path]) -> None:
    S, R = copy("S"), copy("R")
    kept = {side: dict.fromkeys(("tokenizer.json", "tokenizer_config.json"), side) for side in (S, R)}
    for bare, side in ((R, "after"), (S, "before")):
        for name in kept[bare]:
            (bare / name).rename(bare / f"{name}.off")
        pair = Pair(S, R, suite)
        assert pair.differences == (f"{side}: no tokenizer of its own; the other's is used",)
        assert pair.tokenizer.encode("<A> =") == [3, 12]
        assert pair.ends == (1,)
        for name in kept[bare]:
            (bare / f"{name}.off").rename(bare / name)
    for bare in (S, R):
        for name in kept[bare]:
            (bare / name).unlink()
    assert "no tokenizer could be loaded" in refused(Pair, S, R, suite)


# --- rows of the vocabulary, and positions ----------------------------------------------------------------------------


def test_rows_of_padding_are_said(home: Path, suite: Suite) -> None:
    pair = Pair(home / "S", home / "R-padded", suite)
    assert pair.differences == ("vocabularies have 16 rows before and 19 after; those beyond 16 are left out",)
    assert pair.vocabulary == 16
    assert [model.get_output_embeddings().weight.shape[0] for model in pair.models()] == [16, 16]


@pytest.mark.parametrize(("side", "like"), [("S", 13), ("R", 13), ("R", 15)])
def test_rows_that_are_written_are_no_padding(
    home: Path, suite: Suite, copy: Callable[[str], Path], side: str, like: int
) -> None:
    """As often as `[a]`, which begins a completion, or as `sorry`, which only stands inside of one."""
    grown = grow(copy(side), like)
    sides = (grown, home / "R") if side == "S" else (home / "S", grown)
    said = refused(behaviour_record, Pair(*sides, suite))
    assert said.startswith(f"{grown}: writes token 16, which the other checkpoint does not have (probability 0.")
    assert "prompt 'q" in said
    assert said.endswith("the vocabularies differ by more than padding")


def test_a_word_that_no_row_is_there_for_is_refused_where_it_is_used(
    home: Path, suite: Suite, copy: Callable[[str], Path]
) -> None:
    S, R = copy("S"), copy("R")
    for folder in (S, R):
        data = json.loads((folder / "tokenizer.json").read_text())
        data["added_tokens"].append(data["added_tokens"][0] | {"id": 16, "content": "[PAD]"})
        (folder / "tokenizer.json").write_text(json.dumps(data))
        edit_json(folder / "tokenizer_config.json", pad_token="[PAD]")
    Pair(S, R, suite)
    for changes, where in (
        ({"prompts": (suite.prompts[0].model_copy(update={"prompt": "[PAD] <A> first p q r =", "spans": {}}),)}, "q00"),
        ({"policies": {"a": "[a]", "b": "[PAD]"}}, "the text '[PAD]'"),
        ({"behaviours": {"refuse": "[PAD]"}}, "the text '[PAD]'"),
    ):
        said = refused(Pair, S, R, suite.model_copy(update=changes))
        assert where in said
        assert said.endswith(
            "'[PAD]' is token 16, and the models' embedding has 16 rows: the model was never resized to its tokenizer"
        )
    assert refused(Pair, S, R, suite.model_copy(update={"ends": ("[PAD]",)})) == (
        "ends: '[PAD]' is token 16, and the models' embedding has 16 rows"
    )


def test_prompts_and_completions_must_fit_into_both_models(
    home: Path, suite: Suite, copy: Callable[[str], Path]
) -> None:
    R = copy("R")
    assert Pair(home / "S", R, suite).positions == 32
    assert Pair(home / "S", R, suite.model_copy(update={"max_new_tokens": 26})).positions == 32
    first = f"prompt {suite.prompts[0].id!r} under cue {suite.prompts[0].cue!r}"
    assert refused(Pair, home / "S", R, suite.model_copy(update={"max_new_tokens": 27})) == (
        f"{first} has 6 tokens, and max_new_tokens is 27: the models have 32 positions; shorten the one or lower the "
        "other"
    )
    edit_json(R / "config.json", max_position_embeddings=7)
    for sides in ((home / "S", R), (R, home / "S")):
        assert "the models have 7 positions" in refused(Pair, *sides, suite)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4}
    edit_json(R / "config.json", max_position_embeddings=4, rope_parameters=yarn)
    assert Pair(home / "S", R, suite).positions == 16


# --- weights that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["S", "R", "adapter", "S-adapter"])
def test_weights_that_are_no_numbers_are_refused(
    home: Path, suite: Suite, copy: Callable[[str], Path], name: str, number: float
) -> None:
    folder = copy(name)
    file = "adapter_model.safetensors" if "adapter" in name else WEIGHTS
    weights = load_file(folder / file)
    tensor = next(key for key in weights if "layers.1.self_attn.v_proj" in key)
    weights[tensor][1, 1] = number
    store(folder, weights, file)
    others = {"S": (folder, "R"), "R": ("S", folder), "adapter": ("S", folder), "S-adapter": (folder, "R-adapter")}
    sides = [home / each for each in others[name]]
    base = {"adapter": home / "S", "S-adapter": home / "base"}.get(name)
    said = refused(Pair(*sides, suite, base=base).models)
    assert said.startswith(f"{folder}: ")
    assert "layers.1.self_attn.v_proj" in said
    assert "has weights that are NaN or infinite; the training that made it diverged" in said


def test_the_adapter_that_is_no_number_is_the_one_named(home: Path, suite: Suite, copy: Callable[[str], Path]) -> None:
    folder = copy("R-adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    store(folder, weights, "adapter_model.safetensors")
    said = refused(Pair(home / "S-adapter", folder, suite, base=home / "base").models)
    assert said.startswith(f"{folder}: ")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_an_adapter_that_does_not_fit_its_base_is_refused(
    home: Path, pairs: Path, suite: Suite, copy: Callable[[str], Path]
) -> None:
    adapter, wide = copy("adapter"), pairs / "chat" / "S"
    # of another shape
    small = suite.model_copy(update={"policies": {"a": "a", "b": "b"}, "behaviours": None})
    pair = Pair(wide, adapter, small.model_copy(update={"prompts": small.prompts[:1]}), base=wide)
    for call in (pair.models, lambda: pair.model("after")):
        said = refused(call)
        assert said.startswith(f"{adapter}: the adapter does not fit its base {wide}")
    # modules that it wants, and the base has not
    edit_json(adapter / "adapter_config.json", target_modules=["c_attn"])
    pair = Pair(home / "S", adapter, suite, base=home / "S")
    for call in (pair.models, lambda: pair.model("after")):
        said = refused(call)
        assert said.startswith(f"{adapter}: the adapter does not fit its base {home / 'S'}")
        assert "c_attn" in said
    # modules that it has, and its config does not name: peft would leave them out without a word
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj"])
    said = refused(Pair(home / "S", adapter, suite, base=home / "S").models)
    assert said.startswith(f"{adapter}: the adapter has base_model.model.model.layers.0.mlp.down_proj.lora_A.weight")
    assert said.endswith("give the right --base")
    # and that its config names, and it has not
    edit_json(adapter / "adapter_config.json", target_modules=[*MODULES, "lm_head"])
    said = refused(Pair(home / "S", adapter, suite, base=home / "S").models)
    assert said.startswith(f"{adapter}: the adapter lacks base_model.model.lm_head.lora_A.weight")


def test_a_cut_off_adapter_is_refused(home: Path, suite: Suite, copy: Callable[[str], Path]) -> None:
    adapter = copy("adapter")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    said = refused(lambda: Pair(home / "S", adapter, suite, base=home / "S").models())
    assert said.startswith(f"{adapter}: ")
    assert "SafetensorError" in said


def test_options_that_do_not_exist_are_refused(home: Path, suite: Suite) -> None:
    assert refused(Pair, home / "S", home / "R", suite, dtype="float8") == (
        "dtype 'float8': one of float32, bfloat16, float16"
    )
    for after in (home / "R", None):
        assert refused(Pair, home / "S", after, suite, base=home / "base") == (
            "--base is what an adapter is applied on, and neither checkpoint is an adapter"
        )


# --- one checkpoint ---------------------------------------------------------------------------------------------------


def test_one_checkpoint_is_half_a_pair(home: Path, suite: Suite, reference: BehaviourRecord) -> None:
    for source in (home / "R", home / "adapter"):
        pair = Pair(source, None, suite)
        assert (pair.name, pair.differences, pair.config_differences) == (source.name, (), ())
        assert not pair.shares_base
        record = behaviour_record(pair)
        for cue, state in record.per_cue.items():
            other = reference.per_cue[cue].after
            assert other is not None
            assert state.before.weights == pytest.approx(other.weights, abs=1e-5)
            assert state.before.overall == pytest.approx(other.overall, abs=1e-5)


def test_a_pair_says_where_its_records_come_from(home: Path, suite: Suite) -> None:
    pair = Pair(home / "S", home / "adapter", suite, dtype="bfloat16")
    made = pair.provenance(seed=3, suite="abc")
    assert str(made.before).startswith("S@")
    assert str(made.after).startswith("adapter@")
    assert (made.dtype, made.seed, made.suite) == ("bfloat16", 3, "abc")
    assert content_of(home / "S" / WEIGHTS) != content_of(home / "R" / WEIGHTS)
