"""Weights of R in S, component by component: what suffices, what is needed, and who shares in the change."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb, factorial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixturelens.grafting.components import State
from mixturelens.grafting.effects import Judge
from mixturelens.grafting.readings import Cells, Readings, read, read_weights
from mixturelens.grafting.record import Effects, Factorial, Graft
from mixturelens.records import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENOUGH = 0.9
"""Share of a change that a set of components must carry to be its carrier."""
NOISE = 8
"""Random changes of the selector's parameters that its graft is compared with."""
SETS = 70
"""Sets of components of one size, at most, that are all tried."""
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
class Bench:
    """One working model that holds S, R's weights beside it, and what every graft that was tried reads.

    No set of components is ever run twice.
    """

    model: nn.Module
    before: State
    after: State
    components: Mapping[str, tuple[str, ...]]
    """Those that changed, in the order of the network."""
    cells: Cells
    _readings: dict[frozenset[str], Readings] = field(default_factory=dict)
    _weights: dict[frozenset[str], np.ndarray] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.components)

    def weights_of(self, components: Names) -> dict[str, Tensor]:
        """R's tensors of these components."""
        return {name: self.after[name] for each in components for name in self.components[each]}

    def readings(self, components: Names) -> Readings:
        """Of S with these components taken from R."""
        key = frozenset(components)
        if key not in self._readings:
            with written(self.model, self.weights_of(key)):
                self._readings[key] = self.read()
        return self._readings[key]

    def log_c(self, components: Names) -> Float[np.ndarray, "prompt policy"]:
        """Log-weights alone of S with these components taken from R: much cheaper."""
        key = frozenset(components)
        if key in self._readings:
            return self._readings[key].log_c.cpu().numpy()
        if key not in self._weights:
            with written(self.model, self.weights_of(key)), torch.inference_mode():
                self._weights[key] = read_weights(self.model, self.cells).cpu().numpy()
        return self._weights[key]

    def log_p(self, components: Names) -> Float[np.ndarray, "prompt policy"]:
        return self.readings(components).log_p.cpu().numpy()

    def read(self) -> Readings:
        """Of the working model as it is now."""
        with torch.no_grad():
            return read(self.model, self.cells)

    def rest(self, components: Names) -> tuple[str, ...]:
        """All other changed components: R without `components` is S with the rest."""
        gone = set(components)
        return tuple(name for name in self.names if name not in gone)

    def noisy(self, components: Names, seed: int) -> Readings:
        """Of S with a random change of R's size, tensor by tensor, in these components' parameters."""
        generator = torch.Generator().manual_seed(seed)
        changed = {}
        for name, values in self.weights_of(components).items():
            old = self.before[name]
            noise = torch.randn(old.shape, generator=generator, dtype=torch.float64)
            noise *= float((values.double() - old.double()).norm() / noise.norm())
            changed[name] = old + noise.to(old.device, old.dtype)
        with written(self.model, changed):
            return self.read()


# --- groups -----------------------------------------------------------------------------------------------------------


def groups(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Named groups of the changed components, those of more than one.

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

    >>> fewest(["x", "y", "z"], lambda some: len({"x", "z"} & set(some)) / 2)
    [('x', 'z')]
    """
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


def two_by_two(bench: Bench, judge: Judge, seed: int = 0) -> Factorial:
    """{selector} x {rest}: the selector is chosen on one half of the questions, and all four judged on the other.

    It is chosen by the weight of the policy and not by log-odds, which go on growing where the choice is made.
    """
    choosing, judging = judge.half(0), judge.half(1)
    selector, *also = fewest(bench.names, lambda some: choosing.choice_share(bench.log_c(some)))

    def seen(components: Names) -> Effects:
        return judging.effects(bench.readings(components))

    return Factorial(
        selector=selector,
        also=tuple(also),
        enough=judging.choice_share(bench.log_c(selector)) >= ENOUGH,
        questions=len(judging.grid.index),
        selector_only=seen(selector),
        rest_only=seen(bench.rest(selector)),
        both=seen(bench.names),
        noise=tuple(judging.effects(bench.noisy(selector, seed + k)) for k in range(NOISE)),
    )


def specialist_part(bench: Bench, judge: Judge) -> Graft:
    """S with the fewest components that carry R's change of what policies do; on halves, as in `two_by_two`."""
    choosing, judging = judge.half(0), judge.half(1)
    chosen, *_ = fewest(bench.names, lambda some: choosing.specialist_share(bench.log_p(some)))
    return Graft(components=chosen, effects=judging.effects(bench.readings(chosen)))


def needed(bench: Bench, judge: Judge) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], bool]:
    """The fewest components of R without which its choice is S's again, by one half of the questions; other sets of as
    many that do as well; and whether that holds on the other half."""

    def lost(some: Names, half: Judge) -> float:
        return 1 - half.choice_share(bench.log_c(bench.rest(some)))

    choosing, judging = judge.half(0), judge.half(1)
    chosen, *also = fewest(bench.names, lambda some: lost(some, choosing))
    return chosen, tuple(also), lost(chosen, judging) >= ENOUGH
