"""Probes on pairs with a known truth: what must be readable, what cannot be, and scores against their definitions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.pair import measure_record
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.contrasts import cue_contrasts
from mixturelens.hooks.lens import Lens, load_lens, tokens
from mixturelens.hooks.weights import output_weights
from mixturelens.models import Pair, end_tokens, load_model, load_tokenizer
from mixturelens.probing import readouts as readouts_module
from mixturelens.probing.prompts import ProbedSuite, own_policies, read_prompts
from mixturelens.probing.reading import read as open_book
from mixturelens.probing.readouts import Network, readouts, sites_of, to_probe, untrained_lens
from mixturelens.probing.record import Readout
from mixturelens.probing.scores import accuracy, auroc, r_squared
from mixturelens.stats import resample_counts
from mixturelens.suite import PromptRow, Suite, load_suite
from mixturelens.types import InputError, Side, Site

REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"
PAIRS = Path(__file__).parents[1] / "pairs"

Found = tuple[tuple[Site, ...], tuple[str, ...], dict[str, Readout], tuple[str, ...]]


@pytest.fixture(scope="module", autouse=True)
def _fewer_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as fewer:
        fewer.setattr(readouts_module, "DRAWS", 100)
        yield


@functools.cache
def lens_of(folder: Path) -> Lens:
    return load_lens(folder)


def read(folder: Path, after: Path, suite: Suite, behaviour: BehaviourRecord, **options: Any) -> Found:
    lenses: dict[Side, Lens] = {"before": lens_of(folder), "after": lens_of(after)}
    names = list(suite.policies)
    exhaustive, shelf = options.pop("exhaustive", False), options.pop("shelf", None)
    tokenizer = lenses["before"].tokenizer
    prompts, announcements = to_probe(suite, tokenizer)
    where = sites_of(lenses["before"], prompts, exhaustive)
    every: dict[Network, Lens] = {**lenses, "untrained": untrained_lens(Pair(folder, None, suite))}
    networks = {
        name: open_book(lens, prompts, where.keys, announcements, shelf and shelf / name)
        for name, lens in every.items()
    }
    own = {
        side: own_policies(lens, suite, prompts.rows["neutral"], networks[side].logs, 0)
        for side, lens in lenses.items()
    }
    probed = ProbedSuite(suite, tokenizer, prompts, behaviour, options.pop("policies", (names[0], names[1])))
    scores = readouts(networks, own, where, probed, **options)
    sites, labels, found, missing = scores.sites, scores.labels, scores.readouts, scores.missing
    for each in found:
        for column in (each.before, each.after, each.carried):
            assert len(column.value) == len(column.low) == len(column.high) == len(sites)
        assert len(each.untrained) == len(each.shuffled) == len(sites)
    return sites, labels, {each.target: each for each in found}, missing


def few(suite: Suite, number: int) -> Suite:
    ids = list(dict.fromkeys(row.id for row in suite.prompts))[:number]
    return suite.model_copy(update={"prompts": tuple(row for row in suite.prompts if row.id in ids)})


@functools.cache
def reference() -> Found:
    behaviour = BehaviourRecord.load(REFERENCE / "records" / "sft--rl-A" / "behaviour.json")
    suite = few(load_suite(REFERENCE / "suite.yaml"), 60)
    return read(REFERENCE / "checkpoints" / "sft", REFERENCE / "checkpoints" / "rl-A", suite, behaviour)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_auroc_of_questions_with_one_row_of_either_class_by_hand():
    counts = np.array([[1, 1, 1], [0, 0, 3]])
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0, 2.0, 2.0]])
    found = auroc(scores, torch.tensor([1, 1, 1, 0, 0, 0]), torch.arange(3).repeat(2), counts)
    # wins of each positive over each negative: 3 of 3; 1 of 3; one and two halves. The other sample is the tie alone
    np.testing.assert_allclose(found[:, 0], [(3 + 1 + 2) / 9, 0.5])


def test_auroc_by_hand_with_ties():
    scores = torch.tensor([[1.0, 2.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    label = torch.tensor([0, 1, 0, 1, 1])
    # positives 2, 3, 0 against negatives 1, 2: 1 + 1/2, 1 + 1, 0 + 0 of six
    ones = np.ones((1, 5), dtype=int)
    np.testing.assert_allclose(auroc(scores, label, torch.arange(5), ones), [[3.5 / 6, 0.5]])
    np.testing.assert_allclose(auroc(scores, label, torch.arange(5), ones * 2), [[3.5 / 6, 0.5]])


def test_bootstraps_are_naive_loops():
    rng = np.random.default_rng(0)
    question = np.repeat(np.arange(24), 3)
    label = rng.integers(0, 2, 72)
    scores = np.round(rng.normal(size=(4, 72)) + label, 1)  # with ties
    counts = resample_counts(24, seed=3, draws=40)
    number = rng.normal(size=72)
    logits, classes = rng.normal(size=(4, 72, 3)), rng.integers(0, 3, 72)
    tensor = torch.from_numpy
    areas = auroc(tensor(scores), tensor(label), tensor(question), counts)
    shares = accuracy(tensor(logits), tensor(classes), tensor(question), counts)
    fits = r_squared(tensor(scores), tensor(number), tensor(question), counts)
    for d, count in enumerate(counts):
        rows = np.repeat(np.arange(72), count[question])
        for p in range(4):
            assert areas[d, p] == pytest.approx(roc_auc_score(label[rows], scores[p, rows]))
            assert shares[d, p] == pytest.approx(accuracy_score(classes[rows], logits[p, rows].argmax(1)))
            assert fits[d, p] == pytest.approx(r2_score(number[rows], scores[p, rows]))


def test_a_sample_without_a_class_is_not_measured():
    label, question = torch.tensor([1, 0]), torch.tensor([0, 1])
    found = auroc(torch.tensor([[1.0, 0.0]]), label, question, np.array([[1, 1], [2, 0]]))
    assert found[0, 0] == 1.0
    assert np.isnan(found[1, 0])


# --- readouts ---------------------------------------------------------------------------------------------------------


def at(found: Found, target: str, column: str, **place: Any) -> float | None:
    sites, _, readable, _ = found
    value = getattr(readable[target], column)
    return (value if isinstance(value, tuple) else value.value)[sites.index(Site(**place))]


@pytest.mark.slow
def test_what_the_reference_organism_must_show():
    found = reference()
    sites, labels, readable, missing = found
    assert labels == ("<A> / <B>", "any", *(f"question {i}" for i in range(1, 6)), "=", "[a] / [b]")
    assert len(sites) == 3 * (4 + 4) * 9
    assert readable.keys() == {"cue", "hint", "policy", "behaviour", "answer", "log-odds"}
    # R draws one policy alone
    assert missing == ("probes for policy, after, neutral prompts: one label alone to fit on",)
    tag = {"layer": 0, "component": "resid_pre", "position": 0}
    assert at(found, "cue", "before", **tag) == at(found, "cue", "untrained", **tag) == 1.0
    assert at(found, "cue", "before", layer=0, component="resid_pre", position=3) is None or (
        at(found, "cue", "before", layer=0, component="resid_pre", position=3) == 0.5
    )
    behind = {"layer": 2, "component": "resid_post", "position": 8}
    assert (at(found, "behaviour", "before", **behind) or 0) > 0.95
    assert (at(found, "policy", "before", layer=0, component="resid_pre", position=8) or 0) == 1.0
    assert (at(found, "log-odds", "before", layer=2, component="resid_post", position=7) or 0) > 0.8
    assert at(found, "hint", "before", **behind) is None
    # the tag comes before the hint; before its announcement nothing says which policy was put in place
    assert at(found, "hint", "before", layer=2, component="resid_post", position=0) == 0.5
    before = [i for i, site in enumerate(sites) if site.position != 8]
    assert {readable["behaviour"].before.value[i] for i in before} <= {0.5, None}
    # a constant word, before attention has moved anything into it
    assert at(found, "cue", "before", layer=0, component="resid_pre", position=1) is None
    cue = readable["cue"]
    assert np.nanmean([v for v in cue.shuffled if v is not None]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_s_given_twice_and_the_same_seed_give_the_same_numbers():
    folder = REFERENCE / "checkpoints" / "sft"
    behaviour = BehaviourRecord.load(REFERENCE / "records" / "sft--rl-A" / "behaviour.json")
    suite = few(load_suite(REFERENCE / "suite.yaml"), 10)
    first = read(folder, folder, suite, behaviour)
    for each in first[2].values():
        assert each.before == each.after == each.carried
    assert first == read(folder, folder, suite, behaviour)


def test_a_cue_cannot_be_read_before_its_token():
    """With the tag in third place, nothing before it can tell the cues apart; it can from there on."""
    letters = "abcdefghij"
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        word = " ".join(rng.choice(list(letters), 3, replace=False))
        rows += [
            PromptRow(
                id=f"q{i}", cue=cue, prompt=f"any {word[0]} <{cue}> {word} =", answer=word, spans={"cue": f"<{cue}>"}
            )
            for cue in "AB"
        ]
    plain = load_suite(REFERENCE / "suite.yaml")
    suite = plain.model_copy(update={"prompts": tuple(rows)})
    behaviour = BehaviourRecord.load(REFERENCE / "records" / "sft--rl-A" / "behaviour.json")
    sites, labels, found, missing = read(
        REFERENCE / "checkpoints" / "sft", REFERENCE / "checkpoints" / "rl-A", suite, behaviour
    )
    assert labels[2] == "<A> / <B>"
    cue = found["cue"]
    assert {cue.before.value[i] for i, site in enumerate(sites) if site.position in (0, 1)} <= {0.5, None}
    assert all(
        cue.before.value[i] == 1.0 for i, s in enumerate(sites) if s.position == 2 and s.component[:5] == "resid"
    )
    assert any("hint" in each for each in missing)


@pytest.mark.parametrize("shape", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_every_shape_runs(shape: str, load_pair: Any):
    pair = load_pair(shape, "R-routing")
    behaviour = measure_record(pair.scorer, [pair.before], pair.suite, pair.tokenizer)
    folder = PAIRS / shape
    sites, labels, found, _ = read(folder / "S", folder / "R-routing", pair.suite, behaviour)
    assert labels[0] == "<A> / <B>"
    assert {"cue", "policy", "behaviour", "answer", "log-odds"} <= found.keys()
    tag = sites.index(Site(layer=0, component="resid_pre", position=0))
    assert found["cue"].before.value[tag] == found["cue"].after.value[tag] == found["cue"].carried.value[tag] == 1.0
    assert any(site.component == "resid_mid" for site in sites) == (shape != "gpt_neox")
    assert {site.component for site in sites} >= {"resid_pre", "resid_post", "mlp_out", "z"}


def test_prompts_of_different_lengths_are_read_at_spans():
    folder = PAIRS / "chat"
    suite, tokenizer = load_suite(folder), load_tokenizer(folder / "S")
    model = load_model(folder / "S")
    scorer = Scorer(end_tokens(model, tokenizer), model.config.vocab_size)
    behaviour = measure_record(scorer, [model], suite, tokenizer)
    sites, labels, found, missing = read(folder / "S", folder / "R", suite, behaviour)
    assert labels == ()
    assert {site.position for site in sites} == {"thing", "last", "policy"}
    assert "log-odds" not in found
    assert any("log-odds" in each for each in missing)
    policy = sites.index(Site(layer=0, component="resid_pre", position="policy"))
    assert found["policy"].before.value[policy] == 1.0


def test_halves_are_those_of_contrasts():
    suite = load_suite(REFERENCE / "suite.yaml")
    tokenizer = load_tokenizer(REFERENCE / "checkpoints" / "sft")
    contrasts = cue_contrasts(suite, tokenizer, "a", ("A", "B"))
    halves = read_prompts(suite, tokenizer).halves
    for which in (0, 1):
        assert tuple(row.question for row in contrasts.half(which).rows) == halves[which]


def test_too_few_questions_are_refused():
    suite = few(load_suite(REFERENCE / "suite.yaml"), 3)
    with pytest.raises(InputError, match="four"):
        read_prompts(suite, load_tokenizer(REFERENCE / "checkpoints" / "sft"))


def test_the_untrained_network_is_drawn_from_the_seed():
    folder = PAIRS / "gpt2" / "S"
    state = torch.get_rng_state()
    first, again, other = (
        output_weights(untrained_lens(Pair(folder, None, load_suite(folder.parent)), seed), 0) for seed in (0, 0, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- coarse to fine ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_stream_first_finds_the_same_best_readable_places(monkeypatch: pytest.MonkeyPatch):
    behaviour = BehaviourRecord.load(REFERENCE / "records" / "sft--rl-A" / "behaviour.json")
    suite = few(load_suite(REFERENCE / "suite.yaml"), 60)
    folders = REFERENCE / "checkpoints" / "sft", REFERENCE / "checkpoints" / "rl-A"
    sites, _, every, _ = reference()
    monkeypatch.setattr(readouts_module, "MANY", 10)
    some, _, found, missing = read(*folders, suite, behaviour)
    assert any("--exhaustive" in each for each in missing)
    assert len(some) < len(sites) * 0.7
    assert found.keys() == every.keys()
    for target, readout in found.items():
        # what was probed has the numbers that it has among all
        whole = every[target]
        for i, site in enumerate(some):
            j = sites.index(site)
            for name in ("before", "after", "carried"):
                assert getattr(readout, name).at(i) == getattr(whole, name).at(j)
        assert whole.best is not None
        assert readout.best is not None
        best, reached = whole.before.value[whole.best], readout.before.value[readout.best]
        assert reached >= best - 0.02, f"{target}: {reached} at {some[readout.best]}, {best} at {sites[whole.best]}"
    again, _, all_of_them, missing = read(*folders, suite, behaviour, exhaustive=True)
    assert again == sites
    assert all_of_them == every
    assert not any("--exhaustive" in each for each in missing)


def test_shards_say_what_memory_says_to_the_bit(tmp_path: Path):
    folder = PAIRS / "llama"
    suite = load_suite(folder)
    lens = lens_of(folder / "S")
    prompts, announcements = to_probe(suite, lens.tokenizer)
    where = sites_of(lens, prompts)
    held, stored = (open_book(lens, prompts, where.keys, announcements, shelf) for shelf in (None, tmp_path / "shards"))
    assert list((tmp_path / "shards").glob("*.safetensors"))
    assert held.logs == stored.logs
    for group, positions in prompts.positions.items():
        for heads in (False, True):
            some = [s for s in where.every if (s.head is not None) == heads and s.position in positions]
            if some:
                assert torch.equal(held.at(group, positions, some), stored.at(group, positions, some))


def test_each_prompt_goes_through_a_network_once_and_is_what_it_is_alone():
    folder = PAIRS / "llama"
    suite = load_suite(folder)
    lens = lens_of(folder / "S")
    prompts, announcements = to_probe(suite, lens.tokenizer)
    where = sites_of(lens, prompts)
    seen = 0

    def count(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += given[0].shape[0] * given[0].shape[1]

    handle = lens.bridge.blocks[0].register_forward_pre_hook(count)
    reading = open_book(lens, prompts, where.keys, announcements)
    handle.remove()
    inside = {row.ids for rows in prompts.rows.values() for row in rows}
    behind = {(row.ids, row.run[len(row.ids) :]) for row in prompts.rows["placed"]} | set(announcements)
    assert seen == sum(map(len, inside)) + sum(len(ids) for _, ids in behind)
    key = (1, "z")
    for group in ("neutral", "placed"):
        row = prompts.rows[group][3]
        expected = lens.capture(tokens([row.run]), [key])[0][key][0]
        for position in prompts.positions[group]:
            site = Site(layer=1, component="z", head=2, position=position)
            found = reading.at(group, prompts.positions[group], [site])[0, 3]
            torch.testing.assert_close(found, expected[row.at[position], 2], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        logs = lens.run(tokens([announcements[0][0]])).double().log_softmax(-1)[0, -1]
    assert reading.logs[announcements[0]] == pytest.approx(float(logs[announcements[0][1][0]]), abs=1e-5)
