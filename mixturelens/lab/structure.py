"""What became of a schedule that switches objectives: indices of behaviour, the router behind it, and its structure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from mixturelens.behaviour.likelihood import Model, Scorer
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.hooks.intervened import Intervened
from mixturelens.hooks.lens import Lens, load_lens, tokens
from mixturelens.hooks.placed import PlacedPrompt, known_prompts
from mixturelens.lab.organism import Spec, build_suite
from mixturelens.lab.regimes import (
    FIXED,
    PRESENT,
    Course,
    Shares,
    Structure,
    alike,
    classify,
    classify_all,
    culled,
    earned,
    fragility,
    paid,
    pair_shares,
    retention,
)
from mixturelens.models import end_tokens, load_model, load_tokenizer
from mixturelens.patching.sweep import ENOUGH, MOST, head_sites
from mixturelens.records import Record
from mixturelens.stats import (
    PROPORTION,
    apart,
    half_of,
    interval,
    mean_interval,
    resample_counts,
    resampled_mean,
    share,
    too_few,
)
from mixturelens.types import NOT_MEASURED, Component, Frozen, InputError, Interval, Intervention, Site

FOLLOWS = 0.1
"""Conditionality under which there is no routing of regimes whose place could be asked for."""
CARRIES = 0.5
"""Share of the conditionality that a separable router surely carries."""
ASKED = 64
"""Questions, at most, that the mechanism is measured on."""
SHUFFLES = 20


class RegimeRouter(Frozen):
    """Where the last checkpoint tells two regimes apart, on questions where their objectives differ.

    A router is separable if a few heads (at most MOST) carry it: their outputs *interchanged* between the cues turn
    what is done under one into what is done under the other. Chosen on half of the questions, judged on the other. If
    not even those carry it, the distinction is folded into the circuit.
    """

    questions: int
    """That judge."""
    decoded: Interval
    """Accuracy of a linear probe for the regime, in the residual stream behind the last layer at the last token of the
    prompt; chance is 0.5."""
    shuffled: float
    """The same probe fitted on shuffled labels."""
    heads: tuple[Site, ...] = ()
    carried: Interval = NOT_MEASURED
    """Share of the conditionality that the interchange undoes, of 1 + 1: under either cue. Null under FOLLOWS."""
    rival: Interval = NOT_MEASURED
    """The same of the best other heads, as many, on the judging half (which favours them)."""
    ablated: Interval = NOT_MEASURED
    """Share of the conditionality that is gone once the heads' outputs are their mean over all cues."""
    overlap: Interval = NOT_MEASURED
    """Of the circuits of the two regimes: with e the change of what a cue's own objective pays when a head or MLP is
    zeroed, the sum over these of the smaller e over that of the larger. 1: the same parts matter as much."""

    @property
    def separable(self) -> bool | None:
        """None where there is no routing, or intervals leave it open."""
        if not self.carried.measured:
            return None
        return True if self.carried.above(CARRIES) else False if self.carried.below(CARRIES) else None


class Regimes(Frozen):
    """Two regimes, and what became of them."""

    first: str
    second: str
    shares: Shares
    structure: Structure
    mechanism: RegimeRouter | None = None


class Culled(Frozen):
    """What an SFT phase removes of the trait that the RL phases before it had raised."""

    phase: str
    trait: str
    """The cue whose objective pays it."""
    under: dict[str, Interval]
    """cue -> share of what RL raised there that is gone."""


class Checkpoint(Frozen):
    """What a checkpoint of the schedule earns: `earned[cue][objective]`."""

    name: str
    train: str | None
    """`rl` or `sft`; null before the first phase."""
    trained: tuple[str, ...] = ()
    steps: int = 0
    earned: dict[str, dict[str, Interval]]


class StructureRecord(Record):
    """The structure that a schedule of phases left behind: generalist, conditional policy, churn, a mix, or nested."""

    KIND = "structure"

    questions: int
    looked: bool
    """Whether the mechanism was asked for."""
    cues: tuple[str, ...]
    structure: Structure
    groups: tuple[tuple[str, ...], ...] = ()
    """Where regimes nest: those that share one behaviour."""
    pairs: tuple[Regimes, ...]
    retention: dict[str, Interval]
    fragility: Interval
    culled: tuple[Culled, ...] = ()
    checkpoints: tuple[Checkpoint, ...]
    thresholds: dict[str, float] = {"present": PRESENT, "fixed": FIXED, "follows": FOLLOWS, "carries": CARRIES}
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class StructureSettings:
    """Which schedule of a run is looked at, and how."""

    end: str | None = None
    """The phase in which it ends, which no other follows; None: the spec's last."""
    mechanism: bool = True
    """Whether the router is looked for in the network, too."""
    device: str = "cpu"
    seed: int = 0


def structure_record(
    spec: Spec, run: Path, settings: StructureSettings | None = None, say: Callable[[str], None] | None = None
) -> StructureRecord:
    """Measure every checkpoint of a schedule, and look into the last one; `say` is told each step.

    Raises InputError if the spec has no such schedule: two phases at least, and two regimes.
    """
    settings, say = settings or StructureSettings(), say or (lambda _: None)
    device, seed = settings.device, settings.seed
    names = _schedule(spec, settings.end)
    suite = build_suite(spec)
    tokenizer = load_tokenizer(run / "checkpoints" / names[-1])
    prompts = prepare(suite, suite.neutral, tokenizer)
    found = []
    for name in names:
        say(f"what {name} earns")
        model = load_model(run / "checkpoints" / name, device)
        scorer = Scorer(end_tokens(model, tokenizer), model.config.get_text_config().vocab_size, device)
        found.append(earned(spec, measure(scorer, model, prompts, seed), prompts))
    phases = [spec.phases[name] for name in names[1:]]
    course = Course(
        suite.cues, tuple((phase.train, *phase.cues) for phase in phases), np.array(found), alike(spec, prompts)
    )
    if len(course.trained) < 2:
        raise InputError(f"phases: training is on {len(course.trained)} cue; a structure is of two regimes at least")
    counts = resample_counts(course.earned.shape[-1], seed)
    missing: list[str] = []
    lens = load_lens(run / "checkpoints" / names[-1], device) if settings.mechanism else None
    pairs = []
    for first, second in itertools.combinations(course.trained, 2):
        shares = pair_shares(course, first, second, counts)
        looked = None
        differ = np.flatnonzero(~course.alike[suite.cues.index(first), suite.cues.index(second)])
        if lens is not None and len(differ) < 4:
            missing.append(f"mechanism of {first} and {second}: their objectives differ on {len(differ)} questions")
        elif lens is not None:
            say(f"the router of {first} and {second}")
            asked = np.random.default_rng(seed).permutation(differ)[:ASKED].tolist()
            looked = _mechanism(_Bench.of(spec, lens, prompts, (first, second), asked, device, seed))
        pairs.append(Regimes(first=first, second=second, shares=shares, structure=classify(shares), mechanism=looked))
    structure, groups = classify_all({(pair.first, pair.second): pair.structure for pair in pairs})
    culls = [
        Culled(
            phase=names[i + 1],
            trait=phases[i - 1].cues[0],
            under={cue: culled(course, i, cue, counts) for cue in suite.cues},
        )
        for i, phase in enumerate(phases)
        if phase.train == "sft" and i and phases[i - 1].train == "rl"
    ]
    return StructureRecord(
        questions=course.earned.shape[-1],
        looked=settings.mechanism,
        cues=suite.cues,
        structure=structure,
        groups=groups,
        pairs=tuple(pairs),
        retention={cue: retention(course, cue, counts) for cue in course.trained},
        fragility=fragility(course, counts),
        culled=tuple(culls),
        checkpoints=tuple(
            Checkpoint(
                name=name,
                train=phases[i - 1].train if i else None,
                trained=phases[i - 1].cues if i else (),
                steps=(phases[i - 1].steps or spec.rl.steps) if i else 0,
                earned={
                    cue: {
                        o: mean_interval(course.earned[i, c, k], counts, bounds=PROPORTION)
                        for k, o in enumerate(suite.cues)
                    }
                    for c, cue in enumerate(suite.cues)
                },
            )
            for i, name in enumerate(names)
        ),
        missing=(*missing, *too_few("structure", course.earned.shape[-1])),
    )


def _schedule(spec: Spec, end: str | None) -> list[str]:
    """The checkpoint that the schedule starts from, and its phases up to `end`, or up to the last of the spec."""
    if not spec.phases:
        raise InputError(f"spec {spec.name!r} has no `phases`: there is no schedule to judge")
    if end is not None and end not in spec.phases:
        raise InputError(f"{end!r} is no phase of spec {spec.name!r} ({', '.join(spec.phases)})")
    names = [end or list(spec.phases)[-1]]
    while names[0] in spec.phases:
        names.insert(0, spec.stages[names[0]][0])
    return names


# --- the router -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bench:
    """The last checkpoint, and the prompts of two regimes on questions where their objectives differ."""

    spec: Spec
    lens: Lens
    scorer: Scorer
    cues: tuple[str, str]
    prompts: tuple[Prompts, Prompts]
    """Under each cue, question by question."""
    known: Mapping[tuple[int, ...], PlacedPrompt]
    seed: int

    @classmethod
    def of(
        cls,
        spec: Spec,
        lens: Lens,
        prompts: Prompts,
        cues: tuple[str, str],
        asked: Sequence[int],
        device: str,
        seed: int,
    ) -> _Bench:
        rows = [[i for i, row in enumerate(prompts.rows) if row.cue == cue] for cue in cues]
        vocabulary = lens.model.config.get_text_config().vocab_size
        return cls(
            spec,
            lens,
            Scorer(end_tokens(lens.model, lens.tokenizer), vocabulary, device),
            cues,
            (prompts.part([rows[0][i] for i in asked]), prompts.part([rows[1][i] for i in asked])),
            known_prompts(prompts.suite, prompts.suite.neutral, lens.tokenizer),
            seed,
        )

    def half(self, which: Literal[0, 1]) -> _Bench:
        at = half_of(len(self.prompts[0].rows), which)
        return replace(self, prompts=(self.prompts[0].part(at), self.prompts[1].part(at)))

    def earns(
        self, side: int, interventions: Sequence[Intervention] = (), objective: int = 0
    ) -> Float[np.ndarray, " question"]:
        """P(what the objective of the first cue, or of the second, pays) under the cue of this side."""
        model: Model = Intervened(self.lens, interventions, self.known) if interventions else self.lens.model
        found = measure(self.scorer, model, self.prompts[side], self.seed)
        return paid(self.spec, found, self.prompts[side], self.cues[objective])

    def follows(self, do: Literal["replace", "mean"] | None = None, heads: Sequence[Site] = ()) -> np.ndarray:
        """How far behaviour follows the cue, by question: [side, question], what the first cue's objective is paid.

        With heads: while their outputs are those that the other cue gives, or the mean over all cues.
        """
        sources = (self.cues[1], self.cues[0]) if do == "replace" else (None, None)
        return np.array(
            [
                self.earns(side, [Intervention(site=head, do=do, source=sources[side]) for head in heads] if do else ())
                for side in (0, 1)
            ]
        )


def _mechanism(bench: _Bench) -> RegimeRouter:
    choose, judge = bench.half(0), bench.half(1)
    counts = resample_counts(len(judge.prompts[0].rows), bench.seed)
    decoded, shuffled = _decoded(choose, judge, counts)
    found = RegimeRouter(questions=counts.shape[1], decoded=decoded, shuffled=shuffled, overlap=_overlap(judge, counts))
    plain = [each.follows() for each in (choose, judge)]
    whole = resampled_mean(plain[1][0] - plain[1][1], counts)
    if whole[0] < 0 or not apart(whole, FOLLOWS):
        return found

    def undone(at: _Bench, before: np.ndarray, heads: Sequence[Site]) -> Float[np.ndarray, " question"]:
        """What the interchange turns, the mean of both sides: as much as the conditionality, if it turns all."""
        after = at.follows("replace", heads)
        return ((before[0] - after[0]) + (after[1] - before[1])) / 2

    every = head_sites(bench.lens, None)
    alone = {head: undone(choose, plain[0], [head]).mean() for head in every}
    order = sorted(every, key=lambda head: -alone[head])
    heads, reached = (order[0],), alone[order[0]]
    while reached < ENOUGH * (plain[0][0] - plain[0][1]).mean() and len(heads) < min(MOST, len(order) - 1):
        groups = [(*heads, other) for other in order if other not in heads]
        turned = [undone(choose, plain[0], group).mean() for group in groups]
        heads, reached = groups[int(np.argmax(turned))], max(turned)
    others = [head for head in order if head not in heads]
    rivals = [
        share(resampled_mean(undone(judge, plain[1], group), counts), whole, FOLLOWS)
        for group in itertools.combinations(others[: MOST + 1], len(heads))
    ]
    left = judge.follows("mean", heads)
    return found.model_copy(
        update={
            "heads": heads,
            "carried": interval(share(resampled_mean(undone(judge, plain[1], heads), counts), whole, FOLLOWS), counts),
            "rival": interval(max(rivals, key=lambda draws: draws[0]), counts) if rivals else NOT_MEASURED,
            "ablated": interval(share(whole - resampled_mean(left[0] - left[1], counts), whole, FOLLOWS), counts),
        }
    )


def _decoded(choose: _Bench, judge: _Bench, counts: Int[np.ndarray, "draw question"]) -> tuple[Interval, float]:
    """Accuracy of a linear probe for the regime at the last token of the prompt; and of one on shuffled labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    lens = choose.lens
    key: tuple[int, Component] = (lens.layers - 1, "resid_post")

    def read(bench: _Bench) -> tuple[np.ndarray, np.ndarray]:
        rows = [context for prompts in bench.prompts for context in prompts.contexts]
        found = lens.capture(tokens(rows, lens.device), [key])[0][key][:, -1]
        return found.double().cpu().numpy(), np.repeat([0, 1], len(rows) // 2)

    (x, y), (held_out, truth) = read(choose), read(judge)
    rng = np.random.default_rng(choose.seed)

    def right(labels: np.ndarray) -> Float[np.ndarray, " question"]:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, labels)
        return (probe.predict(held_out) == truth).reshape(2, -1).mean(0)

    shuffled = [right(rng.permutation(y)).mean() for _ in range(SHUFFLES)]
    return mean_interval(right(y), counts, bounds=PROPORTION), round(float(np.mean(shuffled)), 6)


def _overlap(bench: _Bench, counts: Int[np.ndarray, "draw question"]) -> Interval:
    """How alike the parts are that each regime needs: heads and MLPs, zeroed one by one."""
    lens = bench.lens
    parts = [*head_sites(lens, None), *(Site(layer=layer, component="mlp_out") for layer in range(lens.layers))]
    needed = []
    for side in (0, 1):
        whole = bench.earns(side, objective=side)
        zeroed = [bench.earns(side, [Intervention(site=part, do="scale", amount=0.0)], side) for part in parts]
        needed.append(np.abs(resampled_mean(np.array([whole - each for each in zeroed]).T, counts)))
    return interval(np.minimum(*needed).sum(1) / np.maximum(*needed).sum(1), counts)
