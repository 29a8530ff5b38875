"""SFT and GRPO with TRL (the only importer of trl), measured along the way, resumable after a kill at any moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixturelens.behaviour.trajectory import Trajectory
from mixturelens.lab.organism import Phase, Spec, build_suite, frozen_parameters, rl_prompts, sft_examples
from mixturelens.lab.regimes import paid_behaviours
from mixturelens.lab.stage import Progress, Stage, StagePlan, lora_of
from mixturelens.models import end_tokens
from mixturelens.models.beginnings import keeps
from mixturelens.spelling import encode_prompts, prompt_text
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import ANSWER, OTHER

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


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
    plan = StagePlan(steps, (phase and phase.measure_every) or sft.measure_every, device)
    stage = Stage(name, spec, run, plan, progress)

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
    steps = phase.steps or rl.steps
    plan = StagePlan(steps, phase.measure_every or rl.measure_every, device, phase.stop_reward)
    stage = Stage(name, spec, run, plan, progress)
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
        if lora_of(spec) is None:
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
