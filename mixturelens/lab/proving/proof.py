"""The proof of an organism with planted addresses: everything but the planted nodes is inert, and they carry it all."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mixturelens.files import read_json
from mixturelens.hooks.lens import Edit, Lens, Tokens, load_lens, tokens
from mixturelens.hooks.weights import lens_components
from mixturelens.lab.organism import EOS, Spec, parse_spec, prompt_text, questions
from mixturelens.lab.proving.exhaustive import SHOWN, prompt_truth
from mixturelens.lab.proving.organisms import HEADS
from mixturelens.lab.proving.planted import Planted, silenced
from mixturelens.lab.proving.truth import PromptTruth, Truth, truth_of
from mixturelens.lab.tasks import Question
from mixturelens.models import load_model
from mixturelens.records import Record
from mixturelens.types import ANSWER, REFUSE, Component

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKED = 24
"""Held-out questions of a proof."""


class Proof(Record):
    """What interchange and exhaustive evaluation say of an organism, on held-out questions."""

    KIND = "proof"

    inert: dict[str, float]
    """cue, hint -> largest change of any log c, or of P(answer | policy), when any other node, or all of them together,
    decoys included, give what they give under the other cue (hint)."""
    carried: dict[str, float]
    """cue, hint -> least share, over rows, of the contrast that moves when the planted nodes do."""
    accuracy: float
    """Least mean probability, over cells of the policy table, of what the table says."""
    alone: tuple[float, ...]
    """The same with each reader the only one: the others write nothing."""
    blind: float
    """Largest difference between cues of any log c or P(answer | policy) with no reader at all."""
    weights: dict[str, float]
    """cue -> mean weight of policy a on neutral prompts."""
    change: Truth
    """Of the pair (sft, rl-A)."""
    grafted: tuple[float, float]
    """Share of the change of log c_a / c_b by S with the changed component of R, and by S with all else of R."""


@dataclass(frozen=True)
class _Rows:
    """Prompts with a completion in place, all of one width."""

    batch: Tokens
    prompt: int
    """Tokens of the prompt."""
    policies: tuple[int, ...]

    def read(self, logits: Float[Tensor, "row pos vocabulary"]) -> tuple[Tensor, Tensor]:
        """log c of every policy [row, policy], and P(the rest | the announcement) [row]."""
        logs = logits.double().log_softmax(-1)
        rest = logs[:, self.prompt : -1].gather(-1, self.batch.ids[:, self.prompt + 1 :, None])
        return logs[:, self.prompt - 1, list(self.policies)], rest[..., 0].sum(1).exp()


def _rows(
    spec: Spec,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    cue: str,
    policy: str,
    hint: str | None = None,
) -> _Rows:
    """The questions under a cue (and a hint), with the policy put in place and followed by the answer."""
    vocabulary = tokenizer.get_vocab()
    prompts = [prompt_text(spec, cue, question, hint) for question in asked]
    announced = [each.announce[0] for each in spec.policies.values()]
    placed = spec.policies[policy].announce[0]
    texts = [f"{prompt} {placed} {question.answer} {EOS}" for prompt, question in zip(prompts, asked, strict=True)]
    ids = tokens([[vocabulary[word] for word in text.split()] for text in texts])
    return _Rows(ids, len(prompts[0].split()), tuple(vocabulary[word] for word in announced))


Outputs = dict[tuple[int, Component], Tensor]


def _outputs(lens: Lens, batch: Tokens) -> Outputs:
    """What every head and every MLP gives."""
    kinds: tuple[Component, ...] = ("z", "mlp_out")
    return lens.capture(batch, [(layer, kind) for layer in range(lens.layers) for kind in kinds])[0]


@torch.inference_mode()
def _run(lens: Lens, rows: _Rows, nodes: Sequence[str] = (), source: Outputs | None = None) -> tuple[Tensor, Tensor]:
    """What is read off the rows with these nodes' outputs taken from `source`."""

    def edit(node: str) -> tuple[Any, Edit]:
        assert source is not None
        layer, unit = int(node[1 : node.index(".")]), node[node.index(".") + 1 :]
        kind: Component = "mlp_out" if unit == "mlp" else "z"
        at: Any = (...,) if unit == "mlp" else (..., int(unit[1:]), slice(None))
        values = source[layer, kind][at]

        def put(activation: Tensor) -> Tensor:
            activation[at] = values
            return activation

        return lens.point(layer, kind), put

    return rows.read(lens.run(rows.batch, [edit(node) for node in nodes], last_only=False))


def proof(folder: Path) -> Proof:
    """What is so about the organism in this folder, by interchange of every node and by exhaustive evaluation."""
    planted = Planted.load(folder / "planted.json")
    spec = parse_spec(read_json(folder / "spec.json", "no organism lies here"), str(folder / "spec.json"))
    lens = load_lens(folder / "checkpoints" / "sft")
    before, after = (load_model(folder / "checkpoints" / name) for name in ("sft", "rl-A"))
    tokenizer, asked = lens.tokenizer, questions(spec).evaluation[:ASKED]
    nodes = [f"L{layer}.{unit}" for layer in range(lens.layers) for unit in (*(f"h{h}" for h in range(HEADS)), "mlp")]

    def rows(cue: str, policy: str, hint: str | None = None) -> _Rows:
        return _rows(spec, tokenizer, asked, cue, policy, hint)

    def accuracy(found: PromptTruth) -> float:
        at = {ANSWER: SHOWN.index("right"), REFUSE: SHOWN.index(REFUSE)}
        cells = [
            (c, m, slice(None), at[shown])
            for m, row in enumerate(spec.table.values())
            for c, shown in enumerate(row.values())
        ]
        return min(float(np.nanmin(found.shown[0].mean(0)[cell])) for cell in cells)

    contrasts = {
        "cue": [(rows(c, m), rows(d, m)) for m in spec.policies for c, d in itertools.permutations(spec.cues)],
        "hint": [(rows(c, h, h), rows(c, h, g)) for c in spec.cues for h, g in itertools.permutations(spec.policies)],
    }
    circuits = {"cue": planted.reader, "hint": planted.selector}
    found = {
        kind: [_interchanged(lens, *pair, nodes, circuits[kind], kind) for pair in pairs]
        for kind, pairs in contrasts.items()
    }
    truth = prompt_truth(spec, (before, after), tokenizer, asked)
    readers = range(len(planted.heads[0]))
    only = [silenced(before, planted, [other for other in readers if other != each]) for each in readers]
    none = silenced(before, planted, readers)
    return Proof(
        inert={kind: max(inert for inert, _ in values) for kind, values in found.items()},
        carried={kind: min(carried for _, carried in values) for kind, values in found.items()},
        accuracy=accuracy(truth),
        alone=tuple(accuracy(prompt_truth(spec, (one, one), tokenizer, asked)) for one in only),
        blind=max(_apart(*(_plain(none, side) for side in pair)) for pair in contrasts["cue"]),
        weights={cue: float(truth.weights[0, :, c, 0].mean()) for c, cue in enumerate(spec.cues)},
        change=truth_of(truth),
        grafted=_grafted(before, after, lens_components(lens)[planted.changed], [rows(cue, "a") for cue in spec.cues]),
    )


@torch.inference_mode()
def _plain(model: Any, rows: _Rows) -> tuple[Tensor, Tensor]:
    return rows.read(model(input_ids=rows.batch.ids, attention_mask=rows.batch.real.long()).logits)


def _apart(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(one, other, strict=True))


def _interchanged(
    lens: Lens, into: _Rows, source: _Rows, nodes: Sequence[str], circuit: Sequence[str], kind: str
) -> tuple[float, float]:
    """Largest change by any node outside the circuit, or all, taken from the other side; and the least share of the
    contrast that moves with the circuit: of P(answer | policy) for the cue, of log c_a / c_b for the hint.
    """

    def contrast(read: tuple[Tensor, Tensor]) -> Tensor:
        return read[1] if kind == "cue" else read[0][:, 0] - read[0][:, 1]

    outputs, base, goal = _outputs(lens, source.batch), _run(lens, into), _run(lens, source)
    outside = [node for node in nodes if node not in circuit]
    inert = max(_apart(_run(lens, into, some, outputs), base) for some in (*([node] for node in outside), outside))
    moved = contrast(_run(lens, into, circuit, outputs)) - contrast(base)
    return inert, float((moved / (contrast(goal) - contrast(base))).min())


def _grafted(before: Any, after: Any, names: Sequence[str], asked: Sequence[_Rows]) -> tuple[float, float]:
    old, new = ({name: value.clone() for name, value in model.named_parameters()} for model in (before, after))

    def odds(chosen: Iterable[str]) -> float:
        model = copy.deepcopy(before)
        model.load_state_dict({**old, **{name: new[name] for name in chosen}}, strict=False)
        return float(torch.cat([_plain(model, rows)[0] for rows in asked]).diff(dim=1).mean())

    start, end = odds(()), odds(new)
    share, rest = ((odds(some) - start) / (end - start) for some in (names, new.keys() - set(names)))
    return share, rest
