"""The ground of pairs: organisms times recipes, made on disk as plain checkpoints, each with its truth beside it.

GROUND/organisms/<organism>/       a run folder: spec.json, suite.yaml, checkpoints/sft
    checkpoints/<recipe>/          R; and `<recipe>-before`, where S is not the organism's own
    truth/<recipe>.json
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mixturelens.models import Pair, load_model, load_tokenizer, open_pair
from mixturelens.organism import Spec, build_model, build_suite, build_tokenizer, questions
from mixturelens.proving.organisms import (
    RATE,
    STEPS,
    Announced,
    Architecture,
    Target,
    fit,
    rows_of,
    small_spec,
    target_of,
)
from mixturelens.proving.recipes import BY_NAME, RECIPES, Recipe
from mixturelens.proving.truth import SHARES, Truth, prompt_truth, truth_of, word
from mixturelens.records import new_folder, write_text
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Half = Literal["open", "held-out"]
TRAINED_CUE = "A"
FIRST = 8
"""The first seed of the ground. Organisms of the seeds below served to build the instruments and the ground itself, so
nothing of them is scored."""
NEAR = 0.03
"""A share this near to a threshold is a near miss."""
ASTRAY = 0.03
"""Nats by which behaviours may have moved otherwise than they were made to."""
PREPARED = 150
"""Steps that make S of a recipe from the organism's own."""
PREPARED_RATE = 1e-3


@dataclass(frozen=True)
class Organism:
    architecture: Architecture
    announced: Announced
    policies: Literal[2, 3]
    seed: int

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.announced}-{self.policies}-{self.seed}"

    @property
    def spec(self) -> Spec:
        return small_spec(self.architecture, self.announced, self.policies, self.seed)


@dataclass(frozen=True)
class Cell:
    """One pair of the ground."""

    organism: Organism
    made: str
    """The recipe's name: a recipe itself does not survive the way to another process."""

    @property
    def recipe(self) -> Recipe:
        return BY_NAME[self.made]

    @property
    def name(self) -> str:
        return f"{self.organism.name}--{self.made}"

    @property
    def key(self) -> str:
        """Name and digest of all that the pair is made from: what was made from something else is not taken for it."""
        spec, r = self.organism.spec, self.recipe
        targets = [make(spec) for make in (r.before, r.after) if make is not None]
        made = (
            spec.model_dump_json(),
            _steps(spec),
            PREPARED,
            PREPARED_RATE,
            r.way,
            r.trainable,
            r.steps,
            r.rate,
            targets,
        )
        return f"{self.name}-{hashlib.sha256(repr(made).encode()).hexdigest()[:8]}"

    @property
    def told(self) -> bool:
        """Whether what completions show can tell this making from others."""
        return self.organism.announced != "none" or self.recipe.told

    @property
    def half(self) -> Half:
        """By recipe and seed, so that all architectures of one recipe and seed are opened together."""
        return "open" if (RECIPES.index(self.recipe) + self.organism.seed) % 2 == 0 else "held-out"


ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "gpt2", "gpt_neox")


def grid() -> tuple[Cell, ...]:
    """Every pair of the ground: each recipe on some organisms of each kind, in turn."""
    organisms = [
        *(Organism(a, "token", 2, FIRST + seed) for seed in (0, 1) for a in ARCHITECTURES),
        *(Organism(a, "token", 3, FIRST + 2 + i % 2) for i, a in enumerate(ARCHITECTURES)),
        *(Organism(a, "phrase", 2, FIRST + 4 + i % 2) for i, a in enumerate(ARCHITECTURES)),
        *(Organism(a, "none", 2 if i % 2 else 3, FIRST + 6 + i // 2) for i, a in enumerate(ARCHITECTURES)),
    ]
    cells = []
    for number, organism in enumerate(organisms):
        possible = [r for r in RECIPES if r.policies <= organism.policies and _fits(r, organism)]
        # every fifth recipe, another fifth for the next organism; all that need three policies
        cells += [
            Cell(organism, r.name)
            for i, r in enumerate(possible)
            if (i + number) % 5 == 0 or (r.policies == 3 and organism.policies == 3)
        ]
    return tuple(cells)


def _fits(recipe: Recipe, organism: Organism) -> bool:
    """Without announcements only the making says what is true; what came of itself (GRPO, noise) has no known truth.

    And where a policy's own behaviour is the wrong rule, a specialist that errs by it looks like that policy.
    """
    if organism.announced != "none":
        return True
    if recipe.way in ("grpo", "noise") or recipe.name in ("no-announcement", "good-everywhere"):
        return False
    targets = [make(organism.spec) for make in (recipe.before, recipe.after) if make is not None]
    return organism.policies == 2 or not any(target.wrong and target.how == "rule" for target in targets)


QUICK: tuple[Cell, ...] = tuple(
    Cell(Organism("gpt2", "token", 2, 0), name)
    for name in ("resampled-mildly", "sometimes-answers", "both-with-reader", "continued")
)
"""Four pairs of one organism: one of each verdict."""


def make_organism(organism: Organism, ground: Path) -> Path:
    """Train S, unless it is there; the organism's folder. Raises InputError if another organism is there."""
    folder, spec = ground / "organisms" / organism.name, organism.spec
    text, file = spec.model_dump_json(indent=1) + "\n", folder / "spec.json"
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise InputError(f"{folder} holds another organism, of another version; score a new ground (--out)")
    if (folder / "checkpoints/sft").exists():
        return folder
    write_text(file, text)
    build_suite(spec, TRAINED_CUE).save(folder / "suite.yaml")
    tokenizer = build_tokenizer(spec)
    model = build_model(spec, tokenizer)
    _train(spec, model, tokenizer, target_of(spec), steps=_steps(spec), seed=spec.seed)
    _save(model, tokenizer, folder / "checkpoints/sft")
    return folder


@dataclass(frozen=True)
class Made:
    """A pair on disk."""

    before: Path
    after: Path
    suite: Path
    truth: Truth

    def load_suite(self) -> Suite:
        return load_suite(self.suite)

    def open(self) -> Pair:
        return open_pair(self.before, self.after, self.load_suite())


def make_pair(cell: Cell, ground: Path) -> Made:
    """Make S and R of this cell and evaluate them exhaustively, unless that is done."""
    folder = make_organism(cell.organism, ground)
    spec, recipe = cell.organism.spec, cell.recipe
    key = cell.key.removeprefix(f"{cell.organism.name}--")
    checkpoints, file = folder / "checkpoints", folder / "truth" / f"{key}.json"
    before = checkpoints / ("sft" if recipe.before is None else f"{key}-before")
    after = checkpoints / ("rl-A" if recipe.way == "grpo" else key)
    tokenizer = load_tokenizer(checkpoints / "sft")
    if recipe.before is not None and not before.exists():
        model = load_model(checkpoints / "sft")
        _train(spec, model, tokenizer, recipe.before(spec), steps=PREPARED, rate=PREPARED_RATE, seed=spec.seed + 1)
        _save(model, tokenizer, before)
    if not after.exists():
        MAKERS[recipe.way](spec, recipe, folder, before, after)
    if not file.exists():
        found = prompt_truth(spec, load_model(before), load_model(after), tokenizer, questions(spec).evaluation)
        truth = truth_of(found) if cell.organism.announced != "none" else told_by_making(cell, truth_of(found))
        write_text(file, truth.model_dump_json(indent=1) + "\n")
    return Made(before, after, folder / "suite.yaml", Truth.model_validate(json.loads(file.read_text())))


def told_by_making(cell: Cell, seen: Truth) -> Truth:
    """Without announcements no completion tells its policy, and the making has to say what is true.

    The weights that were asked for give the routing; what completions do given their behaviour is skill, and exact;
    KL(behaviours) is conditioning where only the table was made to change. Where weights and table were, the word is
    what the recipe intends, and there are no terms. Raises RunError if R did not become what it was made for.
    """
    spec, recipe = cell.organism.spec, cell.recipe
    before = (recipe.before or target_of)(spec)
    after = recipe.after(spec) if recipe.way == "fit" else before
    routing = sum(w * math.log(w / before.weights[m]) for m, w in after.weights.items() if w)
    if not cell.told or (routing and after.table != before.table):
        return seen.model_copy(update={"verdict": recipe.intended, "routing_share": None, "moved": seen.nats["total"]})
    behaviours = seen.nats["conditioning"]
    if after.table == before.table and abs(behaviours - routing) > ASTRAY:
        raise RunError(f"{cell.name}: behaviours moved by {behaviours:.3f} nats, and were made to by {routing:.3f}")
    made = seen.nats | {"routing": routing, "conditioning": behaviours if after.table != before.table else 0.0}
    moved = made["routing"] + made["conditioning"] + made["skill"]
    share = routing / moved if moved else None
    return seen.model_copy(update={"verdict": word(made), "routing_share": share, "moved": moved, "nats": made})


def near(truth: Truth) -> bool:
    """Whether the exact share lies so near to a threshold that a suite of this size need not tell."""
    share = truth.routing_share
    if share is None or truth.verdict in ("neither", "inconclusive"):
        return False
    return min(abs(share - edge) for edge in SHARES) <= NEAR


# --- ways to make R ---------------------------------------------------------------------------------------------------


def _steps(spec: Spec) -> int:
    """Without announcements the first letter mixes what all policies say there, which takes longer to learn."""
    return STEPS if spec.announcement != "none" else 3 * STEPS


def _train(
    spec: Spec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: Target,
    *,
    steps: int,
    seed: int,
    rate: float = RATE,
    only: tuple[str, ...] = (),
) -> None:
    rows = rows_of(spec, target, questions(spec).sft, tokenizer, seed)
    names = [name for name, _ in model.named_parameters() if not only or any(part in name for part in only)]
    fit(model, rows, steps=steps, rate=rate, seed=seed, trainable=names)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    with new_folder(path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _fitted(spec: Spec, recipe: Recipe, folder: Path, before: Path, after: Path) -> None:
    model, tokenizer = load_model(before), load_tokenizer(before)
    target = recipe.after(spec)
    _train(
        spec, model, tokenizer, target, steps=recipe.steps, rate=recipe.rate, seed=spec.seed + 2, only=recipe.trainable
    )
    _save(model, tokenizer, after)


def _grpo(spec: Spec, recipe: Recipe, folder: Path, before: Path, after: Path) -> None:
    from mixturelens.training import train_stage

    train_stage(spec, f"rl-{TRAINED_CUE}", folder)


def _in_other_order(spec: Spec, recipe: Recipe, folder: Path, before: Path, after: Path) -> None:
    tokenizer = build_tokenizer(spec)
    model = build_model(spec, tokenizer)
    _train(spec, model, tokenizer, target_of(spec), steps=_steps(spec), seed=spec.seed + 1000)
    _save(model, tokenizer, after)


def _same(spec: Spec, recipe: Recipe, folder: Path, before: Path, after: Path) -> None:
    _save(load_model(before), load_tokenizer(before), after)


def _noise(spec: Spec, recipe: Recipe, folder: Path, before: Path, after: Path) -> None:
    """As far from S, parameter by parameter, as training on the target goes; in a random direction."""
    import torch

    model, moved, tokenizer = load_model(before), load_model(before), load_tokenizer(before)
    _train(spec, moved, tokenizer, recipe.after(spec), steps=recipe.steps, rate=recipe.rate, seed=spec.seed + 2)
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for own, other in zip(model.parameters(), moved.parameters(), strict=True):
            random = torch.randn(own.shape, generator=generator)
            own += random * (other - own).norm() / random.norm()
    _save(model, tokenizer, after)


MAKERS: dict[str, Callable[[Spec, Recipe, Path, Path, Path], None]] = {
    "fit": _fitted,
    "grpo": _grpo,
    "order": _in_other_order,
    "same": _same,
    "noise": _noise,
}
