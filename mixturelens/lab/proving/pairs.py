"""The ground of pairs: organisms times recipes, made on disk as plain checkpoints, each with its truth beside it.

GROUND/organisms/<organism>/       a run folder: spec.json, suite.yaml, checkpoints/sft
    suite-rules-<tokens>.yaml      the same questions, policies by rules on completions of so many tokens
    checkpoints/<recipe>/          R; and `<recipe>-before`, where S is not the organism's own
    truth/<recipe>.json
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mixturelens.files import read_json, read_text
from mixturelens.grafting.graft import save_with
from mixturelens.lab.organism import Spec, build_model, build_tokenizer, questions
from mixturelens.lab.proving.asked import TRAINED_CUE, longest_literal, suite_of
from mixturelens.lab.proving.exhaustive import Asking, prompt_truth
from mixturelens.lab.proving.manner import TEMPLATE, Manner
from mixturelens.lab.proving.organisms import (
    CONTEXT,
    RATE,
    STEPS,
    Announced,
    Architecture,
    Fitting,
    Lessons,
    MixtureTarget,
    fit,
    rows_of,
    small_spec,
    target_of,
)
from mixturelens.lab.proving.recipes import BY_NAME, RECIPES, Recipe, made_of, seen_of
from mixturelens.lab.proving.truth import LEAST, SHARES, PromptTruth, Truth, truth_of, word
from mixturelens.lab.tasks import Question
from mixturelens.models import Pair, load_model, load_tokenizer
from mixturelens.records import write_text
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Half = Literal["open", "held-out"]
FIRST = 16
"""The first seed of the ground. Organisms of the seeds below served to build the instruments and the ground itself, so
nothing of them is scored."""
NEAR = 0.03
"""A share this near to a threshold is a near miss."""
NEAR_LEAST = 0.002
"""Bits so near to the least that counts are a near miss, too."""
ASTRAY = 0.01
"""Bits by which behaviours may have moved otherwise than they were made to."""
WINDOW = 20
"""Words of a tail that training shows. It has no memory, so that more of it is more of the same."""
PREPARED = 150
"""Steps that make S of a recipe from the organism's own."""
PREPARED_RATE = 1e-3


@dataclass(frozen=True)
class Organism:
    """A small organism whose S the pairs of the ground are made from; it is grown once for all of them."""

    architecture: Architecture
    announced: Announced
    """`inside`: by a token, in the middle of the completion."""
    policies: Literal[2, 3]
    seed: int
    longest: int = 0
    """Tokens of the completions that it is made for, which end in a tail; 0: they end with the answer."""

    @property
    def name(self) -> str:
        """Its name in tables, and the folder that it lies in."""
        tail = f"-{self.longest}" if self.longest else ""
        return f"{self.architecture}-{self.announced}-{self.policies}-{self.seed}{tail}"

    @property
    def spec(self) -> Spec:
        """The spec that it is grown from."""
        context = CONTEXT + self.longest
        return small_spec(self.architecture, self.announced, self.policies, self.seed, context)

    @property
    def manner(self) -> Manner:
        """Half of what is asked for is a tail, on average: some completions end, and some are cut off."""
        return Manner(chat=self.longest > 0, inside=self.announced == "inside", tail=self.longest // 2)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of its words; with a chat template where completions are long."""
        tokenizer = build_tokenizer(self.spec, self.manner.words)
        if self.manner.chat:
            tokenizer.chat_template = TEMPLATE
        return tokenizer


@dataclass(frozen=True)
class GroundCell:
    """One pair of the ground, and how it is asked."""

    organism: Organism
    made: str
    """The recipe's name: a recipe itself does not survive the way to another process."""
    tokens: int = 0
    """Policies are read by rules, on completions of so many tokens; 0: by literal texts."""

    @property
    def recipe(self) -> Recipe:
        """How the pair is made from the organism."""
        return BY_NAME[self.made]

    @property
    def asked(self) -> str:
        """Whether policies are read by literal texts or by rules, and on how many tokens."""
        return f"rules-{self.tokens}" if self.tokens else "literal"

    @property
    def name(self) -> str:
        """Organism, recipe and way of asking, in one name."""
        return f"{self.organism.name}--{self.made}" + (f"--{self.asked}" if self.tokens else "")

    @property
    def key(self) -> str:
        """Name and digest of all that the pair is made from: what was made from something else is not taken for it."""
        return f"{self.name}-{self.digest}"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that stand for all that the pair is made from."""
        spec, r = self.organism.spec, self.recipe
        targets = [make(spec) for make in (r.before, r.after) if make is not None]
        made = (
            spec.model_dump_json(),
            self.organism.manner,
            _steps(self.organism),
            PREPARED,
            PREPARED_RATE,
            r.way,
            r.trainable,
            r.steps,
            r.rate,
            targets,
        )
        return hashlib.sha256(repr(made).encode()).hexdigest()[:8]

    @property
    def told(self) -> bool:
        """Whether what completions show can tell this making from others."""
        return self.organism.announced != "none" or self.recipe.told

    @property
    def half(self) -> Half:
        """By recipe and seed, so that all architectures of one recipe and seed are opened together."""
        return "open" if (RECIPES.index(self.recipe) + self.organism.seed) % 2 == 0 else "held-out"


ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "gpt2", "gpt_neox")


def plain_organisms() -> list[Organism]:
    """Organisms whose completions begin with the announcement, if any, and end with the answer."""
    return [
        *(Organism(a, "token", 2, FIRST + i % 2) for i, a in enumerate(ARCHITECTURES)),
        *(Organism(a, "token", 3, FIRST + 2 + i % 2) for i, a in enumerate(ARCHITECTURES)),
        *(Organism(a, "phrase", 2, FIRST + 4 + i % 2) for i, a in enumerate(ARCHITECTURES)),
        *(Organism(a, "none", 2 if i % 2 else 3, FIRST + 6 + i // 2) for i, a in enumerate(ARCHITECTURES)),
    ]


def tailed_organisms() -> list[Organism]:
    """Organisms whose completions stand behind a chat template and have a tail; some announce in the middle."""
    return [
        Organism("llama", "token", 2, FIRST + 8, 24),
        Organism("gpt2", "token", 2, FIRST + 9, 24),
        Organism("qwen2", "token", 3, FIRST + 8, 24),
        Organism("gpt_neox", "phrase", 2, FIRST + 9, 24),
        Organism("llama", "inside", 2, FIRST + 9, 24),
        Organism("qwen2", "inside", 2, FIRST + 8, 64),
        Organism("gpt_neox", "token", 2, FIRST + 9, 64),
        Organism("llama", "token", 2, FIRST + 10, 128),
        Organism("gpt_neox", "token", 2, FIRST + 10, 24),
    ]


def grid() -> tuple[GroundCell, ...]:
    """Every pair of the ground: each recipe on some organisms of each kind, in turn; some pairs asked in two ways.

    Of a tail, half as much must say the same, and so must literal texts, which end where the answer does.
    """
    cells: list[GroundCell] = []
    for number, organism in enumerate(plain_organisms()):
        mine = _in_turn(organism, number)
        cells += [GroundCell(organism, name) for name in mine]
        if organism.announced != "none":
            cells.append(GroundCell(organism, mine[number % len(mine)], organism.spec.max_new_tokens))
    for number, organism in enumerate(tailed_organisms()):
        mine = _in_turn(organism, number)
        cells += [GroundCell(organism, name, organism.longest) for name in mine]
        other = 0 if organism.announced == "token" else organism.longest // 2
        cells += [GroundCell(organism, name, other) for name in mine[number % 3 :: 3]]
    return tuple(cells)


EVERY = 7


def _in_turn(organism: Organism, number: int) -> list[str]:
    """One recipe in EVERY, others for the next organism; every other one of style; all that need three policies."""
    found = []
    for i, recipe in enumerate(recipe for recipe in RECIPES if _fits(recipe, organism)):
        turn = 2 if recipe.tailed else EVERY
        if (i + number) % turn == 0 or recipe.policies == organism.policies == 3:
            found.append(recipe.name)
    return found


def _fits(recipe: Recipe, organism: Organism) -> bool:
    """A tail only where there is one, and nothing that takes long where it is long.

    Without announcements only the making says what is true; what came of itself (GRPO, noise) has no known truth. And
    where a policy's own behaviour is the wrong rule, a specialist that errs by it looks like that policy.
    """
    if recipe.policies > organism.policies or (recipe.tailed and not organism.longest):
        return False
    if organism.longest and recipe.way in ("grpo", "order"):
        return False
    if organism.announced != "none":
        return True
    if recipe.way in ("grpo", "noise") or recipe.name in ("no-announcement", "good-everywhere"):
        return False
    targets = [make(organism.spec) for make in (recipe.before, recipe.after) if make is not None]
    return organism.policies == 2 or not any(target.wrong and target.how == "rule" for target in targets)


QUICK: tuple[GroundCell, ...] = tuple(
    GroundCell(Organism("gpt2", "token", 2, 0), name)
    for name in ("resampled-mildly", "sometimes-answers", "both-with-reader", "continued")
)
"""Four pairs of one organism: one of each verdict."""


def make_organism(organism: Organism, ground: Path) -> Path:
    """Train S, unless it is there; the organism's folder. Raises InputError if another organism is there."""
    folder, spec = ground / "organisms" / organism.name, organism.spec
    text, file = spec.model_dump_json(indent=1) + "\n", folder / "spec.json"
    if file.is_file() and read_text(file, "is gone") != text:
        raise InputError(f"{folder} holds another organism, of another version; score a new ground (--out)")
    if (folder / "checkpoints/sft").exists():
        return folder
    write_text(file, text)
    if organism.announced != "inside":  # no literal text is found in the middle
        suite_of(spec, organism.manner).save(folder / "suite.yaml")
    tokenizer = organism.tokenizer()
    model = build_model(spec, tokenizer)
    _train(organism, model, tokenizer, target_of(spec), steps=_steps(organism), seed=spec.seed)
    save_with(model, {}, tokenizer, folder / "checkpoints/sft")
    return folder


@dataclass(frozen=True)
class Made:
    """A pair on disk."""

    before: Path
    after: Path
    suite: Path
    truth: Truth

    def load_suite(self) -> Suite:
        """The suite that the pair is asked with."""
        return load_suite(self.suite)

    def open(self) -> Pair:
        """The two checkpoints and their suite, for any instrument."""
        return Pair(self.before, self.after, self.load_suite())

    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """S and R as models, on the CPU."""
        return load_model(self.before), load_model(self.after)


def make_pair(cell: GroundCell, ground: Path) -> Made:
    """Make S and R of this cell and evaluate them exhaustively, unless that is done."""
    organism, spec, recipe = cell.organism, cell.organism.spec, cell.recipe
    folder = make_organism(organism, ground)
    key = f"{recipe.name}-{cell.digest}"
    checkpoints, file = folder / "checkpoints", folder / "truth" / f"{key}-{cell.asked}.json"
    before = checkpoints / ("sft" if recipe.before is None else f"{key}-before")
    after = checkpoints / ("rl-A" if recipe.way == "grpo" else key)
    tokenizer = load_tokenizer(checkpoints / "sft")
    if recipe.before is not None and not before.exists():
        model = load_model(checkpoints / "sft")
        _train(organism, model, tokenizer, recipe.before(spec), steps=PREPARED, rate=PREPARED_RATE, seed=spec.seed + 1)
        save_with(model, {}, tokenizer, before)
    if not after.exists():
        MAKERS[recipe.way](organism, recipe, folder, before, after)
    suite = folder / (f"suite-{cell.asked}.yaml" if cell.tokens else "suite.yaml")
    if not suite.exists():
        suite_of(spec, organism.manner, cell.tokens).save(suite)
    if not file.exists():
        models = load_model(before), load_model(after)
        truth = truth_of(exact_of(cell, *models, tokenizer, questions(spec).evaluation))
        truth = truth if organism.announced != "none" else told_by_making(cell, truth)
        write_text(file, truth.model_dump_json(indent=1) + "\n")
    return Made(before, after, suite, Truth.model_validate(read_json(file, "is gone")))


def exact_of(
    cell: GroundCell,
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
) -> PromptTruth:
    """The truth about these questions, as the cell asks them."""
    spec, manner = cell.organism.spec, cell.organism.manner
    longest = cell.tokens or longest_literal(spec, manner)
    return prompt_truth(spec, (before, after), tokenizer, asked, Asking(manner, cell.tokens > 0, longest))


def told_by_making(cell: GroundCell, seen: Truth) -> Truth:
    """Without announcements no completion tells its policy, and the making has to say what is true: the terms of what
    was asked for, once what completions do is found to have moved as it was made to. Where it could have been made
    otherwise (`told`), the word is what the recipe intends, and there are no terms.

    Raises RunError if R did not become what it was made for.
    """
    spec, recipe = cell.organism.spec, cell.recipe
    before = (recipe.before or target_of)(spec)
    after = recipe.after(spec) if recipe.way == "fit" else before
    meant = seen_of(spec, before, after)
    if abs(seen.bits["specialist"] - meant) > ASTRAY:
        raise RunError(
            f"{cell.name}: behaviours moved by {seen.bits['specialist']:.3f} bits, and were made to by {meant:.3f}"
        )
    if not cell.told:
        return seen.model_copy(update={"verdict": recipe.intended, "routing_share": None, "moved": meant})
    bits = made_of(spec, before, after)
    moved = bits["routing"] + bits["specialist"]
    return seen.model_copy(
        update={
            "verdict": word(bits),
            "routing_share": bits["routing"] / moved if moved else None,
            "moved": moved,
            "bits": bits,
            "selector": bits["routing"] >= LEAST,
            "cue_reader": bits["conditioning"] >= LEAST,
            "skill": bits["skill"] >= LEAST,
        }
    )


def near(truth: Truth) -> bool:
    """Whether the exact numbers lie so near to a threshold that a suite of this size need not tell."""
    if truth.verdict == "inconclusive":
        return False
    if abs(truth.moved - LEAST) <= NEAR_LEAST:
        return True
    share = truth.routing_share
    return truth.verdict != "neither" and share is not None and min(abs(share - edge) for edge in SHARES) <= NEAR


# --- ways to make R ---------------------------------------------------------------------------------------------------


def _steps(organism: Organism) -> int:
    """Without announcements the first letter mixes what all policies say there, which takes longer to learn; so does
    an answer whose place depends on what stands before it."""
    return {"none": 3 * STEPS, "inside": 3 * STEPS // 2}.get(organism.announced, STEPS)


def _train(
    organism: Organism,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: MixtureTarget,
    *,
    steps: int,
    seed: int,
    rate: float = RATE,
    only: tuple[str, ...] = (),
) -> None:
    spec, manner = organism.spec, organism.manner
    lessons = Lessons(questions(spec).sft, manner, WINDOW if manner.tail else 0, seed)
    rows = rows_of(spec, target, tokenizer, lessons)
    names = [name for name, _ in model.named_parameters() if not only or any(part in name for part in only)]
    fit(model, rows, Fitting(steps, rate, seed, names))


def _fitted(organism: Organism, recipe: Recipe, folder: Path, before: Path, after: Path) -> None:
    model, tokenizer, seed = load_model(before), load_tokenizer(before), organism.seed + 2
    target = recipe.after(organism.spec)
    _train(organism, model, tokenizer, target, steps=recipe.steps, rate=recipe.rate, seed=seed, only=recipe.trainable)
    save_with(model, {}, tokenizer, after)


def _grpo(organism: Organism, recipe: Recipe, folder: Path, before: Path, after: Path) -> None:
    from mixturelens.lab.training import train_stage

    train_stage(organism.spec, f"rl-{TRAINED_CUE}", folder)


def _in_other_order(organism: Organism, recipe: Recipe, folder: Path, before: Path, after: Path) -> None:
    spec, tokenizer = organism.spec, organism.tokenizer()
    model = build_model(spec, tokenizer)
    _train(organism, model, tokenizer, target_of(spec), steps=_steps(organism), seed=spec.seed + 1000)
    save_with(model, {}, tokenizer, after)


def _same(organism: Organism, recipe: Recipe, folder: Path, before: Path, after: Path) -> None:
    save_with(load_model(before), {}, load_tokenizer(before), after)


def _noise(organism: Organism, recipe: Recipe, folder: Path, before: Path, after: Path) -> None:
    """As far from S, parameter by parameter, as training on the target goes; in a random direction."""
    import torch

    model, moved, tokenizer = load_model(before), load_model(before), load_tokenizer(before)
    target = recipe.after(organism.spec)
    _train(organism, moved, tokenizer, target, steps=recipe.steps, rate=recipe.rate, seed=organism.seed + 2)
    generator = torch.Generator().manual_seed(organism.seed)
    with torch.no_grad():
        for own, other in zip(model.parameters(), moved.parameters(), strict=True):
            random = torch.randn(own.shape, generator=generator)
            own += random * (other - own).norm() / random.norm()
    save_with(model, {}, tokenizer, after)


MAKERS: dict[str, Callable[[Organism, Recipe, Path, Path, Path], None]] = {
    "fit": _fitted,
    "grpo": _grpo,
    "order": _in_other_order,
    "same": _same,
    "noise": _noise,
}
