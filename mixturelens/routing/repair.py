"""Repair of transfer: bring the harmed cue back without training, by what the cue reader says, and score it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.behaviour.record import BehaviourRecord, Cell, Harm, find_harm, grid_of, policy_table
from mixturelens.checkpoints import end_tokens, load_model, load_tokenizer
from mixturelens.contrasts import Contrasts, cue_contrasts
from mixturelens.hooks.intervened import Intervened, Prompt, known_prompts
from mixturelens.hooks.lens import Lens, Tokens, load_lens, tokens
from mixturelens.patching.sweep import find_reader, head_sites, sides
from mixturelens.records import Record, new_folder
from mixturelens.stats import interval, map_draws
from mixturelens.suite import Suite, wordings
from mixturelens.types import Frozen, InputError, Interval, Intervention, Site

RepairKind = Literal["interchange", "zero", "mean", "steer", "edit"]
"""`interchange`: the cue reader's output is that of the trained cue; `zero`, `mean` (over all cues equally): it is
ablated; `steer`: the mean difference between cues is added behind its layer; `edit`: its output weights are changed."""


class Random(Frozen):
    """The same repair at random places of equal size: the distribution that a repair has to leave behind."""

    places: tuple[str, ...]
    harmed: tuple[float, ...]
    """Accuracy under the harmed cue."""
    trained: tuple[float, ...]
    median: float | None
    """Of `harmed`."""
    above: float | None
    """Share of random repairs that reach at least what the repair itself reaches."""


class Repair(Frozen):
    """One way to repair, judged on questions that chose neither heads nor strength."""

    kind: RepairKind
    what: tuple[str, ...]
    """The interventions, in words."""
    interventions: tuple[Intervention, ...] = ()
    """As values; empty for an edit of the weights."""
    accuracy: dict[str, Interval]
    """cue -> expected accuracy."""
    gap_closed: Interval
    """(repaired - R) / (best forced accuracy of S - R) under the harmed cue."""
    trained_change: Interval
    """Change of the expected accuracy under the trained cue."""
    cells: tuple[Cell, ...]
    """The policy table: R (before) and repaired (after)."""
    random: Random


class RepairRecord(Record):
    """Repairs of one pair's harmed cue."""

    KIND = "repair"

    trained_cue: str
    harmed_cue: str
    policy: str
    heads: tuple[Site, ...]
    """The cue reader, found by patching on the other half of the questions."""
    questions: int
    policies: tuple[str, ...]
    cues: tuple[str, ...]
    before: dict[str, Interval]
    """cue -> expected accuracy of S."""
    after: dict[str, Interval]
    """cue -> expected accuracy of R."""
    ceiling: Interval
    """Best forced accuracy of S under the harmed cue: what a repair could reach."""
    repairs: tuple[Repair, ...]
    checkpoint: str | None = None
    """Folder of the repaired plain checkpoint, beside the run's others."""


# --- measuring --------------------------------------------------------------------------------------------------------

RANDOM = 24
"""Random places, at most, that each repair is compared with."""
RIDGES = (1.0, 0.1, 0.01, 0.001)
"""How strongly an edit is held back, in mean squares of a head's output; chosen on half of the questions."""
AMOUNTS = (0.5, 1.0, 2.0, 4.0)
"""Steering strengths to choose from, in mean differences between the cues."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Ground:
    """What repairs are tried on: R under its lens, and the questions that choose and those that judge."""

    lens: Lens
    suite: Suite
    harm: Harm
    scorer: Scorer
    choose: Prompts
    judge: Prompts
    known: Mapping[tuple[int, ...], Prompt]
    contrasts: Contrasts
    """Cue contrasts of all questions; their first half chooses."""
    seed: int

    def behaviour(self, interventions: Sequence[Intervention], prompts: Prompts) -> Behaviour:
        model = Intervened(self.lens, interventions, self.known) if interventions else self.lens.model
        return measure(self.scorer, model, prompts, self.seed)

    def accuracies(self, behaviour: Behaviour, prompts: Prompts) -> dict[str, Interval]:
        draws = grid_of(prompts, self.seed).draws(behaviour.correct.sum(-1))
        return {cue: interval(draws[:, c]) for c, cue in enumerate(self.suite.cues)}

    def both(self, behaviour: Behaviour, prompts: Prompts) -> tuple[float, float]:
        """Accuracy under the harmed and under the trained cue."""
        found = self.accuracies(behaviour, prompts)
        return found[self.harm.harmed_cue].value or 0.0, found[self.harm.trained_cue].value or 0.0


def repair_record(
    before: Path,
    after: Path,
    suite: Suite,
    behaviour: BehaviourRecord,
    *,
    save_to: Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    say: Say | None = None,
) -> RepairRecord:
    """Find the cue reader of R on half of the questions, and repair through it; judge on the other half.

    `save_to` takes the repaired plain checkpoint. Raises InputError if the trained cue is not known or nothing is to be
    repaired: R does under the other cue what the best policy of S could.
    """
    say = say or (lambda _: None)
    harm = find_harm(behaviour)
    lens = load_lens(after, device)
    ground = _ground(lens, suite, harm, seed, device)
    plain = ground.behaviour((), ground.judge)
    start = measure(ground.scorer, load_model(before, device), ground.judge, seed)
    grid = grid_of(ground.judge, seed)
    column = suite.cues.index(harm.harmed_cue)
    forced = grid.draws(start.forced_accuracy)[:, column]
    ceiling = forced[:, int(np.nanargmax(forced[0]))]
    broken = grid.draws(plain.correct.sum(-1))
    if ceiling[0] - broken[0, column] < WORTH:
        raise InputError(
            f"nothing to repair: accuracy under {harm.harmed_cue!r} is {broken[0, column]:.3f}, and the best policy of "
            f"the checkpoint before reaches {ceiling[0]:.3f} there"
        )
    say("finding the cue reader")
    reader = find_reader(lens, ground.contrasts, "policy", seed)
    heads = tuple(head.model_copy(update={"position": "completion"}) for head in reader.heads)
    others = _other_groups(lens, heads, seed)
    steering, amount = _steering(ground, heads)

    def scored(
        kind: RepairKind, what: Sequence[str], interventions: Sequence[Intervention], found: Behaviour, null: Random
    ) -> Repair:
        accuracy = grid.draws(found.correct.sum(-1))
        trained = suite.cues.index(harm.trained_cue)
        return Repair(
            kind=kind,
            what=tuple(what),
            interventions=tuple(interventions),
            accuracy=ground.accuracies(found, ground.judge),
            gap_closed=map_draws(
                lambda repaired, r, best: (repaired - r) / (best - r), accuracy[:, column], broken[:, column], ceiling
            ),
            trained_change=interval(accuracy[:, trained] - broken[:, trained]),
            cells=policy_table(plain, found, ground.judge, grid),
            random=null,
        )

    repairs = []
    for kind in ("interchange", "zero", "mean", "steer"):
        say(f"repair: {kind}")
        if kind == "steer":
            values = [_steer(heads, steering, amount)]
            null = [[_steer(heads, direction, amount)] for direction in _random_directions(steering, seed)]
            names = [f"random direction {i}" for i in range(len(null))]
        else:
            values = [_at_head(kind, head, harm.trained_cue) for head in heads]
            null = [[_at_head(kind, head, harm.trained_cue) for head in group] for group in others]
            names = ["+".join(str(head) for head in group) for group in others]
        found = ground.behaviour(values, ground.judge)
        tried = [ground.both(ground.behaviour(each, ground.judge), ground.judge) for each in null]
        reached = ground.both(found, ground.judge)[0]
        repairs.append(scored(kind, [str(v) for v in values], values, found, _random(names, tried, reached)))
    say("repair: edit")
    ridge = _choose_ridge(ground, heads)
    edited = fit_edit(ground, heads, ridge)
    with written(lens, edited):
        found = ground.behaviour((), ground.judge)
    if save_to is not None:
        save_edit(lens, edited, after, save_to)
        # what is reported is what the saved folder does
        found = measure(ground.scorer, load_model(save_to, device), ground.judge, seed)
    tried = []
    for group in others:
        with written(lens, fit_edit(ground, group, ridge)):
            tried.append(ground.both(ground.behaviour((), ground.judge), ground.judge))
    names = ["+".join(str(head) for head in group) for group in others]
    what = [f"output weights of {head.model_copy(update={'position': None})}, ridge {ridge:g}" for head in heads]
    reached = ground.both(found, ground.judge)[0]
    repairs.append(scored("edit", what, (), found, _random(names, tried, reached)))
    return RepairRecord(
        trained_cue=harm.trained_cue,
        harmed_cue=harm.harmed_cue,
        policy=harm.policy,
        heads=heads,
        questions=len(grid.index),
        policies=tuple(suite.policies),
        cues=suite.cues,
        before=ground.accuracies(start, ground.judge),
        after=ground.accuracies(plain, ground.judge),
        ceiling=interval(ceiling),
        repairs=tuple(repairs),
        checkpoint=save_to.name if save_to is not None else None,
    )


WORTH = 0.02
"""Accuracy that must be missing under the harmed cue for a repair to make sense."""


def _ground(lens: Lens, suite: Suite, harm: Harm, seed: int, device: str) -> _Ground:
    tokenizer = lens.tokenizer
    contrasts = cue_contrasts(suite, tokenizer, harm.policy, harm.trained_cue, harm.harmed_cue)
    choosing = {row.question for row in contrasts.half(0).rows}
    choose, judge = ([row for row in suite.neutral if (row.id in choosing) == side] for side in (True, False))
    if not judge:
        raise InputError("one question is not enough: one half chooses what to repair, the other half judges it")
    config = lens.model.config.get_text_config()
    return _Ground(
        lens=lens,
        suite=suite,
        harm=harm,
        scorer=Scorer(end_tokens(lens.model, tokenizer), config.vocab_size, device),
        choose=prepare(suite, choose, tokenizer),
        judge=prepare(suite, judge, tokenizer),
        known=known_prompts(suite, suite.neutral, tokenizer),
        contrasts=contrasts,
        seed=seed,
    )


def _at_head(kind: str, head: Site, trained_cue: str) -> Intervention:
    if kind == "interchange":
        return Intervention(site=head, do="replace", source=trained_cue)
    return Intervention(site=head, do="scale", amount=0.0) if kind == "zero" else Intervention(site=head, do="mean")


def _other_groups(lens: Lens, heads: Sequence[Site], seed: int) -> list[tuple[Site, ...]]:
    """Groups of as many heads, none of them of the reader: all of them, or RANDOM drawn ones."""
    known = {(head.layer, head.head) for head in heads}
    rest = [site for site in head_sites(lens, "completion") if (site.layer, site.head) not in known]
    groups = list(itertools.combinations(rest, len(heads)))
    if len(groups) > RANDOM:
        drawn = np.random.default_rng(seed).choice(len(groups), RANDOM, replace=False)
        groups = [groups[i] for i in sorted(drawn)]
    return groups


def _random(names: Sequence[str], tried: Sequence[tuple[float, float]], reached: float) -> Random:
    harmed = tuple(round(harmed, 6) for harmed, _ in tried)
    return Random(
        places=tuple(names),
        harmed=harmed,
        trained=tuple(round(trained, 6) for _, trained in tried),
        median=float(np.median(harmed)) if harmed else None,
        above=float(np.mean([value >= reached for value in harmed])) if harmed else None,
    )


# --- steering ---------------------------------------------------------------------------------------------------------


def _steering(ground: _Ground, heads: Sequence[Site]) -> tuple[np.ndarray, float]:
    """Mean difference between the cues behind the reader's last layer, and the strength that repairs best."""
    key = (max(head.layer for head in heads), "resid_post")
    both = sides(ground.contrasts.half(0), ground.lens)
    clean, corrupt = (ground.lens.capture(batch, [key])[0][key][:, -1] for batch in (both.clean, both.corrupt))
    direction = (clean - corrupt).mean(0).double().cpu().numpy()

    def worst(amount: float) -> float:
        return min(ground.both(ground.behaviour([_steer(heads, direction, amount)], ground.choose), ground.choose))

    return direction, max(AMOUNTS, key=worst)


def _steer(heads: Sequence[Site], direction: np.ndarray, amount: float) -> Intervention:
    site = Site(layer=max(head.layer for head in heads), component="resid_post", position="completion")
    return Intervention(site=site, do="add", vector=tuple(float(x) for x in direction), amount=amount)


def _random_directions(direction: np.ndarray, seed: int) -> list[np.ndarray]:
    drawn = np.random.default_rng(seed).normal(size=(RANDOM // 2, len(direction)))
    return list(drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * np.linalg.norm(direction))


# --- a weight edit ----------------------------------------------------------------------------------------------------

Edited = Mapping[tuple[int, int], torch.Tensor]
"""(layer, head) -> its new output weights, [d_head, d_model]."""


def fit_edit(ground: _Ground, heads: Sequence[Site], ridge: float) -> Edited:
    """Output weights with which the heads write, under the harmed cue, what they write under the trained one.

    Least squares over the policy word and what follows it, on the questions that choose. On harmed prompts the target
    is what the head writes at the same place of the same completion under the trained cue; on trained prompts (every
    policy put in place) it is what it writes now. A ridge holds the weights near their old values. (In the manner of
    ROME, Meng et al. 2022, arXiv 2202.05262, who edit an MLP's output weights.)
    """
    lens, harm = ground.lens, ground.harm
    found: dict[tuple[int, int], torch.Tensor] = {}
    for layer in dict.fromkeys(head.layer for head in heads):
        units = [head.head for head in heads if head.layer == layer]

        def outputs(cue: str, policy: str, layer: int = layer, units: list[int | None] = units) -> torch.Tensor:
            batch, lengths = _completed(ground, cue, policy)
            z = lens.capture(batch, [(layer, "z")])[0][layer, "z"][:, :, units].flatten(2)
            ends = [z[row, z.shape[1] - length :] for row, length in enumerate(lengths)]
            return torch.cat(ends).double()

        old = torch.cat([lens.output_weights(layer)[unit] for unit in units]).double()
        harmed, target = outputs(harm.harmed_cue, harm.policy), outputs(harm.trained_cue, harm.policy)
        gram = harmed.T @ harmed / len(harmed)
        scale = float(gram.trace()) / len(gram)
        for policy in ground.suite.policies:
            if wordings(ground.suite.policies[policy]):
                keep = outputs(harm.trained_cue, policy)
                gram = gram + keep.T @ keep / len(keep)
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        pull = harmed.T @ ((target - harmed) @ old) / len(harmed)
        new = old + torch.linalg.solve(gram + ridge * scale * identity, pull)
        for unit, weights in zip(units, new.split(lens.d_head), strict=True):
            assert unit is not None
            found[layer, unit] = weights.to(lens.output_weights(layer).dtype)
    return found


def _completed(ground: _Ground, cue: str, policy: str) -> tuple[Tokens, list[int]]:
    """Prompts of the choosing questions under a cue, with a policy put in place and what it says: the answer, or its
    literal behaviour; and how many tokens that is."""
    prompts = ground.choose
    number = list(ground.suite.policies).index(policy)
    announced = next(a for a in prompts.announcements if a.policy == number)
    answers = policy == ground.harm.policy
    literal = list(prompts.behaviours[0][1]) if prompts.behaviours and not answers else []
    rows, lengths = [], []
    for row, context, answer in zip(prompts.rows, prompts.contexts, prompts.answers, strict=True):
        if row.cue == cue:
            completion = [*announced.ids, *(answer if answers else literal)]
            rows.append([*context, *completion])
            lengths.append(len(completion))
    return tokens(rows, ground.lens.device), lengths


def _choose_ridge(ground: _Ground, heads: Sequence[Site]) -> float:
    def worst(ridge: float) -> float:
        with written(ground.lens, fit_edit(ground, heads, ridge)):
            return min(ground.both(ground.behaviour((), ground.choose), ground.choose))

    return max(RIDGES, key=worst)


@contextlib.contextmanager
def written(lens: Lens, edited: Edited) -> Iterator[None]:
    """The model with edited output weights, for the length of a block."""
    old = {(layer, head): lens.output_weights(layer)[head].clone() for layer, head in edited}
    try:
        for (layer, head), weights in edited.items():
            lens.output_weights(layer)[head] = weights
        yield
    finally:
        for (layer, head), weights in old.items():
            lens.output_weights(layer)[head] = weights


def save_edit(lens: Lens, edited: Edited, after: Path, folder: Path) -> None:
    """The edited model as a plain checkpoint folder, which `from_pretrained` loads."""
    plain = load_model(after)
    with written(lens, edited), torch.no_grad():
        for layer in {layer for layer, _ in edited}:
            plain.get_parameter(lens.output_weights_name(layer)).copy_(lens.output_projection(layer)[1].cpu())
    with new_folder(folder) as temporary:
        plain.save_pretrained(temporary)
        load_tokenizer(after).save_pretrained(temporary)
