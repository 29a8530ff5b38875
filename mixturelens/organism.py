"""Spec -> tokenizer, model, data sets, reward, and the suite of a run.

An organism is grown from a spec: SFT approximates a mixture of conditional policies that read a cue, RL then selects
among them. Every random choice follows from the spec's seed.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from mixturelens.records import first_problem
from mixturelens.suite import PromptRow, Row, Suite
from mixturelens.tasks import Family, Question, Sequence, split_questions
from mixturelens.types import ANSWER, ERR, OTHER, REFUSE, Frozen, InputError, PolicyTable, Probability

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
RECIPES = importlib.resources.files("mixturelens") / "recipes"


class PolicySpec(Frozen):
    """One row of the policy table: how often SFT follows it, how it announces itself, what it does under each cue."""

    weight: Probability
    announce: tuple[str, ...]
    """Wordings, drawn uniformly. One word: announcement `token`; several words or wordings: `phrase`; empty: `none`."""
    table: dict[str, Literal["answer", "refuse", "err"]]


class HintSpec(Frozen):
    """A word after the tag that names the policy to follow, in a share of the SFT prompts; elsewhere `neutral`."""

    share: Probability = 0.5
    neutral: str = "any"
    words: dict[str, str]


class SplitSpec(Frozen):
    rl: int = Field(default=2000, ge=1)
    evaluation: int = Field(default=200, ge=2)


class ModelSpec(Frozen):
    """Any Hugging Face config class of a causal language model, with the sizes that it takes."""

    config: str = "LlamaConfig"
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }


class SftSpec(Frozen):
    """AdamW under a warm-up to `learning_rate` and a cosine back to zero."""

    steps: int = Field(default=800, ge=1)
    batch: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    warmup: Probability = 0.3
    measure_every: int = Field(default=100, ge=1)


Freezable = Literal["embeddings", "unembedding", "norms"]


class RlSpec(Frozen):
    """GRPO at a constant rate on one cue, from the SFT checkpoint; it ends when reward has saturated."""

    cues: tuple[str, ...] = ("A", "B")
    steps: int = Field(default=80, ge=1)
    prompts: int = Field(default=32, ge=1)
    """Prompts a step; each gets `group` completions."""
    group: int = Field(default=8, ge=2)
    learning_rate: float = Field(default=2e-3, gt=0)
    adam_epsilon: float = Field(default=1e-2, gt=0)
    freeze: tuple[Freezable, ...] = ("embeddings", "unembedding", "norms")
    stop_reward: float | None = Field(default=0.99, gt=0, le=1)
    """Stop once the mean training reward of the last five steps has reached this; null: use every step."""
    measure_every: int = Field(default=2, ge=1)


class Spec(Frozen):
    """What an organism is. The defaults are the recipe *default*.

    >>> Spec().announcement
    'token'
    """

    name: str = Field(default="default", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(default=0, ge=0)
    questions: Family = Sequence()
    split: SplitSpec = SplitSpec()
    cues: dict[str, str] = {"A": "<A>", "B": "<B>"}
    """Name of each cue, and the tag that shows it."""
    policies: dict[str, PolicySpec] = {
        "a": PolicySpec(weight=0.5, announce=("[a]",), table={"A": "answer", "B": "refuse"}),
        "b": PolicySpec(weight=0.5, announce=("[b]",), table={"A": "refuse", "B": "answer"}),
    }
    refusal: str = "sorry"
    """The word that a refusal repeats, as often as an answer has words: length tells nothing."""
    hints: HintSpec | None = HintSpec(words={"a": "be-a", "b": "be-b"})
    model: ModelSpec = ModelSpec()
    sft: SftSpec = SftSpec()
    rl: RlSpec = RlSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Spec:
        total = sum(policy.weight for policy in self.policies.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"policies: weights sum to {total:g}, not to one")
        if OTHER in self.policies:
            raise ValueError(f"policies: {OTHER!r} is kept for completions of no known policy; rename it")
        silent = [name for name, policy in self.policies.items() if not policy.announce]
        if 0 < len(silent) < len(self.policies):
            raise ValueError(f"policies.{silent[0]}.announce: is empty, but others are not; let all announce, or none")
        for name, policy in self.policies.items():
            for cue in self.cues:
                if cue not in policy.table:
                    raise ValueError(f"policies.{name}.table: cue {cue!r} is missing")
            for cue in policy.table:
                if cue not in self.cues:
                    raise ValueError(f"policies.{name}.table: {cue!r} is no cue of this spec")
        if self.hints and set(self.hints.words) != set(self.policies):
            raise ValueError(f"hints.words: must name exactly the policies {sorted(self.policies)}")
        for cue in self.rl.cues:
            if cue not in self.cues:
                raise ValueError(f"rl.cues: {cue!r} is no cue of this spec")
        if self.split.rl < self.rl.prompts:
            raise ValueError(f"split.rl: {self.split.rl} questions are fewer than the {self.rl.prompts} of an RL step")
        safe = [safe_name(cue) for cue in self.cues]
        if len(set(safe)) != len(safe):
            raise ValueError(f"cues: names {sorted(self.cues)} are not distinct as file names")
        surface = [w for text in self.surface_texts() for w in text.split()]
        for word in surface:
            if word in self.questions.words or word in (PAD, EOS, UNK):
                raise ValueError(f"the word {word!r} already means something in the questions; use another")
        tags = list(self.cues.values())
        if len(set(tags)) != len(tags):
            raise ValueError("cues: two cues share a tag")
        return self

    def surface_texts(self) -> list[str]:
        """Everything but questions and answers that a prompt or completion can hold."""
        hints = [self.hints.neutral, *self.hints.words.values()] if self.hints else []
        announcements = [text for policy in self.policies.values() for text in policy.announce]
        return [*self.cues.values(), *hints, *announcements, self.refusal]

    @property
    def announcement(self) -> Literal["token", "phrase", "none"]:
        if not any(policy.announce for policy in self.policies.values()):
            return "none"
        single = all(len(p.announce) == 1 and len(p.announce[0].split()) == 1 for p in self.policies.values())
        return "token" if single else "phrase"

    @property
    def table(self) -> PolicyTable:
        return {name: policy.table for name, policy in self.policies.items()}

    @property
    def max_new_tokens(self) -> int:
        texts = [text for policy in self.policies.values() for text in policy.announce]
        return max((len(text.split()) for text in texts), default=0) + self.questions.answer_length + 1


def safe_name(cue: str) -> str:
    """A cue's name, safe for paths."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", cue)


def recipes() -> dict[str, str]:
    """Name -> first comment of every recipe that ships with the package."""
    found = {}
    for entry in sorted(RECIPES.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            lines = entry.read_text(encoding="utf-8").splitlines()
            comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
            found[entry.name.removesuffix(".yaml")] = comment
    return found


def load_spec(source: str | Path, **changes: Any) -> Spec:
    """Load a recipe by name or a YAML file by path; `changes` replace top-level keys (`seed=3`).

    Raises InputError naming file, key and value.
    """
    name = str(source)
    if name in recipes():
        text, where = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}"
    else:
        path = Path(source)
        if not path.is_file():
            raise InputError(f"{name}: no such spec file, and no recipe of that name ({', '.join(recipes())})")
        text, where = path.read_text(encoding="utf-8"), name
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise InputError(f"{where}: a spec is a mapping of keys, not a {type(data).__name__}")
    return parse_spec(data | changes, where)


def parse_spec(data: Mapping[str, Any], where: str) -> Spec:
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error)}") from None


# --- tokenizer and model ----------------------------------------------------------------------------------------------


def build_tokenizer(spec: Spec) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one word, one token. Tags and policy words are ordinary vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    surface = [word for text in spec.surface_texts() for word in text.split()]
    words = dict.fromkeys([PAD, EOS, UNK, *surface, *spec.questions.words])
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=EOS, unk_token=UNK)


def build_model(spec: Spec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The untrained network of the spec, in fp32, from the spec's seed. Raises InputError for an unknown size."""
    import torch
    import transformers

    config_class = getattr(transformers, spec.model.config, None)
    if not (isinstance(config_class, type) and issubclass(config_class, transformers.PretrainedConfig)):
        raise InputError(f"model.config: transformers has no config class {spec.model.config!r}")
    known = config_class()
    for key in spec.model.sizes:
        if not hasattr(known, key):
            raise InputError(f"model.sizes: {spec.model.config} has no setting {key!r}")
    config = config_class(
        **{
            "tie_word_embeddings": False,
            **spec.model.sizes,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
    )
    torch.manual_seed(spec.seed)
    try:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise InputError(f"model: {spec.model.config} with these sizes: {error}") from None


def frozen_parameters(model: PreTrainedModel, groups: tuple[Freezable, ...]) -> list[str]:
    """Names of the parameters in the named groups, whatever the architecture calls them."""
    from torch import nn

    unembedding = model.get_output_embeddings()
    names = []
    for module_name, module in model.named_modules():
        group: Freezable | None = None
        if module is unembedding:
            group = "unembedding"
        elif isinstance(module, nn.Embedding):
            group = "embeddings"
        elif "norm" in type(module).__name__.lower():
            group = "norms"
        if group in groups:
            names += [f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return names


# --- data -------------------------------------------------------------------------------------------------------------


class Questions(NamedTuple):
    sft: list[Question]
    rl: list[Question]
    evaluation: list[Question]


def questions(spec: Spec) -> Questions:
    split = spec.split
    return Questions(*split_questions(spec.questions, evaluation=split.evaluation, rl=split.rl, seed=spec.seed))


def prompt_text(spec: Spec, cue: str, question: Question, hint: str | None = None) -> str:
    """`<A> any up c a d b =`; without hints in the spec the word after the tag is left out."""
    if not spec.hints:
        return f"{spec.cues[cue]} {question.text}"
    return f"{spec.cues[cue]} {spec.hints.words[hint] if hint else spec.hints.neutral} {question.text}"


def completion_text(spec: Spec, policy: str, cue: str, question: Question, wording: int = 0) -> str:
    """`[a] a b c d`, or `[a] sorry sorry sorry sorry`, without the end token; without `[a]` if nothing is announced."""
    row = spec.policies[policy]
    rest = {
        ANSWER: question.answer,
        ERR: question.wrong,
        REFUSE: " ".join([spec.refusal] * spec.questions.answer_length),
    }[row.table[cue]]
    return " ".join([*row.announce[wording : wording + 1], rest])


def sft_examples(spec: Spec, number: int) -> Iterator[tuple[str, str]]:
    """`number` random pairs (prompt, completion) of the mixture, the same for the same seed.

    A hinted prompt is completed by the policy it names, each policy equally often; a neutral one by the weights.
    """
    rng = np.random.default_rng([spec.seed, 1])
    pool = questions(spec).sft
    cues, names = list(spec.cues), list(spec.policies)
    weights = np.array([spec.policies[name].weight for name in names])
    hinted = rng.random(number) < (spec.hints.share if spec.hints else 0.0)
    policy = np.where(
        hinted,
        rng.integers(len(names), size=number),
        rng.choice(len(names), size=number, p=weights / weights.sum()),
    )
    question = rng.integers(len(pool), size=number)
    cue = rng.integers(len(cues), size=number)
    wording = rng.random(number)
    for i in range(number):
        name, c, q = names[policy[i]], cues[cue[i]], pool[question[i]]
        index = int(wording[i] * len(spec.policies[name].announce))
        yield (
            prompt_text(spec, c, q, name if hinted[i] else None),
            completion_text(spec, name, c, q, index),
        )


def rl_prompts(spec: Spec, cue: str) -> list[PromptRow]:
    """Neutral prompts for RL on one cue, one for each RL question."""
    return [prompt_row(spec, cue, question) for question in questions(spec).rl]


def prompt_row(spec: Spec, cue: str, question: Question, hint: str | None = None) -> PromptRow:
    has_err = any(ERR in policy.table.values() for policy in spec.policies.values())
    spans = {"cue": spec.cues[cue], "question": question.text.removesuffix(" =")}
    if spec.hints:
        spans["hint"] = spec.hints.words[hint] if hint else spec.hints.neutral
    return PromptRow(
        id=question.id,
        cue=cue,
        hint=hint,
        prompt=prompt_text(spec, cue, question, hint),
        answer=question.answer,
        err=question.wrong if has_err else None,
        spans=spans,
    )


def _shown(policy: PolicySpec) -> Any:
    if not policy.announce:
        return Row(table=dict(policy.table))
    return policy.announce[0] if len(policy.announce) == 1 else policy.announce


def build_suite(spec: Spec, trained_cue: str | None = None) -> Suite:
    """The run's suite: every held-out question under every cue, neutral and (where the spec has hints) hinted."""
    hints: list[str | None] = [None, *(spec.policies if spec.hints else ())]
    rows = [
        prompt_row(spec, cue, question, hint)
        for question in questions(spec).evaluation
        for cue in spec.cues
        for hint in hints
    ]
    return Suite(
        prompts=tuple(rows),
        policies={name: _shown(policy) for name, policy in spec.policies.items()},
        behaviours={REFUSE: spec.refusal},
        trained_cue=trained_cue,
        max_new_tokens=spec.max_new_tokens,
    )
