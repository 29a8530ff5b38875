"""LEACE erases all that is linear and changes least; what is left of the cue is what a hook by hand leaves of it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from mixturelens.contrasts import Contrasts, cue_contrasts
from mixturelens.hooks.batches import sides
from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.patching.sweep import find_reader
from mixturelens.probing import erase
from mixturelens.probing.erase import Erasing
from mixturelens.probing.leace import leace, random_erasers
from mixturelens.probing.reader import reading_site
from mixturelens.suite import load_suite
from mixturelens.types import InputError, Site

PAIRS = Path(__file__).parents[1] / "pairs"
REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"
every_shape = pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2"])


@functools.cache
def setting(shape: str) -> tuple[Lens, Contrasts]:
    folder = PAIRS / shape
    lens = load_lens(folder / "S")
    return lens, cue_contrasts(load_suite(folder), lens.tokenizer, "a", ("A", "B"))


def planted(classes: int, rows: int = 300, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of unequal spread, whose classes differ in mean; two directions are constant."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.arange(rows) % classes
    means = torch.randn(classes, size, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, size, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, size) + means[labels]
    x = x @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    x[:, :2] = torch.tensor([1.0, -2.0], dtype=torch.float64)
    return x, labels


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_after_erasing_no_linear_probe_reads(classes: int):
    from sklearn.linear_model import LogisticRegression

    x, labels = planted(classes)
    eraser = leace(x, labels)
    assert eraser.rank == classes - 1
    torch.testing.assert_close(eraser.reads @ eraser.vectors.T, torch.eye(classes - 1, dtype=torch.float64))
    erased = eraser.apply(x)
    for one in range(classes):
        torch.testing.assert_close(erased[labels == one].mean(0), x.mean(0), atol=1e-6, rtol=0)
    probe = LogisticRegression(C=1e4, max_iter=5000)
    assert probe.fit(x, labels).score(x, labels) > 1.3 / classes
    assert np.abs(probe.fit(erased, labels).predict_proba(erased) - 1 / classes).max() < 1e-3
    torch.testing.assert_close(eraser.apply(erased), erased)  # once is enough
    torch.testing.assert_close(erased[:, :2], x[:, :2])  # what is constant stays
    one_by_one = x
    for each in eraser.interventions(Site(layer=0, component="resid_pre")):
        read, vector = (torch.tensor(v, dtype=torch.float64) for v in (each.read, each.vector))
        one_by_one = one_by_one - ((one_by_one @ read) - each.offset)[:, None] * vector
    torch.testing.assert_close(one_by_one, erased)


@pytest.mark.parametrize("classes", [2, 4])
def test_it_changes_least(classes: int):
    """Against other affine maps that erase: projections onto what is orthogonal to class means in another metric."""
    x, labels = planted(classes)
    x = x[:, 2:]
    erased = leace(x, labels).apply(x)
    own = (erased - x).square().sum(1).mean()
    means = torch.stack([x[labels == c].mean(0) for c in range(classes)]) - x.mean(0)
    generator = torch.Generator().manual_seed(1)
    for attempt in range(20):
        root = torch.randn(10, 10, generator=generator, dtype=torch.float64)
        metric = torch.eye(10, dtype=torch.float64) if attempt == 0 else root @ root.T
        basis = torch.linalg.svd(means)[2][: classes - 1].T
        project = basis @ torch.linalg.inv(basis.T @ metric @ basis) @ basis.T @ metric
        other = x - (x - x.mean(0)) @ project.T
        torch.testing.assert_close(other[labels == 0].mean(0), x.mean(0))
        assert (other - x).square().sum(1).mean() > own
    whitened = torch.linalg.pinv((x - x.mean(0)).T @ (x - x.mean(0)) / len(x))
    project = basis @ torch.linalg.inv(basis.T @ whitened @ basis) @ basis.T @ whitened
    torch.testing.assert_close(x - (x - x.mean(0)) @ project.T, erased)  # theorem 4.3, the other way to say it


def test_where_there_is_nothing_to_erase_nothing_changes():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    same = torch.cat([x, x])
    eraser = leace(same, torch.arange(80) // 40)
    assert eraser.rank == 0
    assert torch.equal(eraser.apply(same), same)
    assert eraser.interventions(Site(layer=0, component="resid_pre")) == ()
    assert leace(torch.full((8, 3), 7.3), torch.arange(8) % 2).rank == 0
    with pytest.raises(InputError, match="two classes"):
        leace(x, torch.zeros(40, dtype=torch.long))


def test_two_values_as_at_a_tag():
    tags = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 2
    eraser = leace(tags[labels], labels)
    torch.testing.assert_close(eraser.apply(tags), tags.mean(0).expand(2, -1), atol=1e-6, rtol=0)
    random = random_erasers(tags[labels], 1, 50, seed=0)
    left = [float((each.apply(tags)[0] - each.apply(tags)[1]).norm() / (tags[0] - tags[1]).norm()) for each in random]
    assert 0.8 < np.mean(left) < 1.2


def test_random_erasers_remove_as_many_dimensions_of_equal_weight():
    x, labels = planted(3)
    x = x[:, 2:]
    random = random_erasers(x, 2, 400, seed=0)
    shares = []
    for each in random:
        torch.testing.assert_close(each.reads @ each.vectors.T, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
        assert torch.linalg.matrix_rank(each.apply(x) - x) == 2
        shares.append(float(each.found(x).square().mean()))
    assert np.allclose(shares, 1.0)  # whitened: each coordinate varies by 1
    again = random_erasers(x, 2, 400, seed=0)
    assert all(torch.equal(a.reads, b.reads) for a, b in zip(random, again, strict=True))
    assert leace(x, labels).rank == 2


# --- of models --------------------------------------------------------------------------------------------------------


@every_shape
def test_what_is_left_is_what_a_hook_leaves(shape: str):
    lens, contrasts = setting(shape)
    sites = [
        Site(layer=0, component="resid_pre", position="cue"),
        Site(layer=0, component="resid_pre", position="question"),
        Site(layer=1, component="resid_post", position="policy"),
        Site(layer=0, component="z", head=2, position="policy"),
        Site(layer=0, component="z", position="last"),
        Site(layer=1, component="mlp_out", position=5),
    ]
    found = Erasing(lens, contrasts).sites(sites)
    fit, judge = (sides(lens, contrasts.half(half)) for half in (0, 1))
    columns = {"cue": [0], "question": [1, 2, 3, 4], "policy": [6], "last": [5], 5: [5]}
    for each in found:
        key, at = (each.site.layer, each.site.component), columns[each.site.position]
        pick = (slice(None), at, *(() if each.site.head is None else (each.site.head,)))
        acts = [lens.capture(batch, [key])[0][key][pick] for batch in (fit.clean, fit.corrupt)]
        shape_of = -1 if each.site.head is None and key[1] == "z" else acts[0].shape[-1]
        flat = [a.reshape(len(a) * len(at), shape_of) for a in acts]
        owner = torch.arange(len(acts[0])).repeat_interleave(len(at)).repeat(2)
        eraser = leace(torch.cat(flat), torch.tensor([1] * len(flat[0]) + [0] * len(flat[1])), owner)

        def edit(x: torch.Tensor, pick=pick, eraser=eraser, at=at, size=flat[0].shape[1]) -> torch.Tensor:
            now = x[pick]
            x[pick] = eraser.apply(now.reshape(len(x) * len(at), size)).view_as(now)
            return x

        with torch.no_grad():
            plain = [judge.metric(lens.run(batch)[:, -1]) for batch in (judge.clean, judge.corrupt)]
            erased = [
                judge.metric(lens.run(batch, [(lens.point(*key), edit)])[:, -1])
                for batch in (judge.clean, judge.corrupt)
            ]
        expected = float((erased[0] - erased[1]).mean() / (plain[0] - plain[1]).mean())
        assert each.left.value == pytest.approx(expected, abs=1e-3), each.site
        assert len(each.random) == (8 if eraser.rank else 0)
    at_cue, at_question = found[0], found[1]
    assert at_cue.left.value == pytest.approx(0.0, abs=1e-4)
    assert at_cue.readable.value == 1.0
    assert np.mean(at_cue.random) > 0.7
    assert at_question.left.value == 1.0  # the embeddings of the question know no cue
    assert at_question.readable.value == 0.5


@pytest.mark.parametrize("shape", ["llama", "gpt_neox"])
def test_erasing_the_cue_erases_the_difference_in_behaviour(shape: str):
    lens, contrasts = setting(shape)
    suite = load_suite(PAIRS / shape)
    found = Erasing(lens, contrasts).in_behaviour(suite, Site(layer=0, component="resid_pre", position="cue"))
    assert found.policy == "a"
    assert found.plain["A"].value > 0.9 > 0.1 > found.plain["B"].value
    assert found.erased["A"].value == pytest.approx(found.erased["B"].value, abs=1e-4)
    assert found.left.high < 0.1
    assert len(found.random) == 16
    assert np.median(found.random) > 0.5
    again = Erasing(lens, contrasts).in_behaviour(suite, Site(layer=0, component="resid_pre", position="cue"))
    assert again == found
    if shape == "llama":
        behind = Erasing(lens, contrasts).in_behaviour(suite, Site(layer=0, component="resid_mid", position=6))
        assert behind.site.position == "completion"


def test_policies_that_are_rules_are_sampled(monkeypatch):
    monkeypatch.setattr(erase, "RANDOM", 2)
    lens, suite = load_lens(PAIRS / "chat" / "S"), load_suite(PAIRS / "chat")
    suite = suite.model_copy(update={"samples": 2})
    contrasts = cue_contrasts(suite, lens.tokenizer, "comply", (suite.cues[0], suite.cues[1])).first(8)
    found = Erasing(lens, contrasts).in_behaviour(suite, Site(layer=1, component="resid_post", position="policy"))
    assert found.site.position == "completion"
    assert found.left.measured
    assert found.erased.keys() == set(suite.cues[:2])
    assert len(found.random) == 2
    with pytest.raises(InputError, match="row 0 has no span 'cue'; it has last, policy, thing"):
        Erasing(lens, contrasts).in_behaviour(suite, Site(layer=0, component="resid_pre", position="cue"))


def test_the_reader_of_the_reference_reads_the_tag():
    lens = load_lens(REFERENCE / "checkpoints" / "rl-A")
    contrasts = cue_contrasts(load_suite(REFERENCE), lens.tokenizer, "a", ("A", "B"), "refuse").first(60)
    heads = find_reader(lens, contrasts, "policy").heads
    site = reading_site(lens, heads, contrasts)
    assert site == Site(layer=min(head.layer for head in heads), component="resid_pre", position="cue")
    (found,) = Erasing(lens, contrasts).sites([site])
    assert found.left.high < 0.1
    assert min(found.random) > 0.5


def test_what_cannot_be_erased_is_refused():
    lens, contrasts = setting("llama")
    suite = load_suite(PAIRS / "llama")
    at_cue = Site(layer=0, component="resid_pre", position="cue")
    with pytest.raises(InputError, match="attention patterns are no activations"):
        Erasing(lens, contrasts).sites([Site(layer=0, component="pattern", head=0, position="cue")])
    with pytest.raises(InputError, match="give at least two"):
        Erasing(lens, contrasts.first(1)).sites([at_cue])
    with pytest.raises(InputError, match="the cue cannot be read there"):
        Erasing(lens, contrasts).in_behaviour(suite, Site(layer=0, component="resid_pre", position="question"))
    with pytest.raises(InputError, match="names behaviours"):
        Erasing(lens, contrasts).in_behaviour(suite.model_copy(update={"behaviours": None}), at_cue)
    same = Contrasts("cue", "A", "B", "a", tuple(
        type(row)(row.question, row.clean, row.clean, row.spans, row.target, row.foil) for row in contrasts.rows
    ))  # fmt: skip
    with pytest.raises(InputError, match=r"differ by 0\.00 nats"):
        Erasing(lens, same).sites([at_cue])
