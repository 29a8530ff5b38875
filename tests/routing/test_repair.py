"""Repair on the stored pairs: what an edit does to weights, and what every repair does to behaviour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from stored import behaviour_of
from transformers import AutoModelForCausalLM

from mixturelens.behaviour.harmed import find_harm
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.repair_questions import make_ground
from mixturelens.grafting.graft import written
from mixturelens.hooks.lens import load_lens
from mixturelens.hooks.weights import projection, rewritten
from mixturelens.models import Pair, load_model, load_tokenizer
from mixturelens.patching.pair import patching_record
from mixturelens.patching.sweep import Reader, find_reader
from mixturelens.routing import edit as edits
from mixturelens.routing import repair
from mixturelens.routing.edit import edited, fit_edit
from mixturelens.routing.repair import RepairRecord, RepairSettings, repair_record
from mixturelens.routing.tries import brief
from mixturelens.suite import load_suite
from mixturelens.types import InputError, Site
from mixturelens.unfinished import Unfinished

# qwen2's R was trained towards the policy that its suite does not name; edits are tried on all four below
SHAPES = ["llama", "gpt_neox", pytest.param("gpt2", marks=pytest.mark.slow)]
PAIRS = Path(__file__).resolve().parents[1] / "pairs"


@pytest.fixture(scope="module", params=SHAPES)
def repaired(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, RepairRecord, Path]:
    shape = request.param
    folder = PAIRS / shape
    suite = load_suite(folder)
    measured = behaviour_of(folder.name, "R-routing")
    out = tmp_path_factory.mktemp(shape) / "repaired"
    fewer = pytest.MonkeyPatch()
    fewer.setattr(repair, "RANDOM", 6)
    fewer.setattr(repair, "DIRECTIONS", 2)
    try:
        return (
            shape,
            repair_record(Pair(folder / "S", folder / "R-routing", suite), measured, RepairSettings(save_to=out)),
            out,
        )
    finally:
        fewer.undo()


def test_the_cue_reader_brings_the_harmed_cue_back(repaired: tuple[str, RepairRecord, Path]) -> None:
    _, record, _ = repaired
    assert (record.trained_cue, record.harmed_cue, record.policy) == ("A", "B", "a")
    assert (record.after["B"].value or 1) < 0.05
    by_kind = {each.kind: each for each in record.repairs}
    assert list(by_kind) == ["interchange", "zero", "mean", "steer", "edit", "reroute"]
    for kind in ("interchange", "edit"):
        each = by_kind[kind]
        assert (each.accuracy["B"].value or 0) > 0.97
        assert (each.accuracy["B"].low or 0) > 0.65  # ten questions, all right, show no more than 0.69
        assert (each.gap_closed.low or 0) > 0.9
        assert abs(each.trained_change.value or 0) < 0.02
        assert (each.random.median or 0) < 0.15
        assert each.random.above == 0
    # ten questions say where to cut between the cues: that costs the trained one up to 0.22 here, and is not hidden
    reroute = by_kind["reroute"]
    assert (reroute.accuracy["B"].value or 0) > 0.9
    assert (reroute.accuracy["B"].low or 0) > 0.6
    assert reroute.trained_change.measured
    assert reroute.random.above == 0


def test_an_interchange_from_the_trained_cue_leaves_the_trained_cue_alone(
    repaired: tuple[str, RepairRecord, Path],
) -> None:
    _, record, _ = repaired
    interchange = record.repairs[0]
    assert abs(interchange.trained_change.value or 0) < 1e-6
    for cell in interchange.cells:
        if cell.cue == "A":
            assert abs(cell.accuracy_change.value or 0) < 1e-6


def test_random_places_are_of_equal_size_and_none_of_them_the_reader(repaired: tuple[str, RepairRecord, Path]) -> None:
    _, record, _ = repaired
    own = {str(head) for head in record.heads}
    for each in record.repairs:
        assert 0 < len(each.random.places) <= 6
        assert len(each.random.harmed) == len(each.random.trained) == len(each.random.places)
        if each.kind not in ("steer", "reroute"):
            for place in each.random.places:
                heads = place.split("+")
                assert len(heads) == len(record.heads)
                assert not own & set(heads)


def test_the_repaired_folder_is_a_plain_checkpoint_that_does_what_the_record_says(
    repaired: tuple[str, RepairRecord, Path], load_pair: Callable[[str, str], Any]
) -> None:
    shape, record, out = repaired
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    pair = load_pair(shape, "R-routing")
    assert load_tokenizer(out).get_vocab() == pair.tokenizer.get_vocab()
    found = measure(pair.scorer, model, pair.prompts).correct.sum(-1)
    under = [row.cue == "B" for row in pair.prompts.rows]
    assert float(found[under].mean()) == pytest.approx(record.repairs[-2].accuracy["B"].value or 0, abs=0.1)
    plain, changed = load_model(PAIRS / shape / "R-routing"), []
    for (name, old), (_, new) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        if not torch.equal(old, new):
            changed.append(name)
    layers = {head.layer for head in record.heads}
    assert changed
    assert len(changed) <= 2 * len(layers)
    assert all(any(word in name for word in ("k_proj", "v_proj", "c_attn", "query_key_value")) for name in changed)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_the_repair_of_an_adapter_is_an_adapter(
    repaired: tuple[str, RepairRecord, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R as an adapter, on a base that lacks what it adds: what is written there is what is written of R as a folder."""
    shape, _, out = repaired
    if shape != "llama":
        pytest.skip("tests/models/test_adapter.py has the shapes")
    folder = PAIRS / shape
    base: Any = load_model(folder / "R-routing")
    modules = ["q_proj", "v_proj", "down_proj"]
    torch.manual_seed(0)
    under: Any = get_peft_model(base, LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    under.save_pretrained(str(tmp_path / "R"))
    for module in base.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.weight.data -= module.get_delta_weight("default")
    under.unload().save_pretrained(tmp_path / "base")
    load_tokenizer(folder / "S").save_pretrained(tmp_path / "base")
    monkeypatch.setattr(repair, "RANDOM", 1)
    monkeypatch.setattr(repair, "DIRECTIONS", 1)
    pair = Pair(folder / "S", tmp_path / "R", load_suite(folder), base=tmp_path / "base", out=tmp_path / "out")
    record = repair_record(pair, behaviour_of("llama", "R-routing"), RepairSettings(save_to=tmp_path / "repaired"))
    assert record.checkpoint == "repaired"
    assert not [line for line in record.missing if "adapter" in line]
    loaded = PeftModel.from_pretrained(load_model(tmp_path / "base"), str(tmp_path / "repaired")).eval()
    ids = torch.tensor([load_tokenizer(folder / "S").encode(row.text) for row in pair.suite.neutral[:2]])
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, load_model(out)(input_ids=ids).logits, atol=2e-3, rtol=1e-3
        )


def test_the_record_round_trips(repaired: tuple[str, RepairRecord, Path], tmp_path: Path) -> None:
    _, record, _ = repaired
    assert RepairRecord.load(record.save(tmp_path / "repair.json")) == record


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_an_edit_changes_how_the_cue_is_read_and_little_else(shape: str) -> None:
    folder = PAIRS / shape
    suite = load_suite(folder)
    lens = load_lens(folder / "S")
    harm = find_harm(behaviour_of(folder.name, "R-routing"))
    ground = make_ground(lens, suite, harm, seed=0)
    heads = [Site(layer=1, component="z", head=1)]
    edit = fit_edit(ground, heads)
    trained, kept = edits._inputs(ground, 1, "A")
    harmed, _ = edits._inputs(ground, 1, "B")
    plain = load_model(folder / "S")
    head = 1 * lens.kv_heads // lens.heads
    for which in ("k", "v"):
        name, index, old = projection(lens, 1, which)
        with written(plain, edited(plain, edit)):
            new = plain.get_parameter(name).detach().view(-1)[index].double()
        old = old.double()
        torch.testing.assert_close(
            new[head] @ harmed.mean((0, 1)), old[head] @ trained.mean((0, 1)), atol=1e-4, rtol=1e-4
        )
        moved = (kept @ (new[head] - old[head]).T).norm() / (kept @ old[head].T).norm()
        assert moved < 0.35, f"{which}: inputs elsewhere are read differently by {float(moved):.2f}"
        others = [h for h in range(len(old)) if h != head]
        assert torch.equal(new[others], old[others])


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_a_lens_edited_in_place_is_the_edited_plain_model_and_itself_again(shape: str) -> None:
    folder = PAIRS / shape
    lens, plain = load_lens(folder / "S"), load_model(folder / "S")
    ground = make_ground(lens, load_suite(folder), find_harm(behaviour_of(folder.name, "R-routing")), seed=0)
    edit = fit_edit(ground, [Site(layer=1, component="z", head=1)])
    before = ground.behaviour((), ground.judge)
    with rewritten(lens, edited(lens, edit)):
        inside = ground.behaviour((), ground.judge)
    with written(plain, edited(plain, edit)):
        expected = measure(ground.scorer, plain, ground.judge)
    np.testing.assert_allclose(inside.classes, expected.classes, atol=1e-5)
    np.testing.assert_allclose(inside.correct, expected.correct, atol=1e-5)
    assert np.abs(inside.classes - before.classes).max() > 1e-3
    np.testing.assert_array_equal(ground.behaviour((), ground.judge).classes, before.classes)


def test_an_edit_is_undone() -> None:
    model = load_model(PAIRS / "llama" / "S")
    name, weights = next(iter(model.named_parameters()))
    before = weights.detach().clone()
    with written(model, edited(model, {name: (torch.tensor([0, 3]), torch.tensor([9.0, 9.0]))})):
        assert float(weights.detach().view(-1)[3]) == 9.0
    assert torch.equal(weights, before)


def test_what_chooses_does_not_judge() -> None:
    folder = PAIRS / "llama"
    suite = load_suite(folder)
    ground = make_ground(load_lens(folder / "S"), suite, find_harm(behaviour_of(folder.name, "R-routing")), seed=0)
    choose, judge = ({row.id for row in prompts.rows} for prompts in (ground.choose, ground.judge))
    assert choose == {row.question for row in ground.contrasts.half(0).rows}
    assert not choose & judge
    assert choose | judge == {row.id for row in suite.neutral}
    reader = find_reader(ground.lens, ground.contrasts, "policy")
    assert reader.heads


@pytest.mark.parametrize("after", ["R-neither", "R-skill"])
def test_nothing_to_repair(after: str) -> None:
    folder = PAIRS / "llama"
    with pytest.raises(InputError, match=r"nothing to repair: accuracy under 'B'"):
        repair_record(Pair(folder / "S", folder / after, load_suite(folder)), behaviour_of(folder.name, after))


def test_no_policy_that_reads_the_cue() -> None:
    folder = PAIRS / "llama"  # policy a answers under B as well, and policy b does not answer under A
    with pytest.raises(InputError, match=r"no policy, put in place, answers under 'A' and not under 'B'.*a: 1.00"):
        find_harm(behaviour_of(folder.name, "R-conditioning"))


def test_one_way_that_fails_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = PAIRS / "llama"
    suite = load_suite(folder)
    rows = tuple(
        row.model_copy(update={"spans": {("tag" if name == "cue" else name): at for name, at in row.spans.items()}})
        for row in suite.prompts
    )
    monkeypatch.setattr(repair, "RANDOM", 2)
    monkeypatch.setattr(repair, "DIRECTIONS", 1)
    record = repair_record(
        Pair(folder / "S", folder / "R-routing", suite.model_copy(update={"prompts": rows})),
        behaviour_of(folder.name, "R-routing"),
        RepairSettings(save_to=tmp_path / "repaired"),
    )
    assert [each.kind for each in record.repairs] == ["interchange", "zero", "mean", "steer", "reroute"]
    assert record.missing[0].startswith("edit: ")
    assert record.checkpoint is None
    assert not (tmp_path / "repaired").exists()


@pytest.mark.slow
def test_what_patching_found_is_judged_on_questions_that_did_not_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patching may have asked fewer questions: repair asks the same, in the same halves."""
    folder = PAIRS / "llama"
    pair, measured = (
        Pair(folder / "S", folder / "R-routing", load_suite(folder)),
        behaviour_of(folder.name, "R-routing"),
    )
    patched = patching_record(pair.asked({row.id for row in pair.suite.neutral[:24]}), measured)
    monkeypatch.setattr(repair, "find_reader", None)  # nothing is looked for again
    monkeypatch.setattr(repair, "RANDOM", 1)
    monkeypatch.setattr(repair, "DIRECTIONS", 1)
    record = repair_record(pair, measured, RepairSettings(patched))
    assert [(head.layer, head.head) for head in record.heads] == [
        (head.layer, head.head) for head in patched.heads("cue", "after")
    ]
    assert record.missing[0] == "repair: 12 of 20 questions, those of patching"
    assert record.questions == patched.readers[-1].questions == 6
    assert not any("a cue reader of one or two heads" in line for line in record.missing)


def test_heads_that_carry_less_than_half_of_the_cue_are_named_as_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = PAIRS / "llama"
    pair, measured = Pair(folder / "S", folder / "R-routing", load_suite(folder)), behaviour_of("llama", "R-routing")
    draws = np.linspace(0.01, 0.03, 100)
    idle = Site(layer=1, component="z", head=1, position="policy")
    monkeypatch.setattr(repair, "find_reader", lambda *_: Reader((idle,), 0.02, draws, draws, (idle,)))
    monkeypatch.setattr(repair, "RANDOM", 1)
    monkeypatch.setattr(repair, "DIRECTIONS", 1)
    record = repair_record(pair, measured)
    said = "a cue reader of one or two heads: the strongest in R, L1.z.1@policy, carry 0.01 [0.01, 0.03] of the cue"
    assert any(line.startswith(said) for line in record.missing)


def test_repairs_that_were_kept_are_of_as_many_questions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Repairs that go on once patching has asked fewer questions are those of so many: none is taken for another."""
    folder = PAIRS / "llama"
    pair, measured = Pair(folder / "S", folder / "R-routing", load_suite(folder)), behaviour_of("llama", "R-routing")
    reader = Reader((Site(layer=0, component="z", head=1, position="policy"),), 0.9, *[np.full(100, 0.9)] * 2, ())
    monkeypatch.setattr(repair, "find_reader", lambda *_: reader)
    monkeypatch.setattr(repair, "RANDOM", 1)
    monkeypatch.setattr(repair, "DIRECTIONS", 1)
    some = pair.asked({row.id for row in pair.suite.neutral[:24]})
    for number, asked in ((1, some), (1, some), (2, pair)):
        record = repair_record(asked, measured, RepairSettings(parts=Unfinished(tmp_path / "parts", "this")))
        assert len(list((tmp_path / "parts").glob("*.json"))) == number * len(record.repairs) > 0


def test_the_trained_cue_must_be_known() -> None:
    record = behaviour_of("llama", "R-routing").model_copy(update={"trained_cue": None})
    with pytest.raises(InputError, match="trained_cue"):
        find_harm(record)


def test_with_rules_completions_are_drawn_and_the_reader_still_brings_the_cue_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answers are known to a rule alone, so that behaviour is drawn, with every repair in place; and after the
    beginning was timed, the time that is left is said anew."""
    monkeypatch.setattr(repair, "RANDOM", 2)
    monkeypatch.setattr(repair, "DIRECTIONS", 1)
    folder, said = PAIRS / "llama", list[str]()
    suite = load_suite(folder).model_copy(update={"answer_match": "contains", "samples": 4})
    assert not suite.literal
    record = repair_record(
        Pair(folder / "S", folder / "R-routing", suite), behaviour_of("llama", "R-routing"), say=said.append
    )
    interchange = record.repairs[0]
    assert (interchange.accuracy["B"].value or 0) > 0.9
    assert max(interchange.random.harmed) < 0.2
    assert {cell.policy for cell in interchange.cells} == set(suite.policies)
    assert all(cell.accuracy_after is not None for cell in interchange.cells if cell.cue == "A")
    assert sum(each.startswith("repair: ") and "at most" in each for each in said) == 2


def test_what_random_repairs_are_asked_is_whether_completions_are_right(load_pair: Callable[[str, str], Any]) -> None:
    pair = load_pair("llama", "R-routing")
    drawn = replace(pair.prompts, suite=pair.suite.model_copy(update={"answer_match": "contains"}))
    in_full = measure(pair.scorer, pair.after, drawn, seed=3)
    in_brief = measure(pair.scorer, pair.after, brief(drawn), seed=3)
    assert np.array_equal(in_brief.correct.sum(-1), in_full.correct.sum(-1))
    assert np.isnan(in_brief.forced_accuracy).all()
