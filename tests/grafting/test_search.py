"""From coarse to fine: the planted layers are found, bounds hold, and readings that begin late are the same."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.pair import behaviour_record
from mixturelens.behaviour.prompts import prepare
from mixturelens.grafting import plan as plans
from mixturelens.grafting import search as searching
from mixturelens.grafting.components import weights_of
from mixturelens.grafting.effects import Judge
from mixturelens.grafting.graft import GraftTrial, WorkingModel
from mixturelens.grafting.pair import GraftSettings, graft_record
from mixturelens.grafting.path import attribute
from mixturelens.grafting.plan import GraftingPlan, plan, work
from mixturelens.grafting.readings import read, read_weights
from mixturelens.grafting.record import GraftRecord
from mixturelens.grafting.search import MATTERS, pieces, search, unsound
from mixturelens.grafting.starts import starts_of
from mixturelens.grafting.usual import make_cells
from mixturelens.hooks.weights import components_of
from mixturelens.models import Budget, Pair, end_tokens, load_model, load_tokenizer
from mixturelens.models.cost import size_of
from mixturelens.suite import load_suite

LAYERS, KEPT = 9, (3, 6)
"""Of the deep pair: layers, and those that do something; the others add nothing to the stream, in S as in R."""


def trial_of(folder: Path, after: str, prompts: int = 40) -> GraftTrial:
    s, r = load_model(folder / "S"), load_model(folder / after)
    suite, tokenizer = load_suite(folder), load_tokenizer(folder / "S")
    cells = make_cells(
        prepare(suite, suite.neutral[:prompts], tokenizer), s, Scorer(end_tokens(s, tokenizer), s.config.vocab_size)
    )
    before, after_state, every = weights_of(s), weights_of(r), components_of(s, tokenizer)
    changed = {n: m for n, m in every.items() if any(not torch.equal(before[p], after_state[p]) for p in m)}
    bench = WorkingModel(s, before, after_state, changed, cells)
    return GraftTrial(
        bench, Judge(cells, cells.policies[:2], bench.readings(()), bench.readings(bench.names), cells.grid)
    )


@pytest.fixture(scope="module")
def deep(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored two-layer pair spread over nine layers: what RL did is in two of them, though all nine changed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("deep")
    for file in (pairs / "llama").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = AutoConfig.from_pretrained(pairs / "llama" / "S")
    config.num_hidden_layers = LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * LAYERS
    for number, (name, source) in enumerate((("S", "S"), ("R", "R-both"))):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            model = AutoModelForCausalLM.from_config(config)
        small = dict(load_model(pairs / "llama" / source).named_parameters())
        with torch.no_grad():
            for key, value in model.named_parameters():
                layer = int(key.split(".")[2]) if ".layers." in key else None
                if layer is None:
                    value.copy_(small[key])
                elif layer in KEPT:
                    value.copy_(small[key.replace(f".{layer}.", f".{KEPT.index(layer)}.")])
                elif key.endswith(("o_proj.weight", "down_proj.weight")):
                    value.zero_()
        model.save_pretrained(folder / name)
        load_tokenizer(pairs / "llama" / "S").save_pretrained(folder / name)
    return folder


def one_by_one(trial: GraftTrial) -> dict[str, float]:
    """Component -> the largest share that it moves by itself, in S or missing from R."""
    names = trial.bench.names
    effects = {name: (trial.effects([name]), trial.effects([n for n in names if n != name])) for name in names}
    return {name: searching.bound(*each) or 0.0 for name, each in effects.items()}


# --- readings ---------------------------------------------------------------------------------------------------------


def test_a_prompt_with_branches_reads_as_its_rows_do(load_pair: Any):
    pair = load_pair("chat", "R")
    cells = make_cells(prepare(pair.suite, pair.suite.neutral[:8], pair.tokenizer), pair.before, pair.scorer)
    assert cells.shared
    plain = replace(cells, shared=False)
    assert sum(b.ids.numel() for b in cells.batches) < 0.75 * sum(b.ids.numel() for b in plain.batches)
    with torch.no_grad():
        for model in (pair.before, pair.after):
            once, rows = read(model, cells), read(model, plain)
            torch.testing.assert_close(once.log_c, rows.log_c, atol=2e-5, rtol=0)
            torch.testing.assert_close(once.log_p, rows.log_p, atol=2e-5, rtol=0)
            torch.testing.assert_close(read_weights(model, cells), rows.log_c, atol=2e-5, rtol=0)


def test_a_model_that_does_not_heed_such_masks_is_read_row_by_row(load_pair: Any, monkeypatch: pytest.MonkeyPatch):
    pair = load_pair("chat", "R")
    monkeypatch.setattr("mixturelens.grafting.cells._seen", lambda branch: None)
    assert not make_cells(prepare(pair.suite, pair.suite.neutral[:4], pair.tokenizer), pair.before, pair.scorer).shared


def test_what_begins_behind_layers_that_are_alike_reads_the_same_to_the_bit(pairs: Path):
    trial = trial_of(pairs / "chat", "R", 8)
    bench = trial.bench
    starts = starts_of(bench.model, bench.cells)
    assert starts is not None
    late = bench.on(bench.cells, trial.judge.before, trial.judge.after, starts)
    late.begin()
    ran: list[int] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda *_, k=k: ran.append(k)) for k, layer in enumerate(starts.layers)
    ]
    skipped = 0
    for names in ([n] for n in bench.names):
        for some in (names, bench.rest(names)):
            expected = bench.readings(some)
            ran.clear()
            found = late.readings(some)
            skipped += len(starts.layers) - len(set(ran))
            assert torch.equal(found.log_c, expected.log_c), some
            assert torch.equal(found.log_p, expected.log_p), some
    assert skipped > len(bench.names) / 2
    noise, begun = (each.noisy([bench.names[-1]], 3) for each in (bench, late))
    assert torch.equal(noise.log_c, begun.log_c)
    with contextlib.suppress(ZeroDivisionError), starts.behind("before", 1):
        raise ZeroDivisionError
    assert all("forward" not in vars(layer) for layer in starts.layers)
    for handle in handles:
        handle.remove()


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_planted_layers_are_found_and_the_others_left_closed(deep: Path):
    trial = trial_of(deep, "R")
    path = attribute(trial.bench, ("a", "b"))
    found = search(trial, 200, path)
    alone = one_by_one(trial)
    carriers = {name for name, share in alone.items() if share >= MATTERS}
    kept = pieces(found)
    assert carriers
    assert {int(name[1]) for name in carriers if "." in name} <= set(KEPT)
    assert carriers <= set(kept)  # each of them was grafted by itself
    assert {name for name in kept if kept[name] == (name,) and alone[name] >= MATTERS} == carriers
    assert sorted(each for members in kept.values() for each in members) == sorted(trial.bench.names)
    closed = [block for block in found.blocks if not block.opened and len(block.components) > 1]
    assert closed
    for block in closed:
        assert block.bound is not None
        assert max(alone[name] for name in block.components) <= block.bound + 1e-6
        assert block.bound < MATTERS
    assert unsound(found) == ()
    assert found.short == ()
    assert found.grafts == 2 * len(found.blocks) < 2 * len(trial.bench.names)


@pytest.mark.parametrize(
    ("shape", "after"),
    [("llama", "R-both"), ("gpt2", "R-routing"), ("gpt_neox", "R-skill"), ("qwen2", "R-conditioning"), ("chat", "R")],
)
def test_a_search_finds_the_carriers_that_grafts_one_by_one_find(pairs: Path, shape: str, after: str):
    trial = trial_of(pairs / shape, after)
    found, every = search(trial, 200), search(trial, 0, everything=True)
    alone = one_by_one(trial)
    assert {b.name: b.bound for b in every.blocks if len(b.components) == 1} == pytest.approx(alone)
    assert {name for name, share in alone.items() if share >= MATTERS} <= set(pieces(found))


def test_the_reference_gives_the_same_carriers():
    reference = Path(__file__).parents[2] / "artifacts" / "reference"
    for cue in "AB":
        folder = reference / "checkpoints"
        s, r, tokenizer = load_model(folder / "sft"), load_model(folder / f"rl-{cue}"), load_tokenizer(folder / "sft")
        suite = load_suite(reference)
        scorer = Scorer(end_tokens(s, tokenizer), s.config.vocab_size)
        cells = make_cells(prepare(suite, suite.neutral[:40], tokenizer), s, scorer)
        before, later = weights_of(s), weights_of(r)
        every = components_of(s, tokenizer)
        changed = {n: m for n, m in every.items() if any(not torch.equal(before[p], later[p]) for p in m)}
        bench = WorkingModel(s, before, later, changed, cells)
        judge = Judge(cells, ("a", "b"), bench.readings(()), bench.readings(bench.names), cells.grid)
        trial = GraftTrial(bench, judge)
        carriers = {name for name, share in one_by_one(trial).items() if share >= MATTERS}
        assert carriers
        assert carriers <= set(pieces(search(trial, 200)))


def test_a_search_that_may_not_go_on_says_what_it_left(deep: Path):
    trial = trial_of(deep, "R")
    found = search(trial, 8)
    assert found.grafts <= 8
    assert found.short
    assert all(not block.opened for block in found.blocks if block.name in found.short)


@pytest.mark.slow
def test_record_of_a_deep_model(deep: Path, tmp_path: Path):
    suite = load_suite(deep)
    suite = suite.model_copy(update={"prompts": suite.prompts[:40]})
    pair = Pair(deep / "S", deep / "R", suite)
    measured = behaviour_record(pair)
    said: list[str] = []
    found = graft_record(pair, measured, settings=GraftSettings(save_to=tmp_path / "rollback"), say=said.append)
    assert re.fullmatch(r"grafts: (about \d+ (s|min)|a few minutes), at most \d+\.\d GB", said[0])
    assert found.search is not None
    assert found.search.questions == plans.SEARCHED
    assert GraftRecord.load(found.save(tmp_path / "graft.json")) == found
    assert [each.name for each in found.components] == [part.name for part in found.parts if part.change > 0]
    looked = {block.name for block in found.search.blocks}
    for each in found.components:
        assert each.suffices.routing.measured == (each.name in looked)
        assert each.routing.measured
    assert found.factorial is not None
    assert set(found.factorial.selector) <= set(pieces(found.search))
    assert any("bounds them" in each for each in found.missing)
    everything = graft_record(pair, measured, GraftSettings(exhaustive=True))
    assert all(each.suffices.routing.measured for each in everything.components)
    assert everything.search is not None
    assert everything.search.threshold == 0


# --- plans ------------------------------------------------------------------------------------------------------------


def test_with_less_time_less_is_looked_at_and_that_is_said(pairs: Path):
    folder = pairs / "llama"
    pair = Pair(folder / "S", folder / "R-both", load_suite(folder))
    prompts = prepare(pair.suite, pair.suite.neutral, pair.tokenizer)
    found, needed = plan(pair, prompts, 9)
    assert found == GraftingPlan(None)
    assert needed.seconds > 0
    assert plan(pair, prompts, 93)[0].searched == plans.SEARCHED
    assert plan(pair, prompts, 93, exhaustive=True)[0].everything
    soon = Pair(folder / "S", folder / "R-both", pair.suite, budget=Budget(minutes=1e-9))
    hurried, least = plan(soon, prompts, 93)
    assert not hurried.path
    assert not hurried.positions
    assert least.seconds < needed.seconds or hurried.searched == plans.SEARCHED // 2
    assert re.match(r"--minutes: grafts take (about \d+ (s|min)|a few minutes)", hurried.missing[-1])


def test_less_work_is_less(pairs: Path):
    folder = pairs / "chat"
    pair = Pair(folder / "S", folder / "R", load_suite(folder))
    prompts, size = prepare(pair.suite, pair.suite.neutral, pair.tokenizer), size_of(pair)
    works = [work(each, prompts, 93, size).tokens for each in plans._plans(True, True)]
    assert works == sorted(works, reverse=True)
