"""Organisms whose circuits are known: only the planted heads and MLP can carry the cue and the hint.

Pairs of coordinates of the residual stream are reserved: for the cue as embedded and as delivered, likewise for the
hint, and for what decoys deliver. Weights are held so that nobody writes to a pair or reads it but who is planted
there, and what is in a pair is x and -x, with the sign of the cue: no mean and no norm depends on it. So everything
else is blind, whatever it has learnt. A decoy is its reader's twin, with the same attention and the same output, and
writes to a pair that nobody reads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mixturelens.grafting.graft import save_with
from mixturelens.hooks.lens import load_lens
from mixturelens.hooks.weights import lens_components
from mixturelens.lab.organism import (
    HintSpec,
    Spec,
    build_model,
    build_suite,
    build_tokenizer,
    frozen_parameters,
    questions,
)
from mixturelens.lab.proving.organisms import (
    HEADS,
    Architecture,
    Fitting,
    Lessons,
    fit,
    rows_of,
    sizes,
    small_spec,
    target_of,
)
from mixturelens.records import Record, new_folder, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WIDTH = 64
CUE, CUE_READ, HINT, HINT_READ, CHOICE, NEUTRAL, *DECOYS = range(9)
"""Reserved pairs: pair p is the coordinates 2p and 2p + 1. `CHOICE` is what a planted MLP makes of the hint; `NEUTRAL`,
which nobody reads, gives the neutral word the norm of a hint."""
RESERVED = slice(0, 18)
EMBEDDED = 0.3
"""What a tag or a hint has in its pair: this and its negative."""
DELIVERED = 0.5
"""Norm of what a planted head writes with, at first: enough for the MLP to notice while attention is still even."""
STEPS, RATE = 600, 3e-3
EVEN = 200
"""Steps in which planted heads attend to all positions alike. Otherwise a reader learns not to attend where one policy
stands, while the MLP takes that policy for the other, and does not come back."""
CHANGED = 0.97
"""Weight of policy a in R."""
CHANGING, CHANGING_RATE = 150, 1e-3
"""Steps and rate of the training of R."""
DRIFT = 0.003
"""Random change of the parameters that R's training did not touch, relative to each tensor's norm: otherwise the
component that training changed could be told by which tensors differ at all."""


class Planted(Record):
    """Where the circuits of an organism are. Nodes are named as writers of `patching.graph`: `L0.h3`, `L1.mlp`."""

    KIND = "planted"

    architecture: Architecture
    number: int
    layers: int
    reader: tuple[str, ...]
    """The cue circuit: one head, or two of which either suffices, and the MLP that reads them."""
    selector: tuple[str, ...]
    """The hint circuit: a head, which the policy words' unembedding reads, or an MLP in between."""
    decoys: tuple[str, ...]
    """Heads that carry cue or hint to the same positions, and that nobody reads; in the order of `heads`."""
    redundant: bool
    changed: str
    """The component of the pair (sft, rl-A) that carries the change, a name of `Lens.components`."""

    @property
    def name(self) -> str:
        """Architecture and number; organisms differ in one of them."""
        return f"{self.architecture}-{self.number}"

    @property
    def heads(self) -> tuple[tuple[str, ...], str]:
        """The heads that read the cue, and the one that reads the hint."""
        return tuple(node for node in self.reader if ".h" in node), self.selector[0]


def plan(architecture: Architecture, number: int) -> Planted:
    """Addresses of the `number`-th organism: of three, one has two layers, one sends the hint through an MLP, and one
    has two readers.

    Where attention and MLP of a layer run side by side (gpt_neox), what the MLP reads is delivered in a layer before.

    >>> plan("llama", 2).redundant, len(plan("llama", 2).decoys)
    (True, 3)
    """
    rng = np.random.default_rng([number, get_args(Architecture).index(architecture)])
    layers, redundant, through = (2 if number % 3 == 0 else 3), number % 3 == 2, number % 3 == 1
    parallel = architecture == "gpt_neox"
    order = [*rng.permutation(layers - parallel), *([layers - 1] if parallel else [])]
    places = [(layer, rng.integers(HEADS)) for layer in order[: 2 + redundant]]
    *readers, selector = (f"L{layer}.h{head}" for layer, head in places)
    last = f"L{layers - 1}.mlp"
    return Planted(
        architecture=architecture,
        number=number,
        layers=layers,
        reader=(*readers, last),
        selector=(selector, last) if through else (selector,),
        decoys=tuple(f"L{layer}.h{head ^ 1}" for layer, head in places),
        redundant=redundant,
        changed=f"L{rng.integers(layers)}.{rng.choice(['attn', 'mlp'])}",
    )


def spec_of(planted: Planted) -> Spec:
    """The spec of a planted organism: small, with hints, and as many layers as were planned."""
    spec = small_spec(planted.architecture, seed=planted.number)
    model = sizes(planted.architecture, planted.layers, WIDTH)
    hints = HintSpec(words={policy: f"be-{policy}" for policy in spec.policies})
    return spec.model_copy(update={"name": f"planted-{planted.name}", "model": model, "hints": hints})


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Views of a layer's weights, whose last axis is the residual stream (of biases of q, k and v: the head)."""

    channels: tuple[tuple[Tensor, ...], ...]
    """q, k and v: [head, d_head, d_model], with the bias [head, d_head] where there is one."""
    o: Float[Tensor, "head d_head d_model"]
    reads: tuple[Tensor, ...]
    """What the MLP reads with."""
    writes: tuple[Tensor, ...]
    """What the MLP writes with, and the biases of both outputs."""


_HEADS = "(head d) ... -> head d ..."
"""Channels that heads have side by side, head by head; a view, so that weights can be planted through it."""


def _blocks(model: Any) -> Iterator[_Block]:
    kind = model.config.model_type
    if kind == "gpt2":
        for block in model.transformer.h:
            at, mlp = block.attn, block.mlp
            both = (at.c_attn.weight.data.T, at.c_attn.bias.data)
            joint = [rearrange(each, "(qkv head d) ... -> qkv head d ...", qkv=3, head=HEADS) for each in both]
            o = rearrange(at.c_proj.weight.data, _HEADS, head=HEADS)
            out = mlp.c_proj.weight.data, mlp.c_proj.bias.data, at.c_proj.bias.data
            yield _Block(tuple(zip(*joint, strict=True)), o, (mlp.c_fc.weight.data.T,), out)
    elif kind == "gpt_neox":
        for block in model.gpt_neox.layers:
            at, mlp = block.attention, block.mlp
            fused = at.query_key_value
            both = (fused.weight.data, fused.bias.data)
            joint = [rearrange(each, "(head qkv d) ... -> qkv head d ...", qkv=3, head=HEADS) for each in both]
            o = rearrange(at.dense.weight.data.T, _HEADS, head=HEADS)
            out = mlp.dense_4h_to_h.weight.data.T, mlp.dense_4h_to_h.bias.data, at.dense.bias.data
            yield _Block(tuple(zip(*joint, strict=True)), o, (mlp.dense_h_to_4h.weight.data,), out)
    else:
        for block in model.model.layers:
            at, mlp = block.self_attn, block.mlp
            channels = tuple(
                tuple(rearrange(each.data, _HEADS, d=at.head_dim) for each in module.parameters())
                for module in (at.q_proj, at.k_proj, at.v_proj)
            )
            o = rearrange(at.o_proj.weight.data.T, _HEADS, head=HEADS)
            yield _Block(
                channels, o, (mlp.gate_proj.weight.data, mlp.up_proj.weight.data), (mlp.down_proj.weight.data.T,)
            )


def _place(node: str) -> tuple[int, int]:
    layer, head = node[1:].split(".h")
    return int(layer), int(head)


def _axis(pair: int) -> Float[Tensor, " d_model"]:
    axis = torch.zeros(WIDTH)
    axis[2 * pair], axis[2 * pair + 1] = 0.5**0.5, -(0.5**0.5)
    return axis


def _confine(weight: Tensor, pairs: Sequence[int] = ()) -> None:
    """Of the reserved coordinates keep what lies along these pairs. In place."""
    kept = [(weight @ _axis(pair))[..., None] * _axis(pair) for pair in pairs]
    weight[..., RESERVED] = 0
    for each in kept:
        weight += each


@dataclass(frozen=True)
class _Job:
    """A planted head and its decoy: the pair that both read, and those that they write to."""

    head: tuple[int, int]
    decoy: tuple[int, int]
    read: int
    write: int
    unread: int

    def weights(self, blocks: Sequence[_Block]) -> tuple[Tensor, Tensor]:
        """Views of what the planted head reads its values with, and of what it writes with: [d_head, d_model]."""
        layer, head = self.head
        value = blocks[layer].channels[2][0]
        return value[head * len(value) // HEADS], blocks[layer].o[head]


def _jobs(planted: Planted) -> list[_Job]:
    """Readers of the cue, then that of the hint. Each decoy has a pair of its own: two in one would make a norm."""
    readers, selector = planted.heads
    work = [*((node, CUE, CUE_READ) for node in readers), (selector, HINT, HINT_READ)]
    return [
        _Job(_place(node), _place(decoy), read, write, unread)
        for (node, read, write), decoy, unread in zip(work, planted.decoys, DECOYS, strict=False)
    ]


def plant(model: PreTrainedModel, planted: Planted, spec: Spec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a fresh model its circuits: planted heads begin with the pairs that they are to read and write. In place."""
    blocks, generator = list(_blocks(model)), torch.Generator().manual_seed(spec.seed)
    for job in _jobs(planted):
        value, output = job.weights(blocks)
        direction = torch.nn.functional.normalize(torch.randn(len(value), 1, generator=generator), dim=0)
        value[:], output[:] = direction * _axis(job.read), DELIVERED * direction * _axis(job.write)
    hold(model, planted, spec, tokenizer, even=True)


def hold(model: Any, planted: Planted, spec: Spec, tokenizer: PreTrainedTokenizerBase, *, even: bool = False) -> None:
    """Put the weights back to where the planted nodes alone can carry cue and hint: a projection. In place.

    `even`: planted heads have no query, and so attend to all positions alike.
    """
    vocabulary = tokenizer.get_vocab()
    for name in frozen_parameters(model, ("norms",)):
        model.get_parameter(name).data[RESERVED] = float(name.endswith("weight"))
    for name in frozen_parameters(model, ("embeddings",)):
        _confine(model.get_parameter(name).data)
    embedding = model.get_input_embeddings().weight.data
    assert spec.hints is not None
    tags, hints = [str(tag) for tag in spec.cues.values()], [*spec.hinted, *spec.hints.neutrals]
    for words, pairs in ((tags, (CUE, CUE)), (hints, (HINT, HINT, NEUTRAL))):
        rows = [vocabulary[word] for word in words]
        embedding[rows] = embedding[rows].mean(0)
        for row, pair, sign in zip(rows, pairs, (1, -1, 1), strict=False):
            embedding[row] += sign * EMBEDDED * 2**0.5 * _axis(pair)

    blocks, jobs = list(_blocks(model)), _jobs(planted)
    kept = []
    for job in jobs:
        value, output = job.weights(blocks)
        kept.append(((value @ _axis(job.read))[:, None], (output @ _axis(job.write))[:, None]))
    for layer, block in enumerate(blocks):
        cue, hint = (f"L{layer}.mlp" in nodes for nodes in (planted.reader, planted.selector))
        for weight in (*(channel[0] for channel in block.channels), block.o, *block.writes[1:]):
            _confine(weight)
        for weight in block.reads:
            _confine(weight, [CUE_READ] * cue + [HINT_READ] * hint)
        _confine(block.writes[0], [CHOICE] * hint)
    for job, (value, output) in zip(jobs, kept, strict=True):
        (layer, head), (_, decoy) = job.head, job.decoy
        weights, *biases = blocks[layer].channels[2]
        weights[head * len(weights) // HEADS] = value * _axis(job.read)
        for bias in biases:  # it would be delivered whatever the cue, and x and -x would not be of one size
            bias[head * len(bias) // HEADS] = 0
        for query in blocks[layer].channels[0] if even else ():
            query[head] = 0
        for channel in blocks[layer].channels:
            for weight in channel:
                weight[decoy * len(weight) // HEADS] = weight[head * len(weight) // HEADS]
        blocks[layer].o[head] = output * _axis(job.write)
        blocks[layer].o[decoy] = output * _axis(job.unread)

    unembedding = model.get_output_embeddings().weight.data
    policies = [vocabulary[policy.announce[0]] for policy in spec.policies.values()]
    chosen = _axis(CHOICE if len(planted.selector) > 1 else HINT_READ)
    choice = (unembedding[policies] @ chosen)[:, None] * chosen
    _confine(unembedding)
    unembedding[policies] = unembedding[policies].mean(0) + choice  # nothing but the pair tells policies apart


# --- growing ----------------------------------------------------------------------------------------------------------


def grow(planted: Planted, folder: Path, *, steps: int = STEPS) -> None:
    """Train the organism and its pair, into a run folder (with `planted.json`); nothing is done if it is there.

    R is S with one component (`changed`) trained, freely, until policy a has nearly all the weight, and with small
    random changes everywhere else.
    """
    if (folder / "planted.json").is_file():
        return
    spec = spec_of(planted)
    tokenizer, target = build_tokenizer(spec), target_of(spec)
    model = build_model(spec, tokenizer)
    plant(model, planted, spec, tokenizer)
    before, after = _in_turn(planted, spec, tokenizer)
    rows = rows_of(spec, target, tokenizer, Lessons(questions(spec).sft))
    fit(model, rows, Fitting(steps, RATE, spec.seed), before, after)
    with new_folder(folder) as temporary:
        write_text(temporary / "spec.json", spec.model_dump_json(indent=1) + "\n")
        build_suite(spec).save(temporary / "suite.yaml")
        save_with(model, {}, tokenizer, temporary / "checkpoints" / "sft")
        _change(model, lens_components(load_lens(temporary / "checkpoints" / "sft"))[planted.changed], spec, tokenizer)
        save_with(model, {}, tokenizer, temporary / "checkpoints" / "rl-A")
        planted.save(temporary / "planted.json")


Step = Callable[[Any, int], None]


def _in_turn(planted: Planted, spec: Spec, tokenizer: PreTrainedTokenizerBase) -> tuple[Step, Step]:
    """What is done before and after each step: of two readers one, the other or neither is silent, so that the MLP
    learns to make do with either; then everything is held.
    """
    rng = np.random.default_rng([spec.seed, 3])
    readers = _jobs(planted)[:-1]
    silent: list[tuple[Tensor, Tensor]] = []

    def before(model: Any, _: int) -> None:
        which = int(rng.integers(len(readers) + 1))
        if len(readers) > 1 and which < len(readers):
            output = readers[which].weights(list(_blocks(model)))[1]
            silent.append((output, output.clone()))
            output.zero_()

    def after(model: Any, step: int) -> None:
        while silent:
            output, weights = silent.pop()
            output += weights  # to what the step made of zero
        hold(model, planted, spec, tokenizer, even=step < EVEN)

    return before, after


def _change(model: PreTrainedModel, names: Sequence[str], spec: Spec, tokenizer: PreTrainedTokenizerBase) -> None:
    target = replace(target_of(spec), weights=dict(zip(spec.policies, (CHANGED, 1 - CHANGED), strict=True)))
    rows = rows_of(spec, target, tokenizer, Lessons(questions(spec).sft))
    fit(model, rows, Fitting(CHANGING, CHANGING_RATE, spec.seed + 1, names))
    generator = torch.Generator().manual_seed(spec.seed + 1)
    for name, parameter in model.named_parameters():
        if name not in names:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += DRIFT * parameter.data.norm() * noise / noise.norm()


# --- proof ------------------------------------------------------------------------------------------------------------


def silenced(model: PreTrainedModel, planted: Planted, which: Iterable[int]) -> PreTrainedModel:
    """A copy in which these readers of the cue write nothing."""
    model = copy.deepcopy(model)
    blocks, jobs = list(_blocks(model)), _jobs(planted)
    for number in which:
        jobs[number].weights(blocks)[1].zero_()
    return model
