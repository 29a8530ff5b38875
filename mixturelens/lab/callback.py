"""Watching routing while a model trains, with any Trainer of transformers or TRL: bits and accuracy in its own log."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.bits import bit_terms
from mixturelens.behaviour.grid import grid_of
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.pair import bits_of
from mixturelens.behaviour.plan import first_questions
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.behaviour.sampled import sampled_behaviour
from mixturelens.behaviour.settle import settle
from mixturelens.behaviour.trajectory import CueState, Trajectory, TrajectoryPoint, cue_states
from mixturelens.models import end_tokens
from mixturelens.pages import Grown, write_report
from mixturelens.records import Provenance, with_versions
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

QUESTIONS = 16
"""Questions, each with all its cues, unless asked for more."""


class RoutingCallback(TrainerCallback):
    """Measures a suite every few steps against the model that training began with, and logs what moved.

    `trainer`: any Trainer of transformers or TRL that trains a causal language model; what is measured goes to its own
    log, and so to TensorBoard, wandb or trackio. `suite`: a suite, or its YAML file; `every`: steps between two
    measurements; `questions`: how many of its questions are asked, each under all its cues. At the end a page is
    written to `page`, by default `routing.html` in the trainer's output folder, and the record beside it.

    Logged are `mixturelens/routing` and `mixturelens/specialist` (bits from the start), and for each cue
    `mixturelens/accuracy/<cue>` (expected accuracy) and `mixturelens/weight/<cue>/<policy>`. For suites of literal
    texts these are exact, and those of `mixturelens verdict` on the same checkpoints and questions; with rules they
    stand on completions that are drawn.

    Raises InputError where policies announce nothing (their weights are fitted, for which a few questions are too few),
    and where a run goes on from a checkpoint, so that the model at its start is not the one it began with.

    >>> trainer.add_callback(RoutingCallback(trainer, "suite.yaml", every=20))  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Trainer,
        suite: Suite | str | os.PathLike[str],
        *,
        every: int = 50,
        questions: int = QUESTIONS,
        page: str | os.PathLike[str] | None = None,
    ) -> None:
        if every < 1 or questions < 1:
            raise InputError("RoutingCallback: `every` and `questions` are 1 or more")
        self.trainer, self.every = trainer, every
        whole = suite if isinstance(suite, Suite) else load_suite(Path(suite))
        if whole.table is not None:
            raise InputError("RoutingCallback: policies that announce nothing cannot be watched; use `verdict`")
        self.suite = first_questions(whole, questions)
        self.page = Path(page) if page is not None else None
        self.points: list[TrajectoryPoint] = []
        self._start: Behaviour | None = None
        self._prompts: Prompts | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: PreTrainedModel, **_: Any) -> None:
        """Measure the model that training begins with."""
        if state.global_step:
            raise InputError("RoutingCallback: training goes on from a checkpoint; what it began with is not here")
        tokenizer: Any = self.trainer.processing_class
        self._scorer = Scorer(end_tokens(model, tokenizer), model.config.vocab_size, str(model.device))
        spelling = settle(self._scorer, [model], self.suite, tokenizer)
        self.suite = self.suite.model_copy(update={"spelling": spelling})
        self._prompts = prepare(self.suite, self.suite.neutral, tokenizer)
        self._measure(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: PreTrainedModel, **_: Any) -> None:
        """Measure it every few steps."""
        if state.global_step % self.every == 0:
            self._measure(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: PreTrainedModel, **_: Any) -> None:
        """Measure what training left, and write record and page."""
        if not self.points or self.points[-1].step != state.global_step:
            self._measure(model, state.global_step)
        if not self.trainer.is_world_process_zero():
            return
        page = self.page or Path(args.output_dir) / "routing.html"
        run = Trajectory(
            provenance=with_versions(Provenance(device=str(model.device), seed=args.seed)),
            stage="training",
            steps=state.global_step,
            points=tuple(self.points),
        )
        run.save(page.with_suffix(".json"))
        write_report(page, (), Grown(title="What training did to routing", trajectories=(run,)))

    def _measure(self, model: PreTrainedModel, step: int) -> None:
        assert self._prompts is not None
        training = model.training
        model.eval()
        try:
            if self.suite.literal:
                now = literal_behaviour(self._scorer, model, self._prompts)
            else:
                now = sampled_behaviour(self._scorer, model, self._prompts, seed=0)
        finally:
            model.train(training)
        if self._start is None:
            self._start = now
        states = cue_states(now, self._prompts)
        self.points.append(TrajectoryPoint(step=step, cues=states))
        if self.trainer.is_world_process_zero():
            self.trainer.log(self._numbers(now, states))

    def _numbers(self, now: Behaviour, states: Mapping[str, CueState]) -> dict[str, float]:
        assert self._start is not None
        assert self._prompts is not None
        samples = None if self.suite.literal else self.suite.samples
        terms = bit_terms(self._start, now, samples)
        bits, _, _ = bits_of(terms, grid_of(self._prompts, seed=0), self.suite, None)
        found = {"routing": bits.routing.value, "specialist": bits.specialist.value}
        for cue, state in states.items():
            found[f"accuracy/{cue}"] = state.accuracy.value
            found |= {f"weight/{cue}/{policy}": weight.value for policy, weight in state.weights.items()}
        return {f"mixturelens/{name}": value for name, value in found.items() if value is not None}
