"""Path attribution: how much each component's weights add to a change, along the straight line from S to R."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mixturelens.grafting.cells import Batch, Cells
from mixturelens.grafting.components import State
from mixturelens.grafting.graft import WorkingModel
from mixturelens.grafting.readings import Readings, metric_names, metrics, read
from mixturelens.models.beginnings import BATCH_TOKENS
from mixturelens.types import InputError, RunError

NODES = 8
"""Points of the Gauss-Legendre rule on each panel of the line."""
FEW_NODES = 3
"""The same on a large model, whose change is small beside its weights: the line is nearly straight there."""
MOST = 256
"""Bound on the points at which the slope is taken."""
CLOSE = 0.005
"""How near the sum has to come to the change, as a share of max(|change|, LEAST)."""
LEAST = 0.05
"""Nats under which a change is too small to be judged by its own size."""
BATCH_BYTES = 1 << 29
"""Bound on the activations that are kept for one way back."""
KEPT = 2.5
"""Activations kept a token, for every weight that it meets over the width of the model: inputs, outputs and slopes."""
QUESTIONS = 100
"""Bound on the questions: a slope costs as much as five forwards, and shares vary little between questions."""


@dataclass(frozen=True)
class Attribution:
    """What each part adds to each metric of each question, nats."""

    names: tuple[str, ...]
    """Of the metrics."""
    parts: tuple[str, ...]
    questions: tuple[str, ...]
    """All, or QUESTIONS of them, drawn: the rows of what follows."""
    values: Float[np.ndarray, "question metric part"]
    """Summed over parts: the change, but for the error of the quadrature. NaN where a question lacks the cue."""
    change: Float[np.ndarray, "question metric"]
    """M(R) - M(S)."""
    points: int
    """Points of the line at which the slope was taken."""


def attribute(
    bench: WorkingModel, policies: tuple[str, str], nodes: int = NODES, most: int | None = None
) -> Attribution:
    """Integrated gradients over weights: the integral of dM/dtheta . (theta_R - theta_S) from S to R, for every part.

    Sundararajan et al. 2017 (arXiv 1703.01365), with weights for inputs; every metric of every question at once. The
    line is halved wherever the parts' sum misses the change between the ends of a piece (which is known exactly),
    until it misses none by more than CLOSE in all; the result is given even where that takes more than `most` points
    (MOST). A panel has `nodes` of them.

    The parts are the components of `bench`, whatever its pieces: those that did not change get 0. Its model may hold
    any weights, and is left as it is. `policies`: the (p, o) of `routing@cue`. Beside the two states one set of the
    changed weights is held. Raises InputError for a parameter that changed and is in no part, or in two.

    Example: `attribute(WorkingModel(s, weights_of(s), weights_of(r), components, cells), ("a", "b")).values.mean(0)`.
    """
    cells, parts = _some(bench.cells), bench.components
    line = _WeightLine(bench.model, bench.before, bench.after, parts, cells, policies)
    about = (metric_names(cells), tuple(parts), cells.questions)
    if not line.changed:
        nothing = line.metrics_at(0.0) * 0.0  # NaN stays where there is no prompt
        return Attribution(*about, np.repeat(nothing[..., None], len(parts), -1), nothing, 0)
    panels = [_panel(line, nodes, (0.0, line.metrics_at(0.0)), (1.0, line.metrics_at(1.0)))]
    points = nodes
    most = MOST if most is None else most
    change = panels[0].change
    scale = np.maximum(np.abs(_mean(change)), LEAST)
    while points + 2 * nodes <= most:
        misses = np.stack([np.abs(panel.misses) / scale for panel in panels])
        if not bool((misses.sum(0) > CLOSE).any()):
            break
        worst = panels.pop(int(misses.max(1).argmax()))
        middle = (worst.start[0] + worst.end[0]) / 2
        between = (middle, line.metrics_at(middle))
        panels += [_panel(line, nodes, worst.start, between), _panel(line, nodes, between, worst.end)]
        points += 2 * nodes
    values = np.sum([panel.values for panel in panels], axis=0)
    return Attribution(*about, values, change, points)


def _some(cells: Cells) -> Cells:
    index = cells.grid.index  # [question, cue]
    if len(index) <= QUESTIONS:
        return cells
    drawn = np.random.default_rng(cells.seed).choice(len(index), QUESTIONS, replace=False)
    return cells.part(sorted(int(i) for i in index[drawn].ravel() if i >= 0))


# --- quadrature -------------------------------------------------------------------------------------------------------

Point = tuple[float, Float[np.ndarray, "question metric"]]
"""Where on the line (0: S, 1: R), and the metrics there."""


@dataclass(frozen=True)
class _Stretch:
    """A piece of the line, and what the parts add along it."""

    start: Point
    end: Point
    values: Float[np.ndarray, "question metric part"]

    @property
    def change(self) -> Float[np.ndarray, "question metric"]:
        return self.end[1] - self.start[1]

    @cached_property
    def misses(self) -> Float[np.ndarray, " metric"]:
        """By how much the parts' sum differs from the change, mean over questions."""
        return _mean(self.values.sum(-1) - self.change)


def _panel(line: _WeightLine, nodes: int, start: Point, end: Point) -> _Stretch:
    rule = np.polynomial.legendre.leggauss(nodes)
    half = (end[0] - start[0]) / 2
    slopes = (half * w * line.slopes_at(start[0] + half * (1 + x)) for x, w in zip(*rule, strict=True))
    return _Stretch(start, end, sum(slopes, np.zeros(())))


def _mean(values: Float[np.ndarray, "question metric"]) -> Float[np.ndarray, " metric"]:
    known = ~np.isnan(values)
    return np.where(known, values, 0.0).sum(0) / np.maximum(known.sum(0), 1)


# --- slopes along the line --------------------------------------------------------------------------------------------


class _WeightLine:
    """The straight line from S to R in the space of weights: metrics at a point, and their slopes along every part.

    Every module that owns changed parameters adds `push * (d output / d theta . (theta_R - theta_S))` to its output,
    with a `push` of 0 for each row and part: the gradient in `push`, which takes one pass back for all rows and parts,
    is the slope. For the bracket, the module is called with the change in place of its weights: what owns parameters
    (projections, embeddings, norms) is affine in them, which is tried out where it is first called. (Forward-mode
    differentiation of the whole model would take a pass for every part.)
    """

    def __init__(
        self,
        model: nn.Module,
        before: State,
        after: State,
        parts: Mapping[str, tuple[str, ...]],
        cells: Cells,
        policies: tuple[str, str],
    ) -> None:
        self.model = model
        self.cells = replace(cells, shared=False)  # a slope is that of a row
        self.policies = policies
        self.parts = tuple(parts)
        named = [name for members in parts.values() for name in members]
        if len(set(named)) < len(named):
            twice = next(name for name in named if named.count(name) > 1)
            raise InputError(f"parts: parameter {twice!r} is named twice; name each parameter once")
        parameters = dict(model.named_parameters())
        for name in named:
            if name not in parameters or name not in before or name not in after:
                raise InputError(
                    f"parts: the model has no parameter {name!r}; name those of hooks.weights.lens_components"
                )
        self.before = {name: before[name].to(parameter) for name, parameter in parameters.items()}
        self.after = {name: after[name].to(parameter) for name, parameter in parameters.items()}
        self.changed = [name for name in parameters if not torch.equal(self.before[name], self.after[name])]
        for name in self.changed:
            if name not in named:
                raise InputError(f"parts: {name!r} changed but is in no part; put it into one")
        part_of = {name: k for k, members in enumerate(parts.values()) for name in members}
        self.own = _own(model)
        self.owners: dict[str, dict[int, dict[str, str]]] = {}
        """Module -> part -> the module's own parameters that changed, and their names in the model."""
        for where, own in self.own.items():
            for local, name in own.items():
                if name in self.changed:
                    self.owners.setdefault(where, {}).setdefault(part_of[name], {})[local] = name
        self.moving = False
        """While a module is called with other weights, for how its output moves: its hooks have to stay out of that."""
        self.offset: dict[str, bool] = {}
        """Of a module that was called: whether it gives anything without weights."""

    def _weight(self, name: str, t: float) -> Tensor:
        with torch.no_grad():
            return self.before[name].lerp(self.after[name], t) if name in self.changed else self.before[name]

    @contextlib.contextmanager
    def _at(self, t: float) -> Iterator[None]:
        """The model at a point of the line. Each module gets its weights when it is called, and loses them after that.

        What the way back needs of them is not kept either: it is made again there.
        """
        live: dict[int, str] = {}  # storage of a weight of the module that runs -> its name

        def enter(where: str) -> Callable[..., None]:
            def hook(module: nn.Module, _: Any) -> None:
                for local, name in () if self.moving else self.own[where].items():
                    # found before the parameter of this name, which stays as it is
                    module.__dict__[local] = weight = self._weight(name, t)
                    live[weight.untyped_storage().data_ptr()] = name

            return hook

        def leave(where: str) -> Callable[..., None]:
            def hook(module: nn.Module, *_: Any) -> None:
                for local in self.own[where]:
                    weight = module.__dict__.pop(local, None)
                    if weight is not None:
                        live.pop(weight.untyped_storage().data_ptr(), None)

            return hook

        def pack(value: Tensor) -> Tensor | tuple[str, Any]:
            name = live.get(value.untyped_storage().data_ptr())
            return value if name is None else (name, (value.size(), value.stride(), value.storage_offset()))

        def unpack(packed: Tensor | tuple[str, Any]) -> Tensor:
            return packed if isinstance(packed, Tensor) else self._weight(packed[0], t).as_strided(*packed[1])

        owning = [(where, self.model.get_submodule(where)) for where in self.own]
        with contextlib.ExitStack() as stack, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            for where, module in owning:
                stack.callback(leave(where), module)  # also where a call breaks off
                stack.callback(module.register_forward_pre_hook(enter(where)).remove)
                stack.callback(module.register_forward_hook(leave(where)).remove)
            yield

    @cached_property
    def chunks(self) -> list[tuple[list[int], Cells]]:
        """Prompts whose activations are kept for one way back, and their cells."""
        width = int(self.cells.lengths.max()) * len(self.cells.announcements)
        most = min(BATCH_TOKENS, BATCH_BYTES // self._token) if self.cells.long else BATCH_TOKENS
        size, count = max(1, most // width), len(self.cells.prompts.rows)
        found = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
        return [(prompts, self.cells.part(prompts)) for prompts in found]

    @property
    def _token(self) -> int:
        """Bytes of activations that a token leaves behind."""
        model: Any = self.model
        words = model.get_input_embeddings().weight
        met = sum(p.numel() for p in self.model.parameters() if p.shape != words.shape) / words.shape[1]
        return max(1, int(KEPT * met * words.element_size()))

    def metrics_at(self, t: float) -> Float[np.ndarray, "question metric"]:
        with torch.no_grad(), self._at(t):
            return self._metrics(read(self.model, self.cells))

    def slopes_at(self, t: float) -> Float[np.ndarray, "question metric part"]:
        """d metric / d t along every part; the sum over parts is the whole slope."""
        shape = (len(self.cells.prompts.rows), len(self.cells.policies), len(self.parts))
        log_c, log_p = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        for prompts, some in self.chunks:
            log_c[prompts], log_p[prompts] = self._slopes(t, some)
        slopes = [self._metrics(Readings(log_c[..., k], log_p[..., k])) for k in range(len(self.parts))]
        return np.stack(slopes, -1) if slopes else np.zeros((*self.cells.grid.index.shape[:1], 0, 0))

    def _metrics(self, readings: Readings) -> Float[np.ndarray, "question metric"]:
        return metrics(readings, self.cells, self.policies)[0].cpu().numpy()  # linear in readings, so in slopes, too

    def _slopes(
        self, t: float, cells: Cells
    ) -> tuple[Float[Tensor, "prompt policy part"], Float[Tensor, "prompt policy part"]]:
        told: list[tuple[Batch, Float[Tensor, "row part"]]] = []

        def tell(batch: Batch) -> None:
            shape = (len(batch.ids), len(self.parts))
            told.append((batch, torch.zeros(shape, device=batch.ids.device, requires_grad=True)))

        with self._at(t), self._pushed(lambda: told[-1][1], t), torch.enable_grad():
            readings = read(self.model, cells, told=tell)
        pushes = [push for _, push in told]
        rows = torch.cat([batch.members for batch, _ in told]).cpu()
        prompt, policy = torch.as_tensor(cells.prompt)[rows], torch.as_tensor(cells.policy)[rows]
        found = []
        for values, more in ((readings.log_c, True), (readings.log_p, False)):
            # each entry of the table reads the rows of its own prompt and policy and no other, so the sum mixes nothing
            slopes = torch.cat(torch.autograd.grad(values.sum(), pushes, retain_graph=more)).cpu().double()
            table = torch.zeros(*values.shape, len(self.parts), dtype=torch.float64)
            found.append(table.index_put((prompt, policy), slopes, accumulate=True))
        return found[0], found[1]

    @contextlib.contextmanager
    def _pushed(self, push: Callable[[], Float[Tensor, "row part"]], t: float) -> Iterator[None]:
        fired = dict.fromkeys(self.owners, 0)

        def hook_of(where: str, own: Mapping[int, dict[str, str]]) -> Callable[..., Tensor | None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
                if self.moving:
                    return None
                if not isinstance(output, Tensor):
                    raise InputError(f"module {where!r} owns parameters but gives no tensor: no slope can be taken")
                fired[where] += 1
                self.moving = True
                try:
                    with torch.no_grad():
                        moves = self._moves(where, module, args, kwargs, output, t)
                finally:
                    self.moving = False
                pushed = push()
                if output.ndim == 2 and len(output) != len(pushed) and len(output) % len(pushed) == 0:
                    # rows and positions in one axis, as in OPT's MLP
                    pushed = pushed.repeat_interleave(len(output) // len(pushed), 0)
                for k, move in moves.items():
                    output = output + pushed[:, k].view(-1, *[1] * (output.ndim - 1)) * move
                return output

            return hook

        with contextlib.ExitStack() as stack:
            for where, own in self.owners.items():
                module = self.model.get_submodule(where)
                handle = module.register_forward_hook(hook_of(where, own), with_kwargs=True)
                stack.callback(handle.remove)
            yield
        for where, times in fired.items():
            if not times:
                raise RunError(f"module {where!r} was never called, so that its parameters have no slope")

    def _moves(
        self, where: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, t: float
    ) -> dict[int, Tensor]:
        """Part -> how the module's output moves with its own weights of that part, its input staying as it is."""

        def call(weights: dict[str, Tensor]) -> Tensor:
            return functional_call(module, weights, args, kwargs)

        own = dict(module.named_parameters(recurse=False))

        def nothing(but: Iterable[str] = ()) -> dict[str, Tensor]:
            return {local: torch.zeros_like(value) for local, value in own.items() if local not in but}

        deltas = {
            k: {local: self.after[name] - self.before[name] for local, name in names.items()}
            for k, names in self.owners[where].items()
        }
        if where not in self.offset:
            offset = call(nothing())
            here = {local: self._weight(name, t) for local, name in self.own[where].items()}
            ahead = here | {local: here[local] + value for delta in deltas.values() for local, value in delta.items()}
            moved = sum((call(nothing(delta) | delta) - offset for delta in deltas.values()), torch.zeros_like(output))
            if not torch.allclose(call(ahead), output + moved, rtol=1e-3, atol=1e-3 * float(output.abs().max())):
                rounded = torch.finfo(output.dtype).bits < 32
                why = f"; {output.dtype} may round too much: give --dtype float32" if rounded else ""
                raise InputError(f"module {where!r} is not affine in its own parameters: no slope can be taken{why}")
            self.offset[where] = bool(offset.any())  # of projections and most norms there is none
        offset = call(nothing()) if self.offset[where] else 0.0
        return {k: call(nothing(delta) | delta) - offset for k, delta in deltas.items()}


def _own(model: nn.Module) -> dict[str, dict[str, str]]:
    """Module -> its own parameters, by their names in the module, and their names in the model.

    A tied parameter has several modules, and one name in the model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {
        where: {local: names[id(parameter)] for local, parameter in module.named_parameters(recurse=False)}
        for where, module in model.named_modules()
    }
    return {where: named for where, named in own.items() if named}
