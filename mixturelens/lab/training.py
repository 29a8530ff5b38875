"""SFT and GRPO with TRL (the only importer of trl), measured along the way, resumable after a kill at any moment.

A stage trains in a working folder of its own. A trainer checkpoint counts only once `progress.json` lies in it, which
is written last; a stage's result counts only once its folder has its final name. What is half-written is ignored.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.behaviour.trajectory import CueState, Trajectory, TrajectoryPoint
from mixturelens.lab.organism import (
    Lora,
    Phase,
    Pretrained,
    Spec,
    build_suite,
    frozen_parameters,
    rl_prompts,
    sft_examples,
)
from mixturelens.lab.regimes import paid, paid_behaviours
from mixturelens.models import end_tokens, load_model, load_tokenizer, quiet_libraries
from mixturelens.models.beginnings import keeps
from mixturelens.models.source import Source, find_source, fingerprint
from mixturelens.records import new_folder, provenance, write_text
from mixturelens.spelling import encode_prompts, prompt_text
from mixturelens.stats import PROPORTION, mean_interval, resample_counts
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import ANSWER, OTHER

if TYPE_CHECKING:
    from torch import Tensor
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


def train_stage(spec: Spec, name: str, run: Path, device: str = "cpu", progress: Progress | None = None) -> Trajectory:
    """Train `run/checkpoints/<name>`, a stage of the spec, from the checkpoint that it starts from."""
    import datasets

    datasets.disable_progress_bars()
    if name == "sft":
        return _train_sft(spec, name, "base", None, run, device, progress)
    start, phase = spec.stages[name]
    train = _train_sft if phase.train == "sft" else _train_rl
    return train(spec, name, start, phase, run, device, progress)


def _train_sft(
    spec: Spec, name: str, start: str, phase: Phase | None, run: Path, device: str, progress: Progress | None
) -> Trajectory:
    """SFT on the spec's mixture, or on that of a phase."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    sft = spec.sft
    steps = (phase and phase.steps) or sft.steps
    stage = Stage(name, spec, run, steps, (phase and phase.measure_every) or sft.measure_every, device, progress)

    class LabelledTrainer(SFTTrainer):
        """Without a GPU, TRL takes logits at every token of a prompt, too: a third of a step's time."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if not stage.lean or return_outputs:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return labelled_loss(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])

    def make(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Trainer:
        input_ids, labels = [], []
        for context, target in _tokens(spec, tokenizer, steps * sft.batch, phase):
            input_ids.append([*context, *target])
            labels.append([-100] * len(context) + [*target])
        config = SFTConfig(
            **stage.arguments(),
            per_device_train_batch_size=sft.batch,
            learning_rate=(phase and phase.learning_rate) or sft.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(sft.warmup * steps),
            dataset_kwargs={"skip_prepare_dataset": True},
            completion_only_loss=False,  # the labels say it already
            max_length=None,
            loss_type="nll",
        )
        return LabelledTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": input_ids, "labels": labels}),
            processing_class=tokenizer,
        )

    return stage.train(start, make)


def _tokens(
    spec: Spec, tokenizer: PreTrainedTokenizerBase, number: int, phase: Phase | None
) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and completions of SFT as token ids: the very ids that instruments will read."""
    suite = build_suite(spec)
    contexts: dict[str, list[int]] = {}
    targets: dict[str, list[int]] = {}
    end: Any = tokenizer.eos_token_id
    for row, completion in sft_examples(spec, number, phase):
        key = f"{row.cue} {row.text}"
        if key not in contexts:
            contexts[key] = encode_prompts(suite, [row], tokenizer)[0]
        if completion not in targets:
            ids: Any = tokenizer.encode(completion, add_special_tokens=False)
            targets[completion] = [*ids, end]
        yield contexts[key], targets[completion]


def _train_rl(
    spec: Spec, name: str, start: str, phase: Phase, run: Path, device: str, progress: Progress | None
) -> Trajectory:
    """GRPO on prompts of the phase's cues."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rl = spec.rl
    steps, measure_every = phase.steps or rl.steps, phase.measure_every or rl.measure_every
    stage = Stage(name, spec, run, steps, measure_every, device, progress, phase.stop_reward)
    rows, suite = rl_prompts(spec, *phase.cues, text=phase.hint), build_suite(spec)
    contexts: dict[str, list[int]] = {}
    lean = stage.lean

    class SameOrder(GRPOTrainer):
        """TRL's sampler shuffles once an epoch from a generator that a resumed run would start anew."""

        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            """The very ids that instruments will read: without a second BOS, through the suite's template."""
            return [contexts[text] for text in prompts], None, {}

        def _generate_single_turn(self, prompt_ids: list[list[int]], *given: Any, **more: Any) -> Any:
            """Prompts come `group` times in a row; each goes through the model once for all its completions."""
            if not lean:
                return super()._generate_single_turn(prompt_ids, *given, **more)
            model: Any = self.model
            model.eval()
            limits = [spec.max_new_tokens] * (len(prompt_ids) // rl.group)
            seed = int(torch.randint(2**31, ()))
            drawn = stage.scorer.sample(model, prompt_ids[:: rl.group], rl.group, limits, seed)
            model.train()
            return drawn.tokens, None

        def _get_per_token_logps_and_entropies(
            self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *given: Any, **more: Any
        ) -> Any:
            """The same numbers, but a prompt goes through the model once, not once for each of its completions."""
            known = {"batch_size", "compute_entropy", "num_images"}
            if not lean or given or any(more[name] for name in more.keys() - known):
                found = super()._get_per_token_logps_and_entropies
                return found(model, input_ids, attention_mask, logits_to_keep, *given, **more)
            with self.accelerator.autocast():
                logits = completion_logits(model, input_ids, attention_mask, logits_to_keep)
            logs = logits.float().log_softmax(-1)
            chosen = logs.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0]
            with torch.no_grad():
                entropy = -(logs.exp() * logs).sum(-1) if more.get("compute_entropy") else None
            return chosen, entropy, None

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            sampler: Any = super()._get_train_sampler(dataset)
            for _ in range(len(stage.reward) // (len(rows) // rl.prompts)):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
            return sampler

    def make(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Trainer:
        texts = [prompt_text(suite, row, tokenizer) for row in rows]
        contexts.update(zip(texts, encode_prompts(suite, rows, tokenizer), strict=True))
        if _lora(spec) is None:
            frozen = set(frozen_parameters(model, rl.freeze))
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad = parameter_name not in frozen
        config = GRPOConfig(
            **stage.arguments(),
            per_device_train_batch_size=rl.prompts * rl.group,
            num_generations=rl.group,
            max_completion_length=spec.max_new_tokens,
            learning_rate=phase.learning_rate or rl.learning_rate,
            adam_epsilon=rl.adam_epsilon,
            lr_scheduler_type="constant",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
        )
        wanted = paid_behaviours(spec, tuple(rows))
        return SameOrder(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts, "row": list(range(len(rows)))}),
            reward_funcs=make_reward(suite, rows, end_tokens(model, tokenizer), wanted, phase.policy),
            processing_class=tokenizer,
        )

    return stage.train(start, make)


def labelled_loss(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the tokens that have a label (not -100); logits are taken there alone."""
    import torch

    following = labels[:, 1:]
    at = (following != -100).any(0).nonzero()[:, 0]
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=at).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), following[:, at].flatten())


def completion_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, completion: int) -> Tensor:
    """Logits at the last `completion` tokens of every row, which the prompt stands before, padded on the left.

    Rows whose prompts are the same go on from one set of its keys and values, also on the way back: with groups of
    eight, short completions cost a fifth of what whole rows do. Shape (row, completion, vocabulary).
    """
    import torch

    prompts, seen = input_ids[:, :-completion], attention_mask[:, :-completion]
    if not keeps(model):
        whole = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=completion + 1)
        return whole.logits[:, :-1]
    _, of = torch.cat([prompts, seen], dim=1).unique(dim=0, return_inverse=True)
    first = torch.stack([(of == i).nonzero()[0, 0] for i in range(int(of.max()) + 1)])
    begun = model(input_ids=prompts[first], attention_mask=seen[first], use_cache=True, logits_to_keep=1)
    begun.past_key_values.batch_select_indices(of)
    behind = model(
        input_ids=input_ids[:, -completion:], attention_mask=attention_mask, past_key_values=begun.past_key_values
    )
    return torch.cat([begun.logits[of], behind.logits[:, :-1]], dim=1)


def make_reward(
    suite: Suite,
    rows: Sequence[PromptRow],
    ends: Sequence[int],
    wanted: Sequence[str] | None = None,
    policy: str | None = None,
) -> Callable[..., list[float | None]]:
    """The reward function that TRL calls: 1 for a completion that announces a known policy first, then answers, and
    then ends (with one of `ends`); else 0.

    `wanted[i]` is what is rewarded on row i instead of the answer; `policy` is the only one that is.
    """

    def reward(completions: list[str], completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float | None]:
        found: list[float | None] = []
        for text, ids, index in zip(completions, completion_ids, row, strict=True):
            label = suite.label(text, rows[index])
            ended = bool(ids) and ids[-1] in ends
            known = label.policy != OTHER and policy in (None, label.policy)
            if wanted is None or wanted[index] == ANSWER:
                done = suite.correct(label.rest, rows[index])
            else:
                done = label.behaviour == wanted[index]
            found.append(float(ended and known and done))
        return found

    return reward


def quick_bfloat16(device: str) -> bool:
    """Whether matrices are multiplied in bfloat16 by instructions for it; a CPU without takes fifty times as long."""
    import torch

    if device == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not device.startswith("cuda") or torch.cuda.is_bf16_supported(including_emulation=False)


def cue_states(spec: Spec, behaviour: Behaviour, prompts: Prompts) -> dict[str, CueState]:
    """The state of every cue: policy weights, forced accuracies and what RL would pay, as means over questions with
    intervals.
    """
    suite = prompts.suite
    states = {}
    earned = {cue: paid(spec, behaviour, prompts, cue) for cue in (suite.cues if spec.objectives else ())}
    for cue in suite.cues:
        at = [i for i, row in enumerate(prompts.rows) if row.cue == cue]
        counts = resample_counts(len(at), seed=0, draws=500)
        often = partial(mean_interval, counts=counts, bounds=PROPORTION)
        weights, forced = behaviour.weights[at], behaviour.forced_accuracy[at]
        states[cue] = CueState(
            weights={name: often(weights[:, m]) for m, name in enumerate((*suite.policies, OTHER))},
            forced={name: often(forced[:, m]) for m, name in enumerate(suite.policies)},
            accuracy=often(behaviour.correct[at].sum(-1)),
            paid={objective: often(share[at]) for objective, share in earned.items()},
        )
    return states


def _lora(spec: Spec) -> Lora | None:
    """The adapter that is trained, where it is not the whole network."""
    return spec.model.lora if isinstance(spec.model, Pretrained) else None


def _trainable(spec: Spec, source: Source, device: str) -> PreTrainedModel:
    """A checkpoint, ready to be trained: whole, or with an adapter on it, the checkpoint's own or a new one."""
    model, lora = spec.model, _lora(spec)
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
    if _lora(spec) is None:
        return {}
    return {"state_dict": {name: values.half() for name, values in model.state_dict().items() if "lora_" in name}}


class Stage:
    """One stage of training: where it works, what it measures, when it stops, how it resumes."""

    def __init__(
        self,
        name: str,
        spec: Spec,
        run: Path,
        steps: int,
        measure_every: int,
        device: str,
        progress: Progress | None,
        stop_reward: float | None = None,
    ) -> None:
        self.name, self.spec, self.run, self.steps = name, spec, run, steps
        # a schedule that comes back to a cue draws other prompts and samples than before
        self.seed = spec.seed + 1000 * (1 + list(spec.phases).index(name) if name in spec.phases else 0)
        self.measure_every, self.device, self.stop_reward = measure_every, device, stop_reward
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
        """Whether what TRL leaves to a GPU's kernels is done here: without one, a pretrained model takes too long."""
        return self.device == "cpu" and isinstance(self.spec.model, Pretrained)

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
            return Trajectory.load(self.record)
        quiet_libraries()
        import torch

        begin = self.source(start)
        tokenizer = load_tokenizer(begin)
        model = _trainable(self.spec, begin, self.device)
        self._watch(model, tokenizer)
        resume = self._last_complete()
        if resume is not None:
            self._restore(resume)
        if resume is not None and self.saturated():
            model = _trainable(self.spec, find_source(resume), self.device)
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
        if _lora(self.spec) is None:
            for parameter in model.parameters():
                parameter.requires_grad = True
        with new_folder(self.result) as folder:
            model.save_pretrained(folder, **_kept(self.spec, model))
            tokenizer.save_pretrained(folder)
        trajectory = Trajectory(
            provenance=provenance(
                before=fingerprint(begin),
                after=fingerprint(self.result),
                seed=self.seed,
                device=self.device,
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
        states = cue_states(self.spec, literal_behaviour(self.scorer, model, self.prompts), self.prompts)
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
        state = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        self.points = [TrajectoryPoint.model_validate(point) for point in state["points"]]
        self.reward, self.no_signal = state["reward"], state["no_signal"]

    def _last_complete(self) -> Path | None:
        """The latest trainer checkpoint that was written to its end; those that were not are removed."""
        complete = []
        for folder in self.work.glob("checkpoint-*"):
            if (folder / "progress.json").is_file():
                complete.append(folder)
            else:
                shutil.rmtree(folder)
        return max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)


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
