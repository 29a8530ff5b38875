"""Planted circuits: held exactly, and nothing else carries cue or hint, trained or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.hooks.weights import output_weights
from mixturelens.lab.organism import build_model, build_tokenizer, prompt_text, questions
from mixturelens.lab.proving import planted as module
from mixturelens.lab.proving import proof as proving
from mixturelens.lab.proving.organisms import Architecture, Fitting, Lessons, fit, rows_of, target_of
from mixturelens.lab.proving.planted import Planted, grow, hold, plan, plant, spec_of

ARCHITECTURES = get_args(Architecture)
EACH = pytest.mark.parametrize(("architecture", "number"), [(a, n) for n, a in enumerate(ARCHITECTURES)])
"""All four architectures; 0 and 3 have two layers, 1 sends the hint through an MLP, 2 has two readers."""


def fresh(architecture: Architecture, number: int) -> tuple[Planted, Any, Any, Any]:
    where = plan(architecture, number)
    spec = spec_of(where)
    tokenizer = build_tokenizer(spec)
    model = build_model(spec, tokenizer)
    plant(model, where, spec, tokenizer)
    return where, spec, tokenizer, model


def randomise(model: Any, where: Planted, spec: Any, tokenizer: Any) -> None:
    """Biases and norms too, which a fresh model has at 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    hold(model, where, spec, tokenizer, even=True)  # every position attends to the tag


def logits(model: Any, spec: Any, tokenizer: Any, cue: str, hint: str | None, policy: str = "[a]") -> torch.Tensor:
    vocabulary = tokenizer.get_vocab()
    texts = [f"{prompt_text(spec, cue, q, hint)} {policy} {q.answer}" for q in questions(spec).evaluation[:4]]
    ids = torch.tensor([[vocabulary[word] for word in text.split()] for text in texts])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_plan_is_deterministic_and_varies(architecture: Architecture) -> None:
    plans = [plan(architecture, number) for number in range(9)]
    assert plans == [plan(architecture, number) for number in range(9)]
    assert len({each.heads for each in plans}) > 5
    for each in plans:
        readers, selector = each.heads
        assert len(readers) == 1 + each.redundant
        assert len({*readers, selector, *each.decoys}) == 2 * (2 + each.redundant)  # one head, one job
        assert len({node.split(".")[0] for node in (*readers, selector)}) == 2 + each.redundant  # a layer each
        assert each.reader[-1] == f"L{each.layers - 1}.mlp"
        if architecture == "gpt_neox":  # attention of a layer comes too late for its MLP
            assert all(int(node[1]) < each.layers - 1 for node in readers)
    assert {each.redundant for each in plans} == {True, False}
    assert {len(each.selector) for each in plans} == {1, 2}


@EACH
def test_without_the_planted_head_the_model_is_blind(architecture: Architecture, number: int) -> None:
    where, spec, tokenizer, model = fresh(architecture, number)
    randomise(model, where, spec, tokenizer)
    by_cue = [logits(model, spec, tokenizer, cue, None) for cue in "AB"]
    by_hint = [logits(model, spec, tokenizer, "A", hint) for hint in "ab"]
    assert apart(*by_cue) > 1e-3
    assert apart(*by_hint) > 1e-3
    blocks, jobs = list(module._blocks(model)), module._jobs(where)
    for job in jobs[:-1]:
        job.weights(blocks)[1].zero_()
    assert apart(*(logits(model, spec, tokenizer, cue, None) for cue in "AB")) < 1e-5
    jobs[-1].weights(blocks)[1].zero_()
    assert apart(*(logits(model, spec, tokenizer, "A", hint) for hint in "ab")) < 1e-5


@EACH
def test_decoys_carry_what_readers_carry_and_change_nothing(architecture: Architecture, number: int) -> None:
    where, spec, tokenizer, model = fresh(architecture, number)
    randomise(model, where, spec, tokenizer)
    before = [logits(model, spec, tokenizer, cue, "a") for cue in "AB"]
    lens = Lens(model, tokenizer)
    found = []

    def look(z: torch.Tensor) -> None:
        found.append(z.clone())

    points = [(lens.point(layer, "z"), look) for layer in range(lens.layers)]
    with lens.hooked(points):
        bridged = [logits(model, spec, tokenizer, cue, "a") for cue in "AB"]
    assert max(apart(*each) for each in zip(before, bridged, strict=True)) < 1e-4
    for job in module._jobs(where)[:-1]:
        layer, head = job.head
        under = found[layer], found[lens.layers + layer]
        assert apart(under[0][:, :, head], under[0][:, :, job.decoy[1]]) < 1e-5
        assert apart(under[0][:, 1:, head], -under[1][:, 1:, head]) < 1e-5  # the sign of the cue, and nothing else
        assert float(under[0][:, :, head].abs().max()) > 0.05
        written, axis = output_weights(lens, layer)[job.decoy[1]], module._axis(job.unread)
        assert apart(written, (written @ axis)[:, None] * axis) < 1e-6


@EACH
def test_training_leaves_everything_held(architecture: Architecture, number: int) -> None:
    where, spec, tokenizer, model = fresh(architecture, number)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    rows = rows_of(spec, target_of(spec), tokenizer, Lessons(questions(spec).sft[:40]))
    before, after = module._in_turn(where, spec, tokenizer)
    fit(model, rows, Fitting(4), before, after)
    trained = {name: value.detach().clone() for name, value in model.named_parameters()}
    hold(model, where, spec, tokenizer)  # a projection: nothing is left to do
    assert max(apart(trained[name], value) for name, value in model.named_parameters()) < 1e-6
    assert all(apart(start[name], value) > 0 for name, value in trained.items())
    for job in module._jobs(where):
        value, output = job.weights(list(module._blocks(model)))
        assert float(value.norm()) > 0.5  # still there, after it was silent in turn
        assert float(output.norm()) > 0.1


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One organism, trained for a while: its skill is not finished, its circuits are."""
    folder = tmp_path_factory.mktemp("planted") / "llama-0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHANGING", 40)
        patch.setattr(proving, "ASKED", 3)
        grow(plan("llama", 0), folder, steps=150)
        yield folder


@pytest.mark.slow
def test_proof_of_a_grown_organism(grown: Path) -> None:
    found = proving.proof(grown)
    assert max(found.inert.values()) < 1e-5
    assert min(found.carried.values()) > 0.999
    assert found.blind < 1e-5
    assert all(abs(weight - 0.5) < 0.02 for weight in found.weights.values())
    assert found.alone == (pytest.approx(found.accuracy, rel=1e-2),)
    assert found.grafted[0] > 0.9
    assert abs(found.grafted[1]) < 0.1
    assert found.change.selector


@pytest.mark.slow
def test_a_wrong_address_does_not_pass(grown: Path) -> None:
    where, lens = plan("llama", 0), load_lens(grown / "checkpoints" / "sft")
    spec, (reader, mlp) = spec_of(where), where.reader
    into, source = (proving._rows(spec, lens.tokenizer, questions(spec).evaluation[:6], cue, "b") for cue in spec.cues)
    nodes = [reader, mlp, *where.decoys, *where.selector]
    right, _ = proving._interchanged(lens, into, source, nodes, (reader, mlp), "cue")
    wrong, _ = proving._interchanged(lens, into, source, nodes, (where.decoys[0], mlp), "cue")
    missing, moved = proving._interchanged(lens, into, source, nodes, (where.decoys[0],), "cue")
    assert right < 1e-5 < 0.01 < wrong
    assert missing > 0.01
    assert moved == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_what_is_there_is_not_grown_again(grown: Path) -> None:
    weights = grown / "checkpoints" / "sft" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    grow(plan("llama", 0), grown)
    assert weights.stat().st_mtime_ns == before
