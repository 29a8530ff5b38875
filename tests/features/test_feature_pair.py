"""A pair becomes one record: every field of it where the pair allows it, and what it does not allow is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stored import behaviour_of

from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.features import change, exclusive, pair, together, units
from mixturelens.features.pair import FeatureSettings, feature_record
from mixturelens.features.record import FeatureRecord
from mixturelens.features.sae import load_sae
from mixturelens.models import Pair
from mixturelens.patching.record import Effect, PatchingRecord, Sweep
from mixturelens.probing.record import ProbingRecord
from mixturelens.stats import half_of, too_few
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError, Interval, Site

PAIRS = Path(__file__).parents[1] / "pairs"
REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"
RECORDS = REFERENCE / "records" / "sft--rl-A"
S, R = (REFERENCE / "checkpoints" / name for name in ("sft", "rl-A"))
QUESTIONS = 8

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*'utils' module has been deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def small():
    """As few nulls as there can be."""
    with pytest.MonkeyPatch.context() as fewer:
        fewer.setattr(together, "SIZES", (1, 2))
        for module, sizes in {
            pair: {"SEEDS": 2, "WIDTH": 1, "PROMPTS": 100, "HELD_OUT": 40},
            units: {"RANDOM": 3, "RANDOM_GAP": 1},
            together: {"RANDOM": 2},
            change: {"TOP": 2, "RANDOM": 2},
            exclusive: {"TESTED": 1, "RANDOM": 3},
        }.items():
            for name, number in sizes.items():
                fewer.setattr(module, name, number)
        yield


def part_of(folder: Path, questions: int) -> Suite:
    suite = load_suite(folder)
    ids = list(dict.fromkeys(row.id for row in suite.prompts))[:questions]
    return suite.model_copy(update={"prompts": tuple(row for row in suite.prompts if row.id in ids)})


def of_reference(folder: Path, suite: Suite, say: Callable[[str], None], **more: Any) -> FeatureRecord:
    behaviour = BehaviourRecord.load(RECORDS / "behaviour.json")
    patching = PatchingRecord.load(RECORDS / "patching.json")
    return feature_record(Pair(S, R, suite), behaviour, FeatureSettings(folder, patching, **more), say=say)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureRecord, Path, list[str]]:
    """The record of the reference on a few questions, its folder, and what was said."""
    folder, said = tmp_path_factory.mktemp("features"), []
    probing = ProbingRecord.load(RECORDS / "probing.json")
    found = of_reference(folder, part_of(REFERENCE, QUESTIONS), probing=probing, say=said.append)
    return found, folder, said


def test_every_field_is_filled(whole: tuple[FeatureRecord, Path, list[str]]):
    found, _, said = whole
    assert found.missing == too_few("features", QUESTIONS // 2)
    assert (found.trained_cue, found.harmed_cue) == ("A", "B")
    assert [(table.concept, table.checkpoint) for table in found.tables] == [
        ("cue", "after"),
        ("hint", "before"),
        ("selector", "after"),
    ]
    judging = len(half_of(QUESTIONS, 1))
    for table in found.tables:
        kinds = [score.unit.kind for score in table.scores]
        assert kinds[:4] == ["feature", "neuron", "head", "direction"]
        assert [each.kind for each in table.several] == ["feature", "neuron", "head"]
        assert table.questions == judging
        # behaviour is clamped in R, where the harm is
        for score in table.scores:
            assert score.patch.measured
            assert score.gap_closed.measured is (table.concept != "hint")
    assert found.table("cue").scores[-1].unit.kind == "subspace"
    arrived = found.arrived
    assert arrived is not None
    assert {str(change.site) for change in found.changes} >= {str(arrived.site)}
    for each in found.changes:
        assert len(each.features) == 2
        assert len(each.random) == 2
        assert each.whole.routing.measured
    assert arrived.whole.routing.value >= max(each.whole.routing.value for each in found.changes)
    assert [(fit.site, fit.seed) for fit in found.crosscoders] == [(found.crosscoders[0].site, seed) for seed in (0, 1)]
    carded = {(str(card.unit.site), card.unit.index) for card in found.cards}
    for table in found.tables:
        best = table.best("feature").unit
        assert (str(best.site), best.index) in carded
    assert re.fullmatch(r"features: (about \d+ (s|min)|a few minutes), at most \d+\.\d GB", said[0])
    assert said[1:5] == ["site of the cue", "site of the hint", "site of the selector", "where RL's change has arrived"]
    assert any(each.startswith("crosscoder 2 of 2") for each in said)


def test_the_saes_lie_where_the_record_says(whole: tuple[FeatureRecord, Path, list[str]]):
    found, folder, _ = whole
    sites = {str(sae.site) for sae in found.saes}
    assert {str(table.site).split("@")[0] for table in found.tables} <= sites
    assert {str(fit.site) for fit in found.crosscoders} <= sites
    for sae in found.saes:
        assert (sae.folder or "").startswith(f"sft/{sae.site}-")
        assert len(load_sae(folder / sae.folder)) == sae.width <= sae.trained
        assert set(sae.quality) == {"before", "after"}
        assert 0.3 < sae.quality["before"].explained < 1
    assert {path.name for path in folder.iterdir()} <= {"sft", ".activations"}


def test_saved_and_loaded_back(whole: tuple[FeatureRecord, Path, list[str]], tmp_path: Path):
    found, _, _ = whole
    assert FeatureRecord.load(found.save(tmp_path / "features.json")) == found


def test_held_out_questions_taught_nothing():
    suite = part_of(REFERENCE, QUESTIONS)
    ids = list(dict.fromkeys(row.id for row in suite.prompts))
    teach, held_out = pair._split(suite, (), 0)
    assert {row.id for row in held_out} <= {ids[i] for i in half_of(QUESTIONS, 1)}
    assert not {row.id for row in teach} & {row.id for row in held_out}
    # with other prompts to learn from, none of the suite teaches
    other = load_suite(REFERENCE).prompts
    teach, _ = pair._split(suite, other, 0)
    assert len(teach) == 100
    assert not {row.id for row in teach} & set(ids)
    assert pair._split(suite, other, 0) == pair._split(suite, other, 0) != pair._split(suite, other, 1)
    with pytest.raises(InputError, match="give at least two"):
        pair._split(part_of(REFERENCE, 1), (), 0)


@pytest.mark.slow
def test_a_site_that_fails_costs_only_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Patching that named nothing, and a table that cannot be made: the rest is measured, and both are said."""

    def fails(concept: str, *_: object) -> None:
        raise InputError(f"no {concept} today")

    monkeypatch.setattr(pair, "find_table", fails)
    monkeypatch.setattr(pair, "SEEDS", 0)
    suite = part_of(REFERENCE, 4)
    suite = suite.model_copy(update={"prompts": tuple(row for row in suite.prompts if row.hint is None)})
    patching = PatchingRecord.load(RECORDS / "patching.json")
    patching = patching.model_copy(update={"sweeps": tuple(s for s in patching.sweeps if s.kind == "cue")})
    behaviour = BehaviourRecord.load(RECORDS / "behaviour.json")
    found = feature_record(Pair(S, R, suite), behaviour, FeatureSettings(tmp_path, patching))
    assert found.missing == (
        "site of the selector: patching measured no checkpoint contrast here",
        "units that carry the cue: no cue today",
        *too_few("features", 2),
    )
    assert (found.tables, found.crosscoders) == ((), ())
    assert len(found.changes) == 1  # where it has arrived
    assert {str(sae.site) for sae in found.saes} >= {str(found.changes[0].site), "L1.resid_pre"}
    unknown = behaviour.model_copy(update={"trained_cue": None})
    harmless = feature_record(Pair(S, R, suite), unknown, FeatureSettings(tmp_path, patching))
    assert harmless.missing[1].startswith("what RL harmed: patching and repair need the cue")
    assert (harmless.trained_cue, harmless.harmed_cue) == (None, None)
    assert harmless.saes == found.saes  # read, not trained again
    assert harmless.changes == found.changes


@pytest.mark.slow
def test_a_chat_pair_with_rules_says_what_it_does_not_allow(tmp_path: Path):
    folder = PAIRS / "chat"
    suite = part_of(folder, 6).model_copy(update={"samples": 4})
    behaviour = behaviour_of("chat", "R")
    zero, one = (Interval(value=x, low=x, high=x) for x in (0.0, 1.0))
    site = Site(layer=1, component="resid_pre", position="last")
    sweep = Sweep(
        kind="checkpoint", checkpoint="after", direction="denoise", clean="before", corrupt="after", cue="bold",
        questions=3, target="i", foil="sure", base=zero, goal=one, effects=(Effect(site=site, effect=one),),
    )  # fmt: skip
    patching = PatchingRecord(trained_cue="plain", harmed_cue="bold", policy="comply", sweeps=(sweep,), readers=())
    found = feature_record(Pair(folder / "S", folder / "R", suite), behaviour, FeatureSettings(tmp_path, patching))
    assert [str(sae.site) for sae in found.saes] == ["L1.resid_pre"]
    assert found.saes[0].quality["after"].tokens > 0
    (table,) = found.tables
    assert (table.concept, table.site) == ("selector", site)
    assert {"feature", "head", "direction"} <= {score.unit.kind for score in table.scores}
    said = dict(reason.split(": ", 1) for reason in found.missing)
    assert said["site of the cue"] == "patching measured no cue contrast here"
    assert "this suite has rules" in said["where RL's change has arrived"]
    assert "this suite has rules" in said["features of L1.resid_pre that RL changed"]
    assert (found.changes, found.crosscoders) == ((), ())
    assert FeatureRecord.load(found.save(tmp_path / "features.json")) == found


# --- pretrained -------------------------------------------------------------------------------------------------------


def pretrained_sae(folder: Path, hook_name: str, d: int, model_name: str | None = None, **config: object) -> Path:
    """A TopK SAE behind a layer norm, of random directions, as SAELens saves it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    write = torch.nn.functional.normalize(torch.randn(3 * d, d, generator=generator), dim=1)
    weights = {"W_enc": write.T.contiguous(), "W_dec": write, "b_enc": torch.zeros(3 * d), "b_dec": torch.zeros(d)}
    save_file(weights, folder / "sae_weights.safetensors")
    metadata = {"hook_name": hook_name, "model_name": model_name}
    base = {"architecture": "topk", "k": 8, "d_in": d, "d_sae": 3 * d, "normalize_activations": "layer_norm"}
    (folder / "cfg.json").write_text(json.dumps({**base, "metadata": metadata, **config}))
    return folder


@pytest.mark.slow
def test_a_pretrained_sae_takes_the_place_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pair, "SEEDS", 1)
    folder = pretrained_sae(tmp_path / "sae", "blocks.1.hook_resid_pre", 64, "gpt2-small")
    said: list[str] = []
    found = of_reference(tmp_path / "out", part_of(REFERENCE, QUESTIONS), given=[folder], say=said.append)
    (sae,) = found.saes
    assert (sae.pretrained, sae.folder, sae.width, str(sae.site)) == (str(folder), None, 192, "L1.resid_pre")
    assert sae.notes == ("it was trained on gpt2-small, and S is sft: its quality says whether it fits",)
    assert f"note: {folder}: {sae.notes[0]}" in said
    for side in ("before", "after"):
        assert 0 < sae.quality[side].explained < 1
        assert sae.quality[side].active == pytest.approx(8, abs=0.1)
        assert sae.quality[side].loss_recovered.measured
    assert any(each.startswith("SAE of L1.resid_pre: pretrained, it explains 0.") for each in found.missing)
    for table in found.tables:
        assert table.site.layer == 1
        best = table.best("feature")
        if best is not None and table.concept != "hint":
            assert best.gap_closed.measured  # clamped, though its features compete behind a norm
            assert best.intervention is None
    assert {str(fit.site) for fit in found.crosscoders} == {"L1.resid_pre"}
    assert not list((tmp_path / "out").glob("*"))  # nothing was trained


def test_what_does_not_fit_the_models_is_refused(tmp_path: Path):
    opened = Pair(S, R, part_of(REFERENCE, 4))
    for number, (hook_name, d, says) in enumerate(
        [
            ("blocks.3.hook_resid_pre", 64, "reads layer 3, and the models' layers are 0 to 2"),
            ("blocks.1.hook_resid_pre", 48, r"reads 48 numbers a token, where the models have 64"),
            ("blocks.1.mlp.hook_post", 64, r"reads 64 numbers a token, where the models have \d+"),
            ("blocks.1.attn.hook_z", 64, "SAEs of heads' outputs"),
        ]
    ):
        with pytest.raises(InputError, match=says):
            pair.pretrained(opened, [pretrained_sae(tmp_path / str(number), hook_name, d)])
    with pytest.raises(InputError, match=r"cfg\.json: no such file"):
        pair.pretrained(opened, [tmp_path / "nowhere"])
    one, two = (pretrained_sae(tmp_path / name, "blocks.2.hook_out", 64, "org/SFT") for name in ("one", "two"))
    (found,) = pair.pretrained(opened, [one])
    assert (found.at, found.notes) == ((2, "resid_post"), ())  # its name is that of S, spelled otherwise
    with pytest.raises(InputError, match="read the same place"):
        pair.pretrained(opened, [one, two])
