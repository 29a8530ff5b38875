"""The steps in order on the reference organism: what is in git is what the docs say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stored import few_nulls

from mixturelens import pipeline
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.behaviour.trajectory import Trajectory
from mixturelens.features.pair import FeatureSettings
from mixturelens.features.record import FeatureRecord, Quality, Sae
from mixturelens.grafting.record import GraftRecord
from mixturelens.lab import runs
from mixturelens.lab.organism import build_suite, load_spec, sft_examples
from mixturelens.models import Pair, load_model, load_tokenizer
from mixturelens.models.source import fingerprint
from mixturelens.patching.record import PatchingRecord
from mixturelens.probing.record import ProbingRecord
from mixturelens.routing.circuit import CircuitRecord
from mixturelens.routing.repair import RepairRecord
from mixturelens.routing.verdict import VerdictRecord, judge
from mixturelens.suite import load_suite
from mixturelens.types import NOT_MEASURED, Site

REFERENCE = Path(__file__).resolve().parents[1] / "artifacts" / "reference"
PAIRS = [("A", "B"), ("B", "A")]


@pytest.fixture(params=PAIRS, ids=["rl-A", "rl-B"], scope="module")
def verdict(request: pytest.FixtureRequest) -> tuple[str, str, VerdictRecord]:
    trained, other = request.param
    return trained, other, VerdictRecord.load(REFERENCE / "records" / f"sft--rl-{trained}" / "verdict.json")


def test_the_reference_is_the_default_recipe() -> None:
    assert runs.load_run(REFERENCE) == load_spec("default")
    assert load_suite(REFERENCE) == build_suite(load_spec("default"))
    size = sum(file.stat().st_size for file in REFERENCE.rglob("*") if file.is_file())
    assert size < 5e6


def test_rl_on_one_tag_drives_the_other_to_zero(verdict: tuple[str, str, VerdictRecord]) -> None:
    trained, other, record = verdict
    assert record.per_cue[trained].after.overall >= 0.97
    assert record.per_cue[other].after.overall <= 0.02
    assert record.verdict == "routing"
    assert record.changed.model_dump() == {"selector": True, "cue_reader": False, "skill": False}
    assert record.dormant_intact


def test_sft_made_the_mixture_of_the_spec() -> None:
    record = BehaviourRecord.load(REFERENCE / "records" / "sft--rl-A" / "behaviour.json")
    spec = load_spec("default")
    for cue, state in record.per_cue.items():
        for policy, row in spec.policies.items():
            assert state.before.weights[policy] == pytest.approx(row.weight, abs=0.03)
            answers = row.table[cue] == "answer"
            forced = state.before.accuracy[policy]
            assert forced is not None
            assert forced >= 0.99 if answers else forced <= 0.001
            assert record.hinted[cue][policy]["before"][policy] >= 0.99
    # every answer and every refusal, with each policy put in place, is where SFT left it
    for cell in record.table:
        assert cell.behaviour == spec.policies[cell.policy].table[cell.cue]
        assert abs(cell.behaviour_change.value or 0) <= 0.02
        assert abs(cell.accuracy_change.value or 0) <= 0.02


def test_the_verdict_follows_from_the_records(verdict: tuple[str, str, VerdictRecord]) -> None:
    trained, _, record = verdict
    records = REFERENCE / "records" / f"sft--rl-{trained}"
    evidence = {
        "graft": GraftRecord.load(records / "graft.json"),
        "features": FeatureRecord.load(records / "features.json"),
    }
    assert judge(BehaviourRecord.load(records / "behaviour.json"), **evidence) == record
    assert record.mechanism.verdict == "routing"
    assert record.mechanism.agrees
    noise, moved = record.controls.pair.noise, record.bits.routing
    assert noise is not None
    assert moved.low > 20 * noise.routing.high


def test_the_records_are_about_these_weights(verdict: tuple[str, str, VerdictRecord]) -> None:
    trained, _, record = verdict
    pair = next(p for p in runs.run_pairs(REFERENCE) if p.suite.trained_cue == trained)
    assert record.provenance.before is not None
    assert pair.after is not None
    assert record.provenance.before == fingerprint(pair.before)
    assert record.provenance.after == fingerprint(pair.after)
    trajectory = Trajectory.load(REFERENCE / "trajectory" / f"rl-{trained}.json")
    assert trajectory.points[-1].cues[trained].accuracy.value == pytest.approx(
        record.per_cue[trained].after.overall, abs=0.02
    )


@pytest.mark.slow
def test_sft_continued_is_neither(tmp_path: Path) -> None:
    """The null that needs training: 100 more steps of the same mixture, at a constant 1e-4, other data order."""
    spec = load_spec("default")  # the number of examples makes it another order
    tokenizer = load_tokenizer(REFERENCE / "checkpoints" / "sft")
    model = load_model(REFERENCE / "checkpoints" / "sft").train()
    vocabulary = tokenizer.get_vocab()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    examples = list(sft_examples(spec, 100 * 256))
    for start in range(0, len(examples), 256):
        batch = examples[start : start + 256]
        ids = torch.tensor(
            [[*(vocabulary[w] for w in f"{p.text} {c}".split()), tokenizer.eos_token_id] for p, c in batch]
        )
        labels = ids.clone()
        labels[:, : len(batch[0][0].text.split())] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tmp_path / "sft-continued"
    model.save_pretrained(after)
    tokenizer.save_pretrained(after)
    pair = Pair(REFERENCE / "checkpoints" / "sft", after, REFERENCE / "suite.yaml", out=tmp_path)
    record = pipeline.verdict(pair)
    assert record.verdict == "neither", record.reason
    assert record.changed.model_dump() == {"selector": False, "cue_reader": False, "skill": False}


def test_a_pair_measured_again_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_nulls(monkeypatch)
    pairs = Path(__file__).with_name("pairs") / "llama"
    pair = Pair(pairs / "S", pairs / "R-neither", pairs / "suite.yaml", out=tmp_path)
    first = pipeline.verdict(pair)
    said: list[str] = []
    assert pipeline.verdict(pair, say=said.append) == first
    assert not said
    # another seed is another measurement
    pipeline.verdict(pair, seed=1, say=said.append)
    assert said


@pytest.mark.parametrize(("trained", "other"), PAIRS)
def test_one_place_brings_the_other_tag_back(trained: str, other: str) -> None:
    records = REFERENCE / "records" / f"sft--rl-{trained}"
    record = RepairRecord.load(records / "repair.json")
    assert (record.trained_cue, record.harmed_cue) == (trained, other)
    assert (record.after[other].value or 1) <= 0.05
    assert len(record.heads) <= 2
    for repair in record.repairs:
        if repair.kind in ("interchange", "edit"):
            assert repair.accuracy[other].above(0.90)
            assert abs(repair.trained_change.value or 0) <= 0.02
            assert (repair.random.median or 0) <= 0.15
    readers = PatchingRecord.load(records / "patching.json").readers
    assert [reader.first for reader in readers] == [True] * 4
    for circuit in CircuitRecord.load(records / "circuit.json").circuits:
        assert (circuit.faithfulness.cpr.low or 0) > (circuit.faithfulness.random_cpr.high or 1)


@pytest.mark.parametrize(("trained", "other"), PAIRS)
def test_what_probes_and_grafts_found(trained: str, other: str) -> None:
    records = REFERENCE / "records" / f"sft--rl-{trained}"
    probed, grafted = ProbingRecord.load(records / "probing.json"), GraftRecord.load(records / "graft.json")
    assert probed.used is not None
    assert probed.used.left.below(0.1)
    assert min(probed.used.random) > 0.9
    assert probed.unused is not None
    assert probed.unused.left.above(0.9)
    assert [each.concept for each in probed.subspaces] == ["cue", "selector"]
    for each in probed.subspaces:
        assert all((margin.low or 0.0) > 0 for margin in each.margin.values())
    assert {part.name for part in grafted.parts if not part.change} == {"embed", "final_norm", "unembed"} | {
        f"L{layer}.norms" for layer in range(3)
    }
    for line in grafted.path:
        assert abs(line.sum - line.change) <= 0.01 * max(abs(line.change), 0.05)
    assert grafted.factorial is not None
    assert grafted.factorial.enough
    assert grafted.factorial.selector_only.weight.above(0.8)
    assert grafted.rollback is not None
    for cue in (trained, other):
        accuracy = grafted.rollback.accuracy[cue]
        assert abs((accuracy["rollback"].value or 0) - (accuracy["before"].value or 0)) <= 0.1


@pytest.mark.parametrize(("trained", "other"), PAIRS)
def test_what_features_found(trained: str, other: str) -> None:
    records = REFERENCE / "records" / f"sft--rl-{trained}"
    found = FeatureRecord.load(records / "features.json")
    assert found.missing == ()
    assert (found.trained_cue, found.harmed_cue) == (trained, other)
    assert [table.concept for table in found.tables] == ["cue", "hint", "selector"]
    for sae in found.saes:
        assert sae.folder is None  # megabytes, which `mixturelens features` makes again
        assert sae.quality["before"].explained > 0.98
        assert sae.quality["after"].explained > 0.95  # S's features describe R
    # the cue: no one feature and no neuron, but a few features, or the heads that patching found
    cue = found.table("cue")
    assert cue is not None
    for kind in ("feature", "neuron"):
        best = cue.best(kind)
        assert best is not None
        assert best.patch.below(0.5)
    features, heads = cue.together("feature"), cue.together("head")
    assert features is not None
    assert heads is not None
    for several in (features, heads):
        assert several.enough
        assert several.patch.above(0.85)
        assert max(several.random) < 0.1
    assert len(features.units) <= 16
    readers = PatchingRecord.load(records / "patching.json").heads("cue", "after")
    assert {(unit.site.layer, unit.site.head) for unit in heads.units} == {(s.layer, s.head) for s in readers}
    # what RL did to the features is to choose, and to nothing else
    arrived = found.arrived
    assert arrived is not None
    assert arrived.together.routing.above(0.5 * (arrived.whole.routing.value or 0.0))
    assert arrived.together.specialist.below(0.01)
    # and it made no feature that S did not have
    assert [fit.seed for fit in found.crosscoders] == [0, 1, 2]
    assert all(fit.exclusive == {"before": 0, "after": 0} for fit in found.crosscoders)


def test_a_repair_without_a_checkpoint_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit that closes no gap leaves no folder, and that is no reason to repair once more."""
    made = []
    stored = RepairRecord.load(REFERENCE / "records" / "sft--rl-A" / "repair.json")

    def make(*_: object, **__: object) -> RepairRecord:
        made.append(1)
        return stored.model_copy(update={"checkpoint": "repaired" if len(made) > 1 else None})

    monkeypatch.setattr(pipeline, "repair_record", make)
    monkeypatch.setattr(pipeline, "measure", lambda *_, **__: None)
    folder = REFERENCE / "checkpoints"
    pair = Pair(folder / "sft", folder / "rl-A", REFERENCE / "suite.yaml", out=tmp_path, trained_cue="A")
    assert pipeline.repair(pair).checkpoint is None
    assert pipeline.repair(pair).checkpoint is None
    assert len(made) == 1
    # a record whose folder is gone is no whole result
    (tmp_path / "records" / pair.name / "repair.json").unlink()
    assert pipeline.repair(pair).checkpoint == "repaired"
    pipeline.repair(pair)
    assert len(made) == 3


def test_features_are_made_again_where_an_sae_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a record says lies beside it must lie there; one whose SAEs were not kept is whole without them."""
    made: list[FeatureSettings] = []
    kept: list[str | None] = ["sft/L1.resid_pre", None]
    quality = Quality(explained=0.9, active=8.0, dead=0.0, loss_recovered=NOT_MEASURED, tokens=9)

    def make(pair: object, measured: object, settings: FeatureSettings, **options: object) -> object:
        made.append(settings)
        sae = Sae(
            site=Site(layer=1, component="resid_pre"), folder=kept[len(made) // 3], trained=2, width=2,
            quality={"before": quality, "after": quality},
        )  # fmt: skip
        if sae.folder:
            (settings.folder / sae.folder).mkdir(parents=True)
        return FeatureRecord(trained_cue="A", saes=(sae,))

    monkeypatch.setattr(pipeline, "feature_record", make)
    for other in ("measure", "patch"):
        monkeypatch.setattr(pipeline, other, lambda *_, **__: None)
    folder = REFERENCE / "checkpoints"
    pair = Pair(folder / "sft", folder / "rl-A", REFERENCE / "suite.yaml", out=tmp_path, trained_cue="A")
    first = pipeline.decompose(pair)
    assert pipeline.decompose(pair) == first
    assert len(made) == 1
    assert made[0].folder == tmp_path / "features"
    assert (made[0].probing, made[0].more) == (None, ())  # no probing record, and no run to draw prompts from
    (tmp_path / "features" / "sft" / "L1.resid_pre").rmdir()
    assert pipeline.decompose(pair) == first
    assert len(made) == 2
    # another seed is another measurement, and this one kept no SAE
    assert pipeline.decompose(pair, seed=1).saes[0].folder is None
    pipeline.decompose(pair, seed=1)
    assert len(made) == 3


def test_a_run_teaches_features_with_the_questions_of_its_rl() -> None:
    more = runs.more_prompts(REFERENCE)
    spec = load_spec("default")
    suite = load_suite(REFERENCE)
    assert not {row.id for row in more} & {row.id for row in suite.prompts}
    assert {row.cue for row in more} == set(suite.cues)
    assert {row.hint for row in more} == {None, *spec.policies}
    assert len({(row.id, row.cue, row.hint) for row in more}) == len(more) == spec.split.rl * 2 * 3
