"""The ground of pairs: what is in it, how it is halved and asked, and what counts as near."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from truths import make_truth

from mixturelens.lab.proving.asked import SAMPLES, suite_of
from mixturelens.lab.proving.manner import Manner
from mixturelens.lab.proving.organisms import small_spec, target_of
from mixturelens.lab.proving.pairs import QUICK, GroundCell, Organism, grid, make_pair, near, told_by_making
from mixturelens.lab.proving.recipes import RECIPES, made_of, seen_of
from mixturelens.lab.proving.score import ASKED_OF, COVERED, COVERED_BY_RULES, PLANTED, covered, has_mechanism
from mixturelens.lab.proving.sums import HALVES, opened
from mixturelens.lab.proving.truth import Truth, word
from mixturelens.types import InputError, RunError

STYLE_ONLY = ("style-barely", "style", "style-strongly")


def test_the_ground_has_what_it_promises():
    cells = grid()
    assert len({cell.name for cell in cells}) == len({cell.key for cell in cells}) == len(cells)
    assert {cell.organism.architecture for cell in cells} == {"llama", "qwen2", "gpt2", "gpt_neox"}
    assert {cell.organism.announced for cell in cells} == {"token", "phrase", "inside", "none"}
    assert {cell.organism.policies for cell in cells} == {2, 3}
    assert {cell.organism.longest for cell in cells} == {0, 24, 64, 128}
    assert {cell.made for cell in cells} == {recipe.name for recipe in RECIPES}
    assert min(cell.organism.seed for cell in cells) >= 16  # what is below served to build all this
    assert len(covered(cells)) == len(COVERED) + len(COVERED_BY_RULES) == 13
    assert all(cell.tokens == 0 for cell in cells if has_mechanism(cell))


def test_halves_go_by_recipe_and_seed_and_each_has_every_word():
    cells = grid()
    sides: dict[tuple[str, int], set[str]] = {}
    for cell in cells:
        sides.setdefault((cell.made, cell.organism.seed), set()).add(cell.half)
    assert all(len(halves) == 1 for halves in sides.values())
    for half in HALVES:
        mine = [cell for cell in cells if cell.half == half]
        words = Counter(cell.recipe.intended for cell in mine)
        assert len(mine) >= 60
        assert all(words[word] >= 3 for word in ("routing", "specialist", "both"))
        assert words["neither"] >= 12
        drifted = {cell.key: cell.made for cell in mine if cell.made in STYLE_ONLY and cell.tokens}
        assert len(drifted) >= 4
        assert set(drifted.values()) == set(STYLE_ONLY)
        assert sum(cell.tokens > 0 for cell in mine) >= 20


def test_some_pairs_are_asked_in_two_ways():
    ways: dict[tuple[Organism, str], set[str]] = {}
    for cell in grid():
        ways.setdefault((cell.organism, cell.made), set()).add(cell.asked)
    assert sum(len(asked) == 2 and "literal" in asked for asked in ways.values()) >= 12
    assert any(asked == {"rules-24", "rules-12"} for asked in ways.values())


@pytest.mark.parametrize("policies", [2, 3])
@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if r.way == "fit" and "near" not in r.name], ids=lambda r: r.name
)
def test_every_recipe_asks_for_what_it_intends(recipe, policies: int):
    """By the definition of the verdict, from the mixtures alone; what training makes of it is measured."""
    if recipe.policies > policies:
        return
    spec = small_spec("llama", "token", policies)  # type: ignore[arg-type]
    after = recipe.after(spec)
    bits = made_of(spec, (recipe.before or target_of)(spec), after)
    assert word(bits, 1 - after.bare / 0.9) == recipe.intended


def test_what_completions_tell_alone_is_less_than_what_moved():
    spec = small_spec("llama", "none", 2)
    before, after = target_of(spec), replace(target_of(spec), weights={"a": 0.9, "b": 0.1})
    bits = made_of(spec, before, after)
    assert seen_of(spec, before, after) == pytest.approx(bits["routing"])  # under each cue one answers, one refuses
    assert bits["specialist"] == 0
    assert made_of(spec, before, before) == dict.fromkeys(bits, 0)


def test_planted_organisms_are_halved_within_each_architecture():
    known = opened(PLANTED)
    assert len(PLANTED) >= 12
    for architecture in ("llama", "qwen2", "gpt2", "gpt_neox"):
        mine = [each.name in known for each in PLANTED if each.architecture == architecture]
        assert True in mine
        assert False in mine
    assert min(each.number for each in PLANTED) >= 6  # those below served to build the methods
    slow = [each.name in known for each in PLANTED if each.architecture in ASKED_OF]
    assert slow.count(True) == slow.count(False) == 3


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (make_truth("routing", 0.92), True),
        (make_truth("both", 0.88), True),
        (make_truth("both", 0.5), False),
        (make_truth("specialist", 0.08), True),
        (make_truth("routing", 0.97), False),
        (make_truth("neither", 0.9, moved=0.001), False),
        (make_truth("neither", 0.5, moved=0.004), True),
        (make_truth("routing", 0.99, moved=0.0065), True),
        (make_truth("inconclusive", 0.9), False),
        (make_truth("both", None), False),
    ],
)
def test_near_misses_are_told_by_the_exact_numbers_alone(found: Truth, expected: bool):
    assert near(found) is expected


def test_without_announcements_the_making_says_what_is_true():
    silent = Organism("llama", "none", 2, 0)

    def told(recipe: str, specialist: float) -> Truth:
        seen = make_truth("specialist", 0.0).model_copy(update={"bits": {"specialist": specialist}})
        return told_by_making(GroundCell(silent, recipe), seen)

    moved = told("resampled", 0.237)
    assert (moved.verdict, moved.routing_share) == ("routing", 1.0)
    assert moved.bits["routing"] == pytest.approx(0.237, abs=1e-3)
    assert told("nudged", 0.001).verdict == "neither"
    assert told("sometimes-answers", 0.008).bits["conditioning"] == pytest.approx(0.042, abs=1e-3)
    # completions could be made to look so otherwise, and no split of what they tell is made up
    both = told("both-with-reader", seen_of(silent.spec, *_targets("both-with-reader", silent)))
    assert (both.verdict, both.routing_share) == ("both", None)
    with pytest.raises(RunError, match=r"moved by 0\.200 bits"):
        told("resampled", 0.2)
    assert not GroundCell(silent, "silent-damaged").told
    assert GroundCell(Organism("llama", "token", 2, 0), "silent-damaged").told


def _targets(recipe: str, organism: Organism):
    made = GroundCell(organism, recipe).recipe
    return (made.before or target_of)(organism.spec), made.after(organism.spec)


def test_suites_say_by_rules_what_literals_say():
    spec = small_spec("llama", "phrase", 2)
    tailed = Manner(chat=True, tail=12)
    rules = suite_of(spec, tailed, 24)
    assert (rules.max_new_tokens, rules.samples, rules.literal) == (24, SAMPLES, False)
    assert rules.chat is not None
    row = rules.prompts[0]
    literal = suite_of(spec, Manner())
    for name, policy in spec.policies.items():
        for text in policy.announce:
            said = f"{text} {row.answer}"
            assert literal.label(said, row).policy == name
            label = rules.label(f"{said} very nicely", row)
            assert (label.policy, label.wording, label.behaviour) == (name, 0, "answer")
            assert rules.correct(label.rest, row)
            assert rules.label(f"{text} sorry sorry sorry indeed", row).behaviour == "refuse"
    assert rules.label(f"nicely {row.answer}", row).policy == "other"


def test_a_rule_finds_an_announcement_in_the_middle():
    spec, manner = small_spec("llama", "inside", 2), Manner(chat=True, inside=True, tail=12)
    suite = suite_of(spec, manner, 24)
    row = suite.prompts[0]
    label = suite.label(f"well now [b] {row.answer} rather", row)
    assert label.policy == "b"
    assert suite.correct(label.rest, row)
    assert suite.label("hm [a] sorry sorry sorry", row).behaviour == "refuse"
    assert suite.policies["a"].force == "hm [a]"  # type: ignore[union-attr]


def test_what_was_made_from_something_else_is_not_taken_for_it(monkeypatch):
    from mixturelens.lab.proving import pairs

    cell = GroundCell(silent := Organism("llama", "none", 2, 0), "resampled")
    assert cell.key == GroundCell(silent, "resampled").key
    monkeypatch.setattr(pairs, "PREPARED", 151)
    assert cell.key.startswith(f"{cell.name}-")
    changed = cell.key
    monkeypatch.undo()
    assert changed != cell.key


def test_a_cell_survives_the_way_to_another_process():
    import pickle

    cell = QUICK[0]
    again: GroundCell = pickle.loads(pickle.dumps(cell))
    assert again.half == cell.half
    assert again.recipe is cell.recipe


def test_a_finished_pair_is_read_and_not_made_again(tmp_path, monkeypatch):
    cell = GroundCell(QUICK[0].organism, "resaved")
    folder = tmp_path / "organisms" / cell.organism.name
    from mixturelens.lab.organism import build_model, build_suite, build_tokenizer
    from mixturelens.lab.proving import pairs

    spec = cell.organism.spec
    tokenizer = build_tokenizer(spec)
    model = build_model(spec, tokenizer)
    key = f"{cell.made}-{cell.digest}"
    for name in ("sft", key):
        (folder / "checkpoints" / name).mkdir(parents=True)
        model.save_pretrained(folder / "checkpoints" / name)
        tokenizer.save_pretrained(folder / "checkpoints" / name)
    build_suite(spec, "A").save(folder / "suite.yaml")
    (folder / "spec.json").write_text(spec.model_dump_json(indent=1) + "\n")
    (folder / "truth").mkdir()
    (folder / f"truth/{key}-literal.json").write_text(make_truth("neither", None, 0.0).model_dump_json())
    monkeypatch.setattr(pairs, "fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(pairs, "prompt_truth", lambda *_, **__: pytest.fail("evaluated again"))
    made = make_pair(cell, tmp_path)
    assert made.truth.verdict == "neither"
    assert made.load_suite().trained_cue == "A"
    (folder / "spec.json").write_text("{}")
    with pytest.raises(InputError, match="another organism"):
        make_pair(cell, tmp_path)
