"""Weights of R in S, component by component: what suffices, what is needed, and who shares in the change."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import comb, factorial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixturelens.grafting.cells import Cells
from mixturelens.grafting.components import State
from mixturelens.grafting.effects import Judge
from mixturelens.grafting.noise import noised
from mixturelens.grafting.readings import Readings, read, read_weights, readings_of
from mixturelens.grafting.record import Effects, Factorial, Graft, Null
from mixturelens.grafting.starts import Starts
from mixturelens.records import new_folder
from mixturelens.unfinished import NOTHING_KEPT, Unfinished

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENOUGH = 0.9
"""Share of a change that a set of components must carry to be its carrier."""
NOISE = 8
"""Random changes of the selector's parameters that its graft is compared with."""
NULLS = 2
"""Random changes of all of R's parameters that R is compared with."""
FEW = 16
"""Names, at most, among which a set is looked for one by one."""
SETS = 70
"""Sets of components of one size, at most, that are all tried."""
BEHIND = ("final_norm", "unembed")
"""Components behind the last layer."""
PLAYERS = 8
"""Components, at most, of exact Shapley shares: every set of them is tried."""

Names = Iterable[str]


@contextlib.contextmanager
def written(model: nn.Module, weights: State) -> Iterator[None]:
    """The model with other tensors as some of its parameters, for the length of a block. Tied weights stay tied.

    Nothing is copied: the parameters hold the tensors given (of R, say), and then their own ones again.
    """
    own: dict[str, Tensor] = {}
    try:
        for name, values in weights.items():
            parameter = model.get_parameter(name)
            if values.shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(parameter.shape)}, not {tuple(values.shape)}")
            own[name] = parameter.data
            parameter.data = values.to(parameter)
        yield
    finally:
        for name, values in own.items():
            model.get_parameter(name).data = values


def save_with(model: PreTrainedModel, weights: State, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The model with other values in some parameters as a plain checkpoint folder, which `from_pretrained` loads."""
    with written(model, weights), new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@dataclass(frozen=True)
class WorkingModel:
    """One working model that holds S, R's weights beside it, and what every graft that was tried reads.

    No set of components is ever run twice.
    """

    model: nn.Module
    before: State
    after: State
    components: Mapping[str, tuple[str, ...]]
    """Those that changed, in the order of the network."""
    cells: Cells
    pieces: Mapping[str, tuple[str, ...]] | None = None
    """Groups of components that stay together from here on, by name: all components are in one. None: each alone."""
    starts: Starts | None = None
    parts: Unfinished = NOTHING_KEPT
    """Where readings are kept until the record is whole."""
    _readings: dict[frozenset[str], Readings] = field(default_factory=dict)
    _weights: dict[frozenset[str], np.ndarray] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is put together: pieces, where there are any; else components."""
        return tuple(self.components if self.pieces is None else self.pieces)

    def on(self, cells: Cells, before: Readings, after: Readings, starts: Starts | None = None) -> WorkingModel:
        """The same bench for other prompts, on which S and R are known already."""
        known = {frozenset(): before, self.key(self.names): after}
        return replace(self, cells=cells, starts=starts, _readings=known, _weights={})

    def key(self, names: Names) -> frozenset[str]:
        """The components that these names (of components or pieces) stand for."""
        return frozenset(c for name in names for c in ((self.pieces or {}).get(name) or (name,)))

    def weights_of(self, components: Names) -> dict[str, Tensor]:
        """R's tensors of these components."""
        key = self.key(components)
        return {name: self.after[name] for each in self.components if each in key for name in self.components[each]}

    def readings(self, components: Names) -> Readings:
        """What S with these components taken from R reads on every prompt; no set is run twice."""
        key = self.key(components)
        if key not in self._readings:
            counts = {"before": self._depth(key), "after": self._depth(frozenset(self.components) - key)}
            side = max(counts, key=lambda side: counts[side])
            changed = functools.partial(written, self.model, self.weights_of(key))
            self._readings[key] = self._kept(",".join(sorted(key)), lambda: self._read(changed(), side, counts[side]))
        return self._readings[key]

    def log_c(self, components: Names) -> Float[np.ndarray, "prompt policy"]:
        """Log-weights of the policies alone in S with these components taken from R: much cheaper than `readings`,
        unless these begin behind layers that are known (`starts`).
        """
        key = self.key(components)
        if key in self._readings or self.starts is not None:
            return self.readings(key).log_c.cpu().numpy()
        if key not in self._weights:
            name = f"{self.cells.digest} weights {','.join(sorted(key))}"
            self._weights[key] = self.parts.arrays(name, lambda: {"log_c": self._read_weights(key)})["log_c"]
        return self._weights[key]

    def log_p(self, components: Names) -> Float[np.ndarray, "prompt policy"]:
        """Log-probability of the usual completions in S with these components taken from R."""
        return self.readings(components).log_p.cpu().numpy()

    def _read_weights(self, key: frozenset[str]) -> Float[np.ndarray, "prompt policy"]:
        with written(self.model, self.weights_of(key)), torch.inference_mode():
            return read_weights(self.model, self.cells).cpu().numpy()

    def _kept(self, name: str, work: Callable[[], Readings]) -> Readings:
        found = self.parts.arrays(f"{self.cells.digest} {name}", lambda: {"both": work().array})
        return readings_of(found["both"], self.cells)

    def _read(self, changed: AbstractContextManager[None], side: str, count: int) -> Readings:
        """Of the working model while it is changed; its first `count` layers give what they give in a side."""
        first = self.starts.behind(side, count) if self.starts is not None and count else contextlib.nullcontext()
        with changed, first as tell, torch.no_grad():
            return read(self.model, self.cells, told=tell)

    def _depth(self, components: frozenset[str]) -> int:
        """Layers before the first of some components; 0 where there is nothing to start from."""
        if self.starts is None:
            return 0
        count = len(self.starts.layers)
        layers = (count if c in BEHIND else int(c[1:].split(".")[0]) if "." in c else 0 for c in components)
        return min(layers, default=count)

    def begin(self) -> None:
        """Keep what the layers of S and of R give, so that grafts can start from it."""
        if self.starts is None:
            return
        for side, weights in (("before", {}), ("after", self.weights_of(self.names))):
            with written(self.model, weights), self.starts.kept(side) as tell, torch.no_grad():
                read(self.model, self.cells, told=tell)

    def rest(self, components: Names) -> tuple[str, ...]:
        """All `names` but these: R without `components` is S with the rest."""
        gone = self.key(components)
        return tuple(name for name in self.names if not self.key([name]) <= gone)

    def noisy(self, components: Names, seed: int) -> Readings:
        """What S reads with noise of the size of R's change, tensor by tensor, in these components' parameters."""
        key = self.key(components)
        changed = functools.partial(noised, self.model, self.weights_of(key), seed)
        name = f"noise {seed} {','.join(sorted(key))}"
        return self._kept(name, lambda: self._read(changed(), "before", self._depth(key)))


@dataclass(frozen=True)
class GraftTrial:
    """Grafts and the questions that judge them."""

    bench: WorkingModel
    judge: Judge

    def effects(self, components: Names) -> Effects:
        """What S with these components from R does that S does not, with intervals over questions."""
        return self.judge.effects(self.bench.readings(components))

    def choice_share(self, components: Names) -> float:
        """The share of R's change of the choice of policy that these components carry in S."""
        return self.judge.choice_share(self.bench.log_c(components))

    def specialist_share(self, components: Names) -> float:
        """The share of R's change of what policies do that these components carry in S."""
        return self.judge.specialist_share(self.bench.log_p(components))


def halves(bench: WorkingModel, judge: Judge) -> tuple[GraftTrial, GraftTrial]:
    """One half of the questions to choose on, and the other to judge; of one question alone, twice the whole."""
    if len(judge.grid.index) < 2:
        return GraftTrial(bench, judge), GraftTrial(bench, judge)
    return GraftTrial(bench, judge.half(0)), GraftTrial(bench, judge.half(1))


# --- groups -----------------------------------------------------------------------------------------------------------


def groups(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Groups of the changed components by name (`attention`, `MLPs`, `layer 0`, ...): those of more than one component.

    >>> groups(["embed", "L0.attn", "L0.mlp", "L1.attn"])
    {'attention': ('L0.attn', 'L1.attn'), 'layer 0': ('L0.attn', 'L0.mlp')}
    """
    layers = list(dict.fromkeys(int(name[1:].split(".")[0]) for name in names if "." in name))
    tests: dict[str, Callable[[str], bool]] = {
        "embeddings": lambda name: name in ("embed", "pos_embed"),
        "attention": lambda name: name.endswith(".attn"),
        "MLPs": lambda name: name.endswith(".mlp"),
        "norms": lambda name: name.endswith("norms") or name == "final_norm",
        "unembedding": lambda name: name in ("final_norm", "unembed"),
        **{f"layer {layer}": lambda name, layer=layer: name.startswith(f"L{layer}.") for layer in layers},
    }
    found = {group: tuple(name for name in names if test(name)) for group, test in tests.items()}
    return {group: members for group, members in found.items() if len(members) > 1}


def players(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Who shares in the change: every component; norms with what reads them, if that keeps their number to PLAYERS.

    >>> list(players(["embed", "L0.attn"]))
    ['embed', 'L0.attn']
    >>> many = [*(f"L{i}.{part}" for i in range(3) for part in ("attn", "mlp", "norms")), "final_norm", "unembed"]
    >>> players(many)["L0.mlp"], players(many)["unembed"], len(players(many))
    (('L0.mlp', 'L0.norms'), ('unembed', 'final_norm'), 7)
    """
    if len(names) <= PLAYERS:
        return {name: (name,) for name in names}
    found: dict[str, list[str]] = {name: [name] for name in names}
    for name in names:
        home = name.replace(".norms", ".mlp") if name.endswith(".norms") else "unembed" if name == "final_norm" else ""
        if home in found:
            found[home] += found.pop(name)
    return {name: tuple(members) for name, members in found.items()}


# --- shares -----------------------------------------------------------------------------------------------------------


def shapley(
    players: Mapping[str, tuple[str, ...]], value: Callable[[Names], Float[np.ndarray, " prompt"]]
) -> dict[str, Float[np.ndarray, " prompt"]]:
    """Shapley values (1953): each player's mean contribution over all orders in which they could join. Exact.

    `value` gives a set of components a number on every prompt. Values sum to value(all) - value(none).

    >>> both = lambda names: np.array([float({"x", "y"} <= set(names))])
    >>> shapley({"x": ("x",), "y": ("y",)}, both)
    {'x': array([0.5]), 'y': array([0.5])}
    """
    number = len(players)
    found: dict[str, np.ndarray] = {}
    for name in players:
        others = [other for other in players if other != name]
        total: np.ndarray | float = 0.0
        for size in range(number):
            weight = factorial(size) * factorial(number - size - 1) / factorial(number)
            for some in itertools.combinations(others, size):
                joined = [each for other in some for each in players[other]]
                total = total + weight * (value([*joined, *players[name]]) - value(joined))
        found[name] = np.asarray(total)
    return found


def fewest(names: Sequence[str], share: Callable[[Names], float]) -> list[tuple[str, ...]]:
    """The smallest sets of components that carry ENOUGH of a change, the one that carries most first.

    Greedy search says how many it takes: the best is added until it is enough, then what turns out not to be needed is
    dropped. Of sets of that size all are tried, where they are not too many (SETS); else the greedy one stands alone.
    Of more than FEW names the best come first by what each does alone, and only how many of them is searched for.

    >>> fewest(["x", "y", "z"], lambda some: len({"x", "z"} & set(some)) / 2)
    [('x', 'z')]
    """
    if len(names) > FEW:
        return [_best_alone(names, share)]
    chosen: list[str] = []
    while len(chosen) < len(names) and not share(chosen) >= ENOUGH:
        rest = [name for name in names if name not in chosen]
        chosen.append(max(rest, key=lambda name: share([*chosen, name])))
    for name in list(chosen):
        without = [each for each in chosen if each != name]
        if share(chosen) >= ENOUGH and without and share(without) >= ENOUGH:
            chosen = without
    greedy = tuple(name for name in names if name in chosen)
    if comb(len(names), len(greedy)) > SETS:
        return [greedy]
    carried = {some: share(some) for some in itertools.combinations(names, len(greedy))}
    found = [some for some, value in carried.items() if value >= ENOUGH]
    return sorted(found, key=lambda some: -carried[some]) or [greedy]


def _best_alone(names: Sequence[str], share: Callable[[Names], float]) -> tuple[str, ...]:
    order = sorted(names, key=lambda name: -share([name]))
    number = bisect.bisect_left(range(1, len(names)), True, key=lambda k: share(order[:k]) >= ENOUGH) + 1
    return tuple(name for name in names if name in order[:number])


def two_by_two(choosing: GraftTrial, judging: GraftTrial, seed: int = 0, noise: GraftTrial | None = None) -> Factorial:
    """{selector} x {rest}: the selector is chosen on some questions, and all four judged on others.

    It is chosen by the weight of the policy and not by log-odds, which go on growing where the choice is made. Random
    weights are judged like the rest, or by `noise`.
    """
    bench, noise = judging.bench, noise or judging
    selector, *also = fewest(bench.names, choosing.choice_share)
    return Factorial(
        selector=selector,
        also=tuple(also),
        enough=judging.choice_share(selector) >= ENOUGH,
        questions=len(judging.judge.grid.index),
        selector_only=judging.effects(selector),
        rest_only=judging.effects(bench.rest(selector)),
        both=judging.effects(bench.names),
        noise=tuple(noise.judge.effects(noise.bench.noisy(selector, seed + k)) for k in range(NOISE)),
    )


def specialist_part(choosing: GraftTrial, judging: GraftTrial) -> Graft:
    """S with the fewest components that carry R's change of what policies do, chosen and judged as in `two_by_two`."""
    chosen, *_ = fewest(judging.bench.names, choosing.specialist_share)
    return Graft(components=chosen, effects=judging.effects(chosen))


def needed(choosing: GraftTrial, judging: GraftTrial) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], bool]:
    """The fewest components of R without which its choice is S's again, by some questions; other sets of as many that
    do as well; and whether that holds on the others."""

    def lost(some: Names, trial: GraftTrial) -> float:
        return 1 - trial.choice_share(trial.bench.rest(some))

    chosen, *also = fewest(judging.bench.names, lambda some: lost(some, choosing))
    return chosen, tuple(also), lost(chosen, judging) >= ENOUGH


def null(trial: GraftTrial, seed: int = 0) -> Null:
    """How far S moves with noise of the size of R's change, tensor by tensor: means of NULLS draws."""
    found = [trial.judge.effects(trial.bench.noisy(trial.bench.names, seed + k)) for k in range(NULLS)]

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(sum(known) / len(known), 10) if known else None

    return Null(chosen=mean(each.chosen.value for each in found), done=mean(each.done.value for each in found))
