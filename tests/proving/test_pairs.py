"""The ground of pairs: what is in it, how it is halved, and what counts as near."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from mixturelens.proving.pairs import QUICK, Cell, Organism, grid, make_pair, near, told_by_making
from mixturelens.proving.recipes import RECIPES
from mixturelens.proving.score import COVERED, PLANTED, covered, opened
from mixturelens.proving.truth import Truth
from mixturelens.types import InputError, RunError


def truth(verdict: str, share: float | None, moved: float = 0.5) -> Truth:
    return Truth(
        verdict=verdict,  # type: ignore[arg-type]
        routing_share=share,
        moved=moved,
        nats={"total": moved},
        selector=True,
        cue_reader=False,
        skill=False,
        dormant_intact=True,
        coverage=1.0,
        unresolved=0.0,
    )


def test_the_ground_has_what_it_promises():
    cells = grid()
    assert len(cells) >= 60
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.organism.architecture for cell in cells} == {"llama", "qwen2", "gpt2", "gpt_neox"}
    assert {cell.organism.announced for cell in cells} == {"token", "phrase", "none"}
    assert {cell.organism.policies for cell in cells} == {2, 3}
    assert {cell.made for cell in cells} == {recipe.name for recipe in RECIPES}
    assert len(covered(cells)) == len(COVERED) == 10


def test_halves_go_by_recipe_and_seed_and_each_has_every_word():
    cells = grid()
    sides: dict[tuple[str, int], set[str]] = {}
    for cell in cells:
        sides.setdefault((cell.made, cell.organism.seed), set()).add(cell.half)
    assert all(len(halves) == 1 for halves in sides.values())
    for half in ("open", "held-out"):
        words = Counter(cell.recipe.intended for cell in cells if cell.half == half)
        assert all(words[word] >= 3 for word in ("routing", "specialist", "both", "neither"))


def test_planted_organisms_are_halved_within_each_architecture():
    known = opened(PLANTED)
    assert len(PLANTED) >= 12
    for architecture in ("llama", "qwen2", "gpt2", "gpt_neox"):
        mine = [each.name in known for each in PLANTED if each.architecture == architecture]
        assert True in mine
        assert False in mine


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (truth("routing", 0.92), True),
        (truth("both", 0.88), True),
        (truth("both", 0.5), False),
        (truth("specialist", 0.08), True),
        (truth("routing", 0.97), False),
        (truth("neither", 0.9, moved=0.001), False),
        (truth("inconclusive", 0.9), False),
        (truth("both", None), False),
    ],
)
def test_near_misses_are_told_by_the_true_share_alone(found: Truth, expected: bool):
    assert near(found) is expected


def test_without_announcements_the_making_says_what_is_true():
    silent = Organism("llama", "none", 2, 0)

    def told(recipe: str, conditioning: float, skill: float) -> Truth:
        nats = {"conditioning": conditioning, "skill": skill, "total": conditioning + skill}
        return told_by_making(Cell(silent, recipe), truth("both", None).model_copy(update={"nats": nats}))

    moved = told("resampled", 0.55, 0.001)
    assert moved.verdict == "routing"
    assert moved.nats["routing"] == pytest.approx(0.97 * math.log(1.94) + 0.03 * math.log(0.06))
    assert told("nudged", 0.002, 0.0).verdict == "neither"
    assert told("resampled", 0.55, 0.2).verdict == "both"  # something broke on the way, and is not overlooked
    assert told("sometimes-answers", 0.3, 0.0).nats["conditioning"] == 0.3
    # weights and table were made to change: KL(behaviours) is less than both, and no split of it is made up
    both = told("both-with-reader", 0.4, 0.0)
    assert (both.verdict, both.routing_share) == ("both", None)
    with pytest.raises(RunError, match=r"moved by 0\.200 nats"):
        told("resampled", 0.2, 0.0)
    assert not Cell(silent, "silent-damaged").told
    assert Cell(Organism("llama", "token", 2, 0), "silent-damaged").told


def test_what_was_made_from_something_else_is_not_taken_for_it(monkeypatch):
    from mixturelens.proving import pairs

    cell = Cell(silent := Organism("llama", "none", 2, 0), "resampled")
    assert cell.key == Cell(silent, "resampled").key
    monkeypatch.setattr(pairs, "PREPARED", 151)
    assert cell.key.startswith(f"{cell.name}-")
    changed = cell.key
    monkeypatch.undo()
    assert changed != cell.key


def test_a_cell_survives_the_way_to_another_process():
    import pickle

    cell = QUICK[0]
    again: Cell = pickle.loads(pickle.dumps(cell))
    assert again.half == cell.half
    assert again.recipe is cell.recipe


def test_a_finished_pair_is_read_and_not_made_again(tmp_path, monkeypatch):
    cell = Cell(QUICK[0].organism, "resaved")
    folder = tmp_path / "organisms" / cell.organism.name
    from mixturelens.organism import build_model, build_suite, build_tokenizer
    from mixturelens.proving import pairs

    spec = cell.organism.spec
    tokenizer = build_tokenizer(spec)
    model = build_model(spec, tokenizer)
    key = cell.key.removeprefix(f"{cell.organism.name}--")
    for name in ("sft", key):
        (folder / "checkpoints" / name).mkdir(parents=True)
        model.save_pretrained(folder / "checkpoints" / name)
        tokenizer.save_pretrained(folder / "checkpoints" / name)
    build_suite(spec, "A").save(folder / "suite.yaml")
    (folder / "spec.json").write_text(spec.model_dump_json(indent=1) + "\n")
    (folder / "truth").mkdir()
    (folder / f"truth/{key}.json").write_text(truth("neither", None, 0.0).model_dump_json())
    monkeypatch.setattr(pairs, "fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(pairs, "prompt_truth", lambda *_, **__: pytest.fail("evaluated again"))
    made = make_pair(cell, tmp_path)
    assert made.truth.verdict == "neither"
    assert made.load_suite().trained_cue == "A"
    (folder / "spec.json").write_text("{}")
    with pytest.raises(InputError, match="another organism"):
        make_pair(cell, tmp_path)
