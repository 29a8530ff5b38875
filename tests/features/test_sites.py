"""Patching names the site of a concept, and splices of R into S say by where its change has arrived."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scenes import PAIRS

from mixturelens.features.change import Splices, half_prompts
from mixturelens.features.sites import ARRIVED, CARRIES, NAMED, QUESTIONS, arrived_at, named_site
from mixturelens.features.splice import Crossing, whole
from mixturelens.hooks.lens import load_lens
from mixturelens.patching.record import Effect, PatchingRecord, Sweep
from mixturelens.shown import Rule
from mixturelens.suite import load_suite
from mixturelens.types import NOT_MEASURED, InputError, Interval, Site

REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"


def sweep(effects: dict[str, float | None], kind: str = "cue", checkpoint: str = "after", **more: object) -> Sweep:
    """`L1.resid_pre@3`, as sites are printed, and its effect."""
    found = []
    for name, value in effects.items():
        address, _, position = name.partition("@")
        layer, component, *head = address.split(".")
        at = int(position) if position.isdigit() else position or None
        site = Site(layer=int(layer[1:]), component=component, head=int(head[0]) if head else None, position=at)
        known = NOT_MEASURED if value is None else Interval(value=value, low=value - 0.01, high=value + 0.01)
        found.append(Effect(site=site, effect=known))
    zero, one = (Interval(value=x, low=x, high=x) for x in (0.0, 1.0))
    fields = {
        "kind": kind, "checkpoint": checkpoint, "direction": "denoise", "clean": "A", "corrupt": "B", "questions": 9,
        "target": "x", "foil": "y", "base": zero, "goal": one, "effects": tuple(found),
    }  # fmt: skip
    return Sweep(**(fields | more))


def patching(*sweeps: Sweep) -> PatchingRecord:
    return PatchingRecord(trained_cue="A", harmed_cue="B", policy="a", sweeps=sweeps, readers=())


# --- named by patching ------------------------------------------------------------------------------------------------


def test_the_earliest_stream_that_carries_it():
    found = patching(
        sweep(
            {
                "L0.resid_pre@policy": 0.99,  # the tokens themselves
                "L0.z.3@policy": 0.99,  # no activation of one vector a token
                "L0.attn_out@policy": 0.98,
                "L1.resid_pre@question": 0.89,
                "L1.resid_pre@last": 0.91,
                "L1.resid_pre@policy": 0.95,
                "L2.resid_pre@policy": 1.0,
            }
        )
    )
    assert str(named_site(found, "cue")) == "L1.resid_pre@policy"
    assert CARRIES == 0.9


def test_where_the_prompts_differ_nothing_is_looked_for():
    effects = {"L1.resid_pre@cue": 1.0, "L1.resid_pre@0": 1.0, "L2.resid_pre@8": 0.97}
    assert str(named_site(patching(sweep(effects, spans={"cue": (0,)})), "cue")) == "L2.resid_pre@8"
    # the hint differs at the hint, and not at the cue
    hinted = sweep({"L1.resid_pre@hint": 1.0, "L1.resid_pre@cue": 0.95}, kind="hint", checkpoint="before")
    assert str(named_site(patching(hinted), "hint")) == "L1.resid_pre@cue"


def test_without_such_a_stream_the_output_that_carries_most():
    effects = {"L1.resid_pre@policy": 0.6, "L0.attn_out@policy": 0.7, "L0.mlp_out@policy": 0.2, "L0.z.1@policy": 0.8}
    assert str(named_site(patching(sweep(effects)), "cue")) == "L0.attn_out@policy"
    assert NAMED == 0.5


def test_each_concept_has_its_own_sweep():
    record = patching(
        sweep({"L1.resid_pre@policy": 0.99}, checkpoint="before"),
        sweep({"L2.resid_pre@policy": 0.99}, direction="noise"),
        sweep({"L3.resid_pre@policy": 0.99}),
        sweep({"L4.resid_pre@last": 0.99}, kind="hint", checkpoint="after"),
        sweep({"L5.resid_pre@last": 0.99}, kind="hint", checkpoint="before"),
        sweep({"L6.resid_pre@last": 0.99}, kind="checkpoint"),
    )
    assert [named_site(record, concept).layer for concept in ("cue", "hint", "selector")] == [3, 5, 6]


@pytest.mark.parametrize(
    ("effects", "says"),
    [
        ({}, "no one site carries the cue contrast: no share could be measured, and 0.5 is needed"),
        ({"L1.resid_pre@last": None}, "no share could be measured"),
        ({"L1.mlp_out@last": 0.49, "L0.mlp_out@last": 0.1}, "L1.mlp_out@last carries most, 0.49 of it, and 0.5 is"),
        ({"L1.z.0@last": 1.0, "L0.resid_pre@last": 1.0}, "no share could be measured"),
    ],
)
def test_what_nothing_carries_has_no_site(effects: dict[str, float | None], says: str):
    with pytest.raises(InputError) as caught:
        named_site(patching(sweep(effects)), "cue")
    assert says in str(caught.value)


def test_what_was_not_patched_has_no_site():
    for concept, kind in {"cue": "cue", "hint": "hint", "selector": "checkpoint"}.items():
        with pytest.raises(InputError, match=f"patching measured no {kind} contrast here"):
            named_site(patching(), concept)


@pytest.mark.parametrize("name", ["sft--rl-A", "sft--rl-B"])
def test_the_sites_of_the_reference(name: str):
    record = PatchingRecord.load(REFERENCE / "records" / name / "patching.json")
    cue, hint, selector = (named_site(record, concept) for concept in ("cue", "hint", "selector"))
    assert str(cue) == "L1.resid_pre@8"  # the policy word
    assert hint.position == selector.position == 7  # the last token of the prompt
    assert min(hint.layer, selector.layer) >= 1


# --- where R's change has arrived -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["llama", "gpt_neox"])
def test_the_change_of_a_pair_has_arrived_where_half_of_it_is(shape: str):
    folder = PAIRS / shape
    suite, (s, r) = load_suite(folder), (load_lens(folder / name) for name in ("S", "R-routing"))
    site = arrived_at(s, r, suite)
    assert site.position is None
    prompts = half_prompts(suite, s.tokenizer, 0, QUESTIONS)
    places = [(1, "resid_pre"), (1, "resid_post")]
    full = Splices(Crossing(s, r, places[-1]), prompts).terms([whole])[0].routing.value
    part = Splices(Crossing(s, r, places[0]), prompts).terms([whole])[0].routing.value
    assert full > 0.1
    assert (site.layer, site.component) == (places[0] if part >= ARRIVED * full else places[1])


def test_a_change_of_the_first_layer_has_arrived_before_the_second_and_one_of_the_last_behind_it():
    """S with one layer's MLP of R-both: what it changes is there behind that layer, and not before."""
    folder = PAIRS / "llama"
    suite, s = load_suite(folder), load_lens(folder / "S")
    for layer, expected in ((0, "L1.resid_pre"), (1, "L1.resid_post")):
        edited, other = load_lens(folder / "S"), load_lens(folder / "R-both")
        mine, theirs = (dict(lens.model.model.layers[layer].named_parameters()) for lens in (edited, other))
        with torch.no_grad():
            for name, value in mine.items():
                value.copy_(theirs[name])
        assert str(arrived_at(s, edited, suite)) == expected


def test_nothing_changed_and_rules():
    folder = PAIRS / "llama"
    suite, s = load_suite(folder), load_lens(folder / "S")
    assert str(arrived_at(s, load_lens(folder / "S"), suite)) == "L1.resid_post"
    rules = suite.model_copy(update={"policies": {"a": Rule(regex="^a"), "b": Rule(regex="^b")}})
    with pytest.raises(InputError, match="this suite has rules"):
        arrived_at(s, s, rules)
