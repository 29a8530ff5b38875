"""One stage of training: where it works, what it measures, when it stops, how it goes on after a kill.

A stage trains in a working folder of its own. A trainer checkpoint counts only once `progress.json` lies in it, which
is written last; a stage's result counts only once its folder has its final name. What is half-written is ignored.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.prompts import prepare
from mixturelens.behaviour.trajectory import Trajectory, TrajectoryPoint, cue_states
from mixturelens.files import read_json
from mixturelens.lab.organism import (
    Lora,
    Pretrained,
    Spec,
    build_suite,
)
from mixturelens.lab.regimes import paid
from mixturelens.models import end_tokens, load_model, load_tokenizer, quiet_libraries
from mixturelens.models.source import Source, find_source, fingerprint
from mixturelens.records import Provenance, new_folder, with_versions, write_text
from mixturelens.types import loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

MEASURED_QUESTIONS = 64
"""Held-out questions for the measurements along training; the verdict uses all of them."""
FEW_QUESTIONS = 16
"""The same for a pretrained model, whose measurement takes as long as some steps."""
SATURATION_WINDOW = 5
ONE_THREAD_BELOW = 2_000_000
"""Parameters under which training on a CPU uses one thread: more gain little, lose much when the cores are shared, and
would make the weights depend on their number."""
SAVES = 8
"""Trainer checkpoints a stage: what a kill can cost is an eighth of it."""

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as progress(stage, step, steps, numbers)."""


def quick_bfloat16(device: str) -> bool:
    """Whether matrices are multiplied in bfloat16 by instructions for it; a CPU without takes fifty times as long."""
    import torch

    if device == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not device.startswith("cuda") or torch.cuda.is_bf16_supported(including_emulation=False)


def alone() -> None:
    """What a process says first that works beside others: small networks gain nothing by a second thread, and lose much
    where cores are shared."""
    import torch

    quiet_libraries()
    torch.set_num_threads(1)


def lora_of(spec: Spec) -> Lora | None:
    """The adapter that is trained, where it is not the whole network."""
    return spec.model.lora if isinstance(spec.model, Pretrained) else None


def trainable(spec: Spec, source: Source, device: str) -> PreTrainedModel:
    """A checkpoint, ready to be trained: whole, or with an adapter on it, the checkpoint's own or a new one."""
    model, lora = spec.model, lora_of(spec)
    if lora is None or not isinstance(model, Pretrained):
        return load_model(source, device)
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    pretrained = find_source(model.pretrained)
    if source != pretrained:  # a stage's own adapter; one that is pretrained is merged below, and a new one begun
        base = load_model(pretrained, device)
        return PeftModel.from_pretrained(base, str(source.folder), is_trainable=True)  # pyright: ignore
    torch.manual_seed(spec.seed)
    targets = "all-linear" if lora.targets == "all" else list(lora.targets)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(load_model(source, device), config)
    named = Path(model.pretrained)
    config.base_model_name_or_path = str(named.resolve()) if named.is_dir() else model.pretrained
    return adapted  # pyright: ignore


def _kept(spec: Spec, model: PreTrainedModel) -> dict[str, Any]:
    """What of a model is saved: an adapter takes half the room in float16, whose rounding is far below a step of RL."""
    if lora_of(spec) is None:
        return {}
    return {"state_dict": {name: values.half() for name, values in model.state_dict().items() if "lora_" in name}}


@dataclass(frozen=True)
class StagePlan:
    """How long a stage trains, and where."""

    steps: int
    measure_every: int
    """Steps between two measurements."""
    device: str = "cpu"
    stop_reward: float | None = None
    """Mean reward at which it stops before its last step; None: it takes all."""


class Stage:
    """One stage of training: where it works, what it measures, when it stops, how it resumes."""

    def __init__(self, name: str, spec: Spec, run: Path, plan: StagePlan, progress: Progress | None = None) -> None:
        self.name, self.spec, self.run, self.steps = name, spec, run, plan.steps
        # a schedule that comes back to a cue draws other prompts and samples than before
        self.seed = spec.seed + 1000 * (1 + list(spec.phases).index(name) if name in spec.phases else 0)
        self.measure_every, self.device, self.stop_reward = plan.measure_every, plan.device, plan.stop_reward
        self.progress = progress or (lambda *_: None)
        self.work = run / "training" / name
        self.points: list[TrajectoryPoint] = []
        self.reward: list[float] = []
        self.no_signal: list[float] = []

    def arguments(self) -> dict[str, Any]:
        """Arguments of TRL's trainers that SFT and RL share."""
        return {
            "output_dir": str(self.work),
            "max_steps": self.steps,
            "seed": self.seed,
            "weight_decay": 0.0,
            "bf16": isinstance(self.spec.model, Pretrained) and quick_bfloat16(self.device),
            "gradient_checkpointing": False,
            "use_cpu": self.device == "cpu",
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": math.ceil(self.steps / SAVES),
            "save_total_limit": 2,
            "dataloader_pin_memory": False,
        }

    @property
    def lean(self) -> bool:
        """Whether what TRL leaves to a GPU's kernels is done here: without one it takes twice as long, or more."""
        return self.device == "cpu"

    @property
    def result(self) -> Path:
        """The checkpoint folder that the stage writes."""
        return self.run / "checkpoints" / self.name

    def source(self, name: str) -> Source:
        """The checkpoint of a stage; `base` is the untrained one, or the pretrained one of the spec."""
        if name == "base" and isinstance(self.spec.model, Pretrained):
            return find_source(self.spec.model.pretrained)
        return find_source(self.run / "checkpoints" / name)

    @property
    def record(self) -> Path:
        """The file of its trajectory."""
        return self.run / "trajectory" / f"{self.name}.json"

    def train(self, start: str, make: Callable[[PreTrainedModel, PreTrainedTokenizerBase], Trainer]) -> Trajectory:
        """Run what is left of the stage and return its trajectory; nothing is left if its result is there."""
        if self.result.exists() and self.record.exists():
            shutil.rmtree(self.work, ignore_errors=True)  # of a start that was killed when it had written both
            return Trajectory.load(self.record)
        quiet_libraries()
        import torch

        begin = self.source(start)
        tokenizer = load_tokenizer(begin)
        model = trainable(self.spec, begin, self.device)
        self._watch(model, tokenizer)
        resume = self._last_complete()
        if resume is not None:
            self._restore(resume)
        # of a checkpoint that is the last, the trainer would take one more step
        if resume is not None and (self.saturated() or _step(resume) >= self.steps):
            model = trainable(self.spec, find_source(resume), self.device)
        else:
            torch.manual_seed(self.seed)
            threads = torch.get_num_threads()
            if self.device == "cpu" and model.num_parameters() < ONE_THREAD_BELOW:
                torch.set_num_threads(1)
            try:
                trainer = make(model, tokenizer)
                attach(self, trainer)
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            finally:
                torch.set_num_threads(threads)
        steps = len(self.reward) or self.steps
        if not self.points or self.points[-1].step != steps:
            self.measure(model, steps)
        if lora_of(self.spec) is None:
            for parameter in model.parameters():
                parameter.requires_grad = True
        with new_folder(self.result) as folder:
            model.save_pretrained(folder, **_kept(self.spec, model))
            tokenizer.save_pretrained(folder)
        trajectory = Trajectory(
            provenance=with_versions(
                Provenance(
                    before=fingerprint(begin),
                    after=fingerprint(self.result),
                    seed=self.seed,
                    device=self.device,
                )
            ),
            stage=self.name,
            steps=steps,
            points=tuple(self.points),
            reward=tuple(self.reward),
            no_signal=tuple(self.no_signal),
        )
        trajectory.save(self.record)
        shutil.rmtree(self.work, ignore_errors=True)
        return trajectory

    def _watch(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        suite = build_suite(self.spec)
        most = FEW_QUESTIONS if isinstance(self.spec.model, Pretrained) else MEASURED_QUESTIONS
        ids = list(dict.fromkeys(row.id for row in suite.neutral))[:most]
        self.prompts = prepare(suite, [row for row in suite.neutral if row.id in ids], tokenizer)
        self.scorer = Scorer(end_tokens(model, tokenizer), model.config.vocab_size, self.device)

    def measure(self, model: PreTrainedModel, step: int) -> None:
        """Measure every cue on the held-out questions, exactly, and append it as the trajectory's next point."""
        training = model.training
        model.eval()
        found = literal_behaviour(self.scorer, model, self.prompts)
        objectives = self.prompts.suite.cues if self.spec.objectives else ()
        earned = {cue: paid(self.spec, found, self.prompts, cue) for cue in objectives}
        states = cue_states(found, self.prompts, earned)
        model.train(training)
        self.points.append(TrajectoryPoint(step=step, cues=states))

    def saturated(self) -> bool:
        """Whether the mean reward of the last SATURATION_WINDOW steps has reached the one at which the stage stops."""
        recent = self.reward[-SATURATION_WINDOW:]
        full = len(recent) == SATURATION_WINDOW
        return self.stop_reward is not None and full and sum(recent) / len(recent) >= self.stop_reward

    def numbers(self) -> dict[str, float]:
        """The last reward, and every cue's accuracy when it was last measured: what progress shows."""
        last = self.points[-1].cues if self.points else {}
        shown = {cue: value for cue, state in last.items() if (value := state.accuracy.value) is not None}
        return {**({"reward": self.reward[-1]} if self.reward else {}), **shown}

    def save_progress(self, checkpoint: Path) -> None:
        """Write what was measured so far beside a trainer's checkpoint, so that a resumed stage goes on from it."""
        state = {
            "points": [point.model_dump(mode="json") for point in self.points],
            "reward": self.reward,
            "no_signal": self.no_signal,
        }
        write_text(checkpoint / "progress.json", json.dumps(state))

    def _restore(self, checkpoint: Path) -> None:
        file = checkpoint / "progress.json"
        state = read_json(file, "is gone", foreign=True)
        with loading(file, "not the progress of a stage; delete its folder to begin the stage anew"):
            self.points = [TrajectoryPoint.model_validate(point) for point in state["points"]]
            self.reward, self.no_signal = list(state["reward"]), list(state["no_signal"])

    def _last_complete(self) -> Path | None:
        """The latest trainer checkpoint that was written to its end; those that were not are removed."""
        complete = []
        for folder in self.work.glob("checkpoint-*"):
            if (folder / "progress.json").is_file():
                complete.append(folder)
            else:
                shutil.rmtree(folder)
        return max(complete, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def attach(stage: Stage, trainer: Trainer) -> None:
    """Let the stage measure, stop and mark checkpoints, in place of the trainer's own printing."""
    from transformers import PrinterCallback, TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, *, model, **_):
            if state.global_step == 0:
                stage.measure(model, 0)

        def on_step_end(self, args, state, control, *, model, **_):
            if state.global_step % stage.measure_every == 0:
                stage.measure(model, state.global_step)
            stage.progress(stage.name, state.global_step, stage.steps, stage.numbers())

        def on_log(self, args, state, control, logs=None, **_):
            if logs and "reward" in logs:
                stage.reward.append(float(logs["reward"]))
                stage.no_signal.append(float(logs["frac_reward_zero_std"]))
                # never back to False: the trainer itself sets it at the last step
                control.should_training_stop = control.should_training_stop or stage.saturated()

        def on_save(self, args, state, control, **_):
            stage.save_progress(stage.work / f"checkpoint-{state.global_step}")

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch())
