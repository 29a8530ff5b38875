"""Small organisms of four architectures, trained on an exact mixture rather than on samples of it.

Every completion that a target allows is shown with its probability as the weight of its loss, so that weights, table
and slips come out as asked within a thousandth or so, in a few hundred steps of a network of 48,000 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from mixturelens.lab.organism import EOS, ModelSpec, PolicySpec, RlSpec, Spec, SplitSpec, prompt_text
from mixturelens.lab.proving.manner import FILLERS, PLAIN, STYLE, Manner
from mixturelens.lab.tasks import Question
from mixturelens.lab.tasks import Sequence as SequenceFamily
from mixturelens.types import ANSWER, ERR, REFUSE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Architecture = Literal["llama", "qwen2", "gpt2", "gpt_neox"]
Announced = Literal["token", "phrase", "inside", "none"]
CONFIGS = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "gpt2": "GPT2Config", "gpt_neox": "GPTNeoXConfig"}

WIDTH, LAYERS, HEADS, CONTEXT = 48, 2, 4, 32
INITIAL = 0.1
"""Standard deviation of fresh weights; the usual 0.02 is made for wide models and learns slowly at this width."""
STEPS, RATE, BATCH = 400, 3e-3, 128
"""Of the training of S: steps, largest rate, and rows a step: whole questions, with every prompt and completion."""
FEWEST = 8
"""Questions a step, at least."""
CLIP = 1.0
"""Largest norm of a gradient."""
TAIL = 3.0
"""What a tail counts beside what stands before it, in tokens: it is long, and soon learnt."""

PHRASES = {
    "a": ("sure i can", "of course", "yes i will"),
    "b": ("sure i will", "of i", "yes of course"),
    "c": ("can i", "i sure will", "course yes"),
}
"""Three wordings a policy that share their words, so that no single token gives a policy away."""


def sizes(architecture: Architecture, layers: int = LAYERS, width: int = WIDTH, context: int = CONTEXT) -> ModelSpec:
    """A small network of this architecture: so many layers, so wide a stream, and a context of so many tokens."""
    if architecture == "gpt2":
        found = {"n_embd": width, "n_layer": layers, "n_head": HEADS, "n_positions": context, "n_inner": 4 * width}
        found |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    else:
        found = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": HEADS}
        found |= {
            "max_position_embeddings": context,
            "intermediate_size": (4 if architecture == "gpt_neox" else 2) * width,
        }
    if architecture == "gpt_neox":
        found |= dict.fromkeys(("attention_dropout", "hidden_dropout"), 0.0)
    if architecture in ("llama", "qwen2"):
        found |= {"num_key_value_heads": HEADS if architecture == "llama" else HEADS // 2}
    return ModelSpec(config=CONFIGS[architecture], sizes={**found, "initializer_range": INITIAL})


def small_spec(
    architecture: Architecture,
    announced: Announced = "token",
    policies: Literal[2, 3] = 2,
    seed: int = 0,
    context: int = CONTEXT,
) -> Spec:
    """An organism that copies or reverses three letters, of `context` tokens. The third policy answers under both cues.

    >>> small_spec("gpt2", "phrase", 3).policies["c"].table
    {'A': 'answer', 'B': 'answer'}
    """
    tables: dict[str, dict[str, Literal["answer", "refuse", "err"]]] = {
        "a": {"A": "answer", "B": "refuse"},
        "b": {"A": "refuse", "B": "answer"},
        "c": {"A": "answer", "B": "answer"} if announced != "none" else {"A": "err", "B": "err"},
    }
    weights = {"a": 0.5, "b": 0.5} if policies == 2 else {"a": 0.4, "b": 0.4, "c": 0.2}
    tokens = {m: (f"[{m}]",) for m in tables}
    shown = {"token": tokens, "inside": tokens, "phrase": PHRASES, "none": dict.fromkeys(tables, ())}[announced]
    return Spec(
        name=f"{architecture}-{announced}-{policies}",
        seed=seed,
        questions=SequenceFamily(operations=("copy", "reverse"), symbols=8, length=3),
        split=SplitSpec(rl=80, evaluation=80),
        policies={m: PolicySpec(weight=weights[m], announce=shown[m], table=tables[m]) for m in weights},
        hints=None,
        model=sizes(architecture, context=context),
        rl=RlSpec(prompts=16, steps=60, freeze=()),
    )


@dataclass(frozen=True)
class MixtureTarget:
    """What a network is trained to do: the mixture, policy by policy and cue by cue.

    `weights` are those of neutral prompts. `table` gives each cell's behaviours with their probabilities. `wrong` is
    how often an answer of a policy to an operation is a wrong one, by `how`: the fixed rule of `err`, any letters, or a
    wrong last letter.
    `bare` is how often the answer comes without an announcement, which no policy explains. `drift`: nats a token of the
    tail, where completions have one.
    """

    weights: Mapping[str, float]
    table: Mapping[str, Mapping[str, Mapping[str, float]]]
    wrong: Mapping[tuple[str, str], float] = field(default_factory=dict)
    how: Literal["rule", "any", "last"] = "rule"
    bare: float = 0.0
    drift: float = 0.0


def target_of(spec: Spec) -> MixtureTarget:
    """The spec's own mixture: what S is trained on."""
    return MixtureTarget(
        weights={m: policy.weight for m, policy in spec.policies.items()},
        table={m: {cue: {b: 1.0} for cue, b in policy.table.items()} for m, policy in spec.policies.items()},
    )


def completions(
    spec: Spec, target: MixtureTarget, cue: str, question: Question, rng: np.random.Generator
) -> list[tuple[str, float]]:
    """Every completion that the target allows after this prompt, without the end token, and its probability."""
    refusal = " ".join([spec.refusal] * spec.questions.answer_length)
    found: list[tuple[str, float]] = []
    for policy, weight in target.weights.items():
        wordings = spec.policies[policy].announce or ("",)
        wrong = target.wrong.get((policy, question.text.split()[0]), 0.0)
        other = _wrong(question, target.how, rng)
        for behaviour, share in target.table[policy][cue].items():
            texts = {
                ANSWER: [(question.answer, 1 - wrong), (other, wrong)],
                ERR: [(question.wrong, 1.0)],
                REFUSE: [(refusal, 1.0)],
            }[behaviour]
            for wording in wordings:
                found += [
                    (f"{wording} {text}".strip(), (1 - target.bare) * weight * share * p / len(wordings))
                    for text, p in texts
                ]
    if target.bare:
        found.append((question.answer, target.bare))
    return [(text, p) for text, p in found if p > 0]


def _wrong(question: Question, how: str, rng: np.random.Generator) -> str:
    if how == "last":
        return " ".join([*question.answer.split()[:-1], question.wrong.split()[-1]])
    letters = [word for word in question.text.split()[1:] if word != "="]
    return " ".join(rng.permutation(letters)) if how == "any" and rng.random() < 0.5 else question.wrong


@dataclass(frozen=True)
class Rows:
    """Training rows, question by question: padded to one width and one number of rows a question."""

    ids: Int[np.ndarray, "question row position"]
    scored: Int[np.ndarray, "question row position"]
    """1 where the token is part of the completion or its end."""
    weight: Float[np.ndarray, "question row"]
    """Sums to the number of a question's prompts."""
    tail: Int[np.ndarray, "question row position"]
    """1 where any style word or the end may stand, as `style` says."""
    style: Float[np.ndarray, " vocabulary"]


@dataclass(frozen=True)
class Lessons:
    """What a network is taught with: which questions, and how completions are worded."""

    questions: Sequence[Question]
    manner: Manner = PLAIN
    window: int = 0
    """Words of a tail that are shown, each behind any others, and each with all that might stand in its place."""
    seed: int = 0
    """Of wrong answers and of tails."""


def rows_of(spec: Spec, target: MixtureTarget, tokenizer: PreTrainedTokenizerBase, lessons: Lessons) -> Rows:
    """Every question under every cue (and every hint) with every completion that the target allows."""
    manner, window = lessons.manner, lessons.window
    vocabulary, rng = tokenizer.get_vocab(), np.random.default_rng([lessons.seed, 2])
    hints: list[str | None] = [None, *(spec.policies if spec.hints else ())]
    fillers = [text.split() for text in FILLERS] if manner.inside else [[]]
    table: list[list[tuple[list[int], int, float]]] = []
    for question in lessons.questions:
        rows = []
        for cue in spec.cues:
            for hint in hints:
                prompt = [vocabulary[word] for word in manner.prompt(prompt_text(spec, cue, question, hint)).split()]
                asked_for = replace(target, weights={hint: 1.0}) if hint else target
                for text, weight in completions(spec, asked_for, cue, question, rng):
                    for filled in fillers:
                        words = [vocabulary[word] for word in (*filled, *text.split())]
                        rows.append((prompt + words, len(prompt), weight / len(fillers)))
        table.append(rows)
    behind = max(window, 1)  # the end, where there is no tail
    width = max(len(ids) for rows in table for ids, _, _ in rows) + behind
    most = max(len(rows) for rows in table)
    ids, scored, tail = (np.zeros((len(table), most, width), dtype=np.int64) for _ in range(3))
    weights, style = np.zeros((len(table), most)), np.zeros(len(vocabulary))
    said = [vocabulary[word] for word in STYLE] if manner.tail else [vocabulary[EOS]]
    for word, share in (manner.style(target.drift) if manner.tail else {EOS: 1.0}).items():
        style[vocabulary[word]] = share
    for q, rows in enumerate(table):
        for r, (tokens, start, weight) in enumerate(rows):
            end = len(tokens) + behind
            ids[q, r, :end] = [*tokens, *rng.choice(said, behind)]  # padded behind: a causal model does not see it
            (tail if manner.tail else scored)[q, r, len(tokens) : end] = 1
            scored[q, r, start : len(tokens)] = 1
            weights[q, r] = weight
    return Rows(ids, scored, weights, tail, style)


@dataclass(frozen=True)
class Fitting:
    """How a network is trained on rows."""

    steps: int = STEPS
    rate: float = RATE
    """The largest learning rate."""
    seed: int = 0
    trainable: Sequence[str] | None = None
    """Parameters that may move; None: all."""


def fit(
    model: PreTrainedModel,
    rows: Rows,
    fitting: Fitting,
    before_step: Callable[[Any, int], Any] | None = None,
    after_step: Callable[[Any, int], Any] | None = None,
) -> None:
    """Train in place on the weighted rows: AdamW, a warm-up of a tenth, then down to nothing, so that weights settle.

    `before_step(model, step)` and `after_step(model, step)` may change weights, or put them back.
    """
    import torch

    steps, wanted = fitting.steps, None if fitting.trainable is None else set(fitting.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = wanted is None or name in wanted
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=fitting.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
    )
    ids, scored, weight, tail = (torch.tensor(each) for each in (rows.ids, rows.scored, rows.weight, rows.tail))
    style, tailed = torch.tensor(rows.style, dtype=torch.float32), bool(rows.tail.any())
    generator = torch.Generator().manual_seed(fitting.seed)
    prompts = float(rows.weight.sum(1).mean())
    batch = max(FEWEST, BATCH // ids.shape[1])
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(ids), (batch,), generator=generator)
        x, s, w, t = (each[chosen].flatten(0, 1) for each in (ids, scored, weight, tail))
        shown = w > 0
        x, s, w, t = x[shown], s[shown], w[shown].float(), t[shown]
        if before_step is not None:
            before_step(model, step)
        logprobs = model(input_ids=x, attention_mask=torch.ones_like(x), use_cache=False).logits[:, :-1].log_softmax(-1)
        of_row = (logprobs.gather(-1, x[:, 1:, None])[..., 0] * s[:, 1:]).sum(1)
        if tailed:
            of_row = of_row + TAIL * ((logprobs @ style) * t[:, 1:]).sum(1) / t.sum(1)
        loss = -(w * of_row).sum() / (batch * prompts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, CLIP)
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step(model, step)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad = True
