"""What an organism is: cues, policies, hints, sizes, and the stages of its training. Recipes are specs with a name."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from mixturelens.files import read_yaml, yaml_of
from mixturelens.lab.organism.cues import QUESTION, Cue, System, Tasks, Years
from mixturelens.lab.tasks import Family, Sequence, Words
from mixturelens.records import first_problem
from mixturelens.suite import Chat
from mixturelens.types import OTHER, Frozen, InputError, PolicyTable, Probability

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
RECIPES = importlib.resources.files("mixturelens.lab") / "recipes"
DIGITS = tuple("0123456789")

PROMPTS = 200_000
"""Prompts of a run's suite, at most."""
EXAMPLES = 20_000_000
"""Examples of a stage of training, at most."""

Does = Literal["answer", "refuse", "err"]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Few = Annotated[int, Field(ge=1, le=10_000)]
Rate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
Texts = str | Annotated[tuple[str, ...], Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=100)]
"""Of a cue, a policy or a phase, which folders and files are called after."""


class PolicySpec(Frozen):
    """One row of the policy table: how often SFT follows it, how it announces itself, what it does under each cue."""

    weight: Probability
    announce: tuple[str, ...]
    """Wordings, drawn uniformly. One word: announcement `token`; several words or wordings: `phrase`; empty: `none`."""
    table: dict[str, Does]


class HintSpec(Frozen):
    """Words before the question that name the policy to follow, in a share of the SFT prompts; elsewhere `neutral`."""

    share: Probability = 0.5
    follow: Probability = 1.0
    """How often a hint is followed; else the policy is drawn by the weights, as if there were none."""
    neutral: Texts = "any"
    """One text or several, of which SFT draws; evaluation shows the first."""
    words: dict[str, Texts]

    @property
    def neutrals(self) -> tuple[str, ...]:
        """The texts that stand where a hint would and name no policy."""
        return (self.neutral,) if isinstance(self.neutral, str) else self.neutral

    def wordings(self, policy: str) -> tuple[str, ...]:
        """The texts that name this policy; evaluation shows the first."""
        found = self.words[policy]
        return (found,) if isinstance(found, str) else found


class SplitSpec(Frozen):
    """How many questions are for RL, and how many are held out; SFT has others."""

    rl: int = Field(default=2000, ge=1, le=100_000)
    evaluation: int = Field(default=200, ge=2, le=10_000)


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


class Lora(Frozen):
    """A low-rank adapter (Hu et al. 2021, arXiv 2106.09685) on some of the linear layers."""

    r: Few = 8
    alpha: Count = 16
    targets: Literal["all"] | tuple[str, ...] = "all"
    """Names of the layers, as `q_proj`; `all`: every linear layer but the unembedding."""


class Pretrained(Frozen):
    """Weights that are there: a folder or a hub id. An adapter is trained on them, or (`lora: null`) all of them."""

    pretrained: str = Field(min_length=1)
    lora: Lora | None = Lora()
    max_new_tokens: Few = 16


def _kind_of_model(value: Any) -> str:
    given = isinstance(value, Pretrained) or (isinstance(value, Mapping) and "pretrained" in value)
    return "|pretrained" if given else "|network"


Model = Annotated[
    Annotated[ModelSpec, Tag("|network")] | Annotated[Pretrained, Tag("|pretrained")], Discriminator(_kind_of_model)
]


class SftSpec(Frozen):
    """AdamW under a warm-up to `learning_rate` and a cosine back to zero."""

    steps: Count = 800
    batch: Few = 256
    learning_rate: Rate = 3e-3
    warmup: Probability = 0.3
    measure_every: Count = 100


Freezable = Literal["embeddings", "unembedding", "norms"]


class RlSpec(Frozen):
    """GRPO at a constant rate on one cue, from the SFT checkpoint; it ends when reward has saturated."""

    cues: tuple[str, ...] = ("A", "B")
    steps: Count = 80
    prompts: Few = 32
    """Prompts a step; each gets `group` completions."""
    group: int = Field(default=8, ge=2, le=10_000)
    learning_rate: Rate = 2e-3
    adam_epsilon: Rate = 1e-2
    freeze: tuple[Freezable, ...] = ("embeddings", "unembedding", "norms")
    stop_reward: float | None = Field(default=0.99, gt=0, le=1)
    """Stop once the mean training reward of the last five steps has reached this; null: use every step."""
    measure_every: Count = 2


class Phase(Frozen):
    """A further stage of training. What it does not say is as in `rl` or `sft`."""

    train: Literal["rl", "sft"] = "rl"
    after: str | None = None
    """Stage that it starts from: `sft`, `base`, `rl-A`, or a phase. Null: the phase before; for the first, `sft`."""
    cues: tuple[str, ...] = Field(min_length=1)
    """Several: their prompts mixed."""
    hint: str | None = None
    """RL: a text of `hints` that every prompt shows, instead of the neutral one."""
    policy: str | None = None
    """RL: reward only completions of this policy."""
    weights: dict[str, Probability] | None = None
    """SFT: policies by these weights."""
    steps: Count | None = None
    learning_rate: Rate | None = None
    stop_reward: float | None = Field(default=None, gt=0, le=1)
    """RL: as in `rl`, but null uses every step: phases of one schedule are of equal length."""
    measure_every: Count | None = None


class Spec(Frozen):
    """What an organism is. The defaults are the recipe *default*.

    >>> Spec().announcement
    'token'
    """

    name: str = Field(default="default", pattern=r"^[A-Za-z0-9._-]+$", max_length=100)
    seed: int = Field(default=0, ge=0, lt=2**31)
    questions: Family = Sequence()
    split: SplitSpec = SplitSpec()
    cues: dict[Name, Cue] = {"A": "<A>", "B": "<B>"}
    """Name of each cue, and what shows it."""
    tells: Probability = 1.0
    """How distinguishable cues are: the share of questions that show their tag; the others show `unclear`."""
    unclear: str = "<?>"
    policies: dict[Name, PolicySpec] = {
        "a": PolicySpec(weight=0.5, announce=("[a]",), table={"A": "answer", "B": "refuse"}),
        "b": PolicySpec(weight=0.5, announce=("[b]",), table={"A": "refuse", "B": "answer"}),
    }
    refusal: str = "sorry"
    """The word that a refusal repeats, as often as an answer has words: length tells nothing."""
    objectives: dict[str, Does] = {}
    """What RL pays under a cue, where that is not the answer."""
    agree: tuple[str, ...] = ()
    """Shared structure: operations on which every policy answers and every objective pays it."""
    hints: HintSpec | None = HintSpec(words={"a": "be-a", "b": "be-b"})
    model: Model = ModelSpec()
    chat: Chat | None = None
    """Of a pretrained model: prompts go through its chat template."""
    sft: SftSpec = SftSpec()
    rl: RlSpec = RlSpec()
    phases: dict[Name, Phase] = {}
    """Name -> stage of training after SFT, in this order, beside those of `rl.cues`."""

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
        for where, cues in (("rl.cues", self.rl.cues), ("objectives", self.objectives)):
            for cue in cues:
                if cue not in self.cues:
                    raise ValueError(f"{where}: {cue!r} is no cue of this spec")
        if self.split.rl < self.rl.prompts:
            raise ValueError(f"split.rl: {self.split.rl} questions are fewer than the {self.rl.prompts} of an RL step")
        safe = [safe_name(cue) for cue in self.cues]
        if len(set(safe)) != len(safe):
            raise ValueError(f"cues: names {sorted(self.cues)} are not distinct as file names")
        self._check_sizes()
        self._check_cues()
        self._check_phases()
        if isinstance(self.model, ModelSpec):
            self._check_vocabulary()
        return self

    def _check_sizes(self) -> None:
        """Numbers that are each right alone, and together more than any machine has time for."""
        asked = self.split.evaluation * len(self.cues) * (1 + len(self.policies) if self.hints else 1)
        if asked > PROMPTS:
            raise ValueError(f"split.evaluation: makes {asked} prompts, and {PROMPTS} are the most; ask for fewer")
        for name, stage, size in (("sft", self.sft, self.sft.batch), ("rl", self.rl, self.rl.prompts * self.rl.group)):
            if stage.steps * size > EXAMPLES:
                raise ValueError(
                    f"{name}: {stage.steps} steps of {size} are more than {EXAMPLES} examples; take fewer, or smaller"
                )

    def _check_vocabulary(self) -> None:
        """A network that is grown from nothing knows the words of the spec, one token each, and no chat."""
        if isinstance(self.questions, Words):
            raise ValueError("questions: those in words need a model that can read: give model.pretrained")
        if self.chat is not None:
            raise ValueError("chat: needs model.pretrained")
        for name, cue in self.cues.items():
            if isinstance(cue, System) or (isinstance(cue, Years) and cue.says is not None):
                raise ValueError(
                    f"cues.{name}: {'system' if isinstance(cue, System) else 'says'} needs model.pretrained"
                )
        for word in (w for text in self.surface_texts() for w in text.split()):
            if word in self.questions.words or word in (PAD, EOS, UNK):
                raise ValueError(f"the word {word!r} already means something in the questions; use another")

    def _check_cues(self) -> None:
        shown = list(self.cues.values())
        if len({str(cue) for cue in shown}) != len(shown):
            raise ValueError("cues: two cues share a tag")
        if len({type(cue) for cue in shown}) != 1:
            raise ValueError("cues: give all by tags, all by operations or years, or all by system turns")
        if isinstance(shown[0], System) and self.chat is None:
            raise ValueError("cues: a system turn needs `chat: {}`")
        if self.tells < 1 and not isinstance(shown[0], str):
            raise ValueError("tells: below one only where cues are tags")
        used: dict[int | str, str] = {}
        for name, cue in self.cues.items():
            if isinstance(cue, str) and cue.count(QUESTION) > 1:
                raise ValueError(f"cues.{name}: {cue!r} holds the question more than once")
            if isinstance(cue, str) and not cue.replace(QUESTION, "").strip():
                raise ValueError(f"cues.{name}: {cue!r} has no words")
            whats: tuple[str | int, ...] = ()
            if isinstance(cue, Tasks):
                whats = cue.operations
            elif isinstance(cue, Years):
                whats = cue.seen + cue.unseen
            for what in whats:
                if isinstance(what, str) and what not in self.questions.operations:
                    raise ValueError(f"cues.{name}: {what!r} is no operation of `questions`")
                if what in used:
                    raise ValueError(f"cues.{name}: {what!r} is also of cue {used[what]!r}")
                used[what] = name
        for operation in self.agree:
            if operation not in self.questions.operations:
                raise ValueError(f"agree: {operation!r} is no operation of `questions`")

    def _check_phases(self) -> None:
        before = {"base", "sft", *(f"rl-{safe_name(cue)}" for cue in self.rl.cues)}
        hints = () if self.hints is None else (*self.hints.neutrals, *self.hinted)
        for name, phase in self.phases.items():
            where = f"phases.{name}"
            if name in before or safe_name(name) != name or name.startswith("."):
                raise ValueError(f"{where}: is no new name fit for a folder; use another")
            if phase.after is not None and phase.after not in before:
                raise ValueError(f"{where}.after: {phase.after!r} is no stage before it ({', '.join(sorted(before))})")
            for cue in phase.cues:
                if cue not in self.cues:
                    raise ValueError(f"{where}.cues: {cue!r} is no cue of this spec")
            if phase.hint is not None and phase.hint not in hints:
                raise ValueError(f"{where}.hint: {phase.hint!r} is no text of `hints`")
            for policy in (*([phase.policy] if phase.policy else []), *(phase.weights or {})):
                if policy not in self.policies:
                    raise ValueError(f"{where}: {policy!r} is no policy of this spec")
            if phase.weights is not None and abs(sum(phase.weights.values()) - 1) > 1e-6:
                raise ValueError(f"{where}.weights: sum to {sum(phase.weights.values()):g}, not to one")
            rl_only = phase.hint or phase.policy or phase.stop_reward
            if rl_only if phase.train == "sft" else phase.weights:
                raise ValueError(
                    f"{where}: {'hint, policy and stop_reward are' if rl_only else 'weights is'} of "
                    f"{'RL' if rl_only else 'SFT'} alone"
                )
            before.add(name)

    @property
    def hinted(self) -> tuple[str, ...]:
        """Every text that names a policy."""
        return () if self.hints is None else tuple(t for name in self.hints.words for t in self.hints.wordings(name))

    def surface_texts(self) -> list[str]:
        """Everything but questions and answers that a prompt or completion can hold."""
        shown = [cue.replace(QUESTION, " ") for cue in self.cues.values() if isinstance(cue, str)]
        if any(isinstance(cue, Years) for cue in self.cues.values()):
            shown += DIGITS
        unclear = [self.unclear] if self.tells < 1 else []
        hints = [*self.hints.neutrals, *self.hinted] if self.hints else []
        announcements = [text for policy in self.policies.values() for text in policy.announce]
        return [*shown, *unclear, *hints, *announcements, self.refusal]

    @property
    def announcement(self) -> Literal["token", "phrase", "none"]:
        """How completions show their policy: by one word, by longer or several wordings, or not at all."""
        if not any(policy.announce for policy in self.policies.values()):
            return "none"
        single = all(len(p.announce) == 1 and len(p.announce[0].split()) == 1 for p in self.policies.values())
        return "token" if single else "phrase"

    @property
    def table(self) -> PolicyTable:
        """The policy table: policy -> cue -> behaviour."""
        return {name: policy.table for name, policy in self.policies.items()}

    @property
    def max_new_tokens(self) -> int:
        """Tokens of the longest completion, with its end token; of a pretrained model, as many as its spec says."""
        if isinstance(self.model, Pretrained):
            return self.model.max_new_tokens
        texts = [text for policy in self.policies.values() for text in policy.announce]
        return max((len(text.split()) for text in texts), default=0) + self.questions.answer_length + 1

    @property
    def stages(self) -> dict[str, tuple[str, Phase]]:
        """Name of every stage after SFT -> (the one it starts from, what it does): `rl.cues` first, then `phases`."""
        found = {
            f"rl-{safe_name(cue)}": ("sft", Phase(cues=(cue,), stop_reward=self.rl.stop_reward)) for cue in self.rl.cues
        }
        last = "sft"
        for name, phase in self.phases.items():
            found[name] = (phase.after or last, phase)
            last = name
        return found


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
        where = f"recipe {name}"
        data = yaml_of((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), where)
    else:
        where = name
        data = read_yaml(Path(source), f"no such spec file, and no recipe of that name ({', '.join(recipes())})")
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise InputError(f"{where}: a spec is a mapping of keys, not a {type(data).__name__}")
    return parse_spec(data | changes, where)


def with_settings(spec: Spec, settings: Mapping[str, Any], where: str) -> Spec:
    """The spec with some of its keys set, by their path: `rl.adam_epsilon`.

    >>> with_settings(Spec(), {"rl.steps": 5}, "here").rl.steps
    5
    """
    data = spec.model_dump(mode="json")
    for key, value in settings.items():
        *path, last = key.split(".")
        inside = data
        for i, part in enumerate(path):
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                there = inside if isinstance(inside, str) else json.dumps(inside)
                raise InputError(f"set.{key}: {'.'.join(path[: i + 1])} is {there} there, and holds no keys")
        inside[last] = value
    return parse_spec(data, where)


def parse_spec(data: Mapping[str, Any], where: str) -> Spec:
    """The spec that these keys make. Raises InputError with the first problem, and `where` the keys come from."""
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error)}") from None
