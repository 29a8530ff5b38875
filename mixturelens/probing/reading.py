"""What one network has at every position that probes ask about, and how likely each announcement is to it.

Every prompt goes through the network once, and announcements behind it. Of activations, those at the positions are
kept and no others: in memory, or on disk, a file for each batch, of which no more is read than is asked for.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mixturelens.hooks.kept import cache_of, forward, keys_of
from mixturelens.hooks.lens import Edit, Lens
from mixturelens.probing.prompts import Group, ProbePrompts
from mixturelens.spelling import Ids
from mixturelens.types import Component, Site

BATCH_TOKENS = 2048
"""Tokens of one forward: larger batches fall out of the cache and are slower on a CPU."""
BEHIND = 32
"""Announcements that are read together: each takes a copy of its prompt's keys and values."""

Key = tuple[int, Component]


@dataclass
class Reading:
    """Activations at the positions of every row of every group, in parts: one for each batch of prompts.

    A part is [row, position, numbers], all components behind each other: one piece of memory, that is there before the
    batch is run and not scattered over what running it leaves behind.
    """

    places: Mapping[Key, slice]
    """Where each component's numbers are."""
    heads: int
    """That z is divided into."""
    folder: Path | None = None
    """Where parts are kept; in memory, if nowhere."""
    logs: dict[tuple[Ids, Ids], float] = field(default_factory=dict)
    """(prompt, announcement) -> log-probability that a completion begins so."""
    _parts: list[tuple[Group, list[int], Tensor | Path]] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Numbers of the widest component."""
        return max(place.stop - place.start for place in self.places.values())

    def add(self, group: Group, rows: list[int], values: Float[Tensor, "row position numbers"]) -> None:
        """Store activations of some rows of a group, by number."""
        part: Tensor | Path = values
        if self.folder is not None:
            from safetensors.torch import save_file

            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f"part-{len(self._parts):05}.safetensors"
            save_file({"values": values}, part)
        self._parts.append((group, rows, part))

    def at(
        self, group: Group, positions: Sequence[str | int | None], sites: Sequence[Site]
    ) -> Float[Tensor, "site row feature"]:
        """Activations of a group at some sites of one shape; `positions` are the group's, in order."""
        total = 1 + max(row for of, rows, _ in self._parts if of == group for row in rows)
        first = self._place(sites[0])
        found: Tensor | None = None
        for of, rows, part in self._parts:
            if of != group:
                continue
            with contextlib.ExitStack() as stack:
                values: Any = part
                if isinstance(part, Path):
                    from safetensors import safe_open

                    values = stack.enter_context(safe_open(part, framework="pt")).get_slice("values")
                for n, site in enumerate(sites):
                    value = values[:, positions.index(site.position), self._place(site)]
                    if found is None:
                        found = value.new_empty(len(sites), total, first.stop - first.start)
                    found[n, rows] = value  # pyright: ignore[reportOptionalSubscript]
        assert found is not None
        return found

    def _place(self, site: Site) -> slice:
        place = self.places[site.layer, site.component]
        if site.head is None:
            return place
        each = (place.stop - place.start) // self.heads
        return slice(place.start + site.head * each, place.start + (site.head + 1) * each)


def read(
    lens: Lens,
    prompts: ProbePrompts,
    keys: Sequence[Key],
    announcements: Sequence[tuple[Ids, Ids]] = (),
    folder: Path | None = None,
) -> Reading:
    """Read all rows of all groups at their positions; `announcements` are (prompt, what may stand behind it)."""
    sizes = [lens.heads * lens.d_head if component == "z" else lens.d_model for _, component in keys]
    ends = list(itertools.accumulate(sizes))
    places = {key: slice(end - size, end) for key, end, size in zip(keys, ends, sizes, strict=True)}
    result = Reading(places, lens.heads, folder)
    inside: dict[Ids, list[tuple[Group, int]]] = {}
    behind: dict[Ids, dict[Ids, list[int]]] = {}
    for group, rows in prompts.rows.items():
        for number, row in enumerate(rows):
            inside.setdefault(row.ids, [])
            if group == "placed":
                behind.setdefault(row.ids, {}).setdefault(row.run[len(row.ids) :], []).append(number)
            else:
                inside[row.ids].append((group, number))
    for prompt, announced in announcements:
        behind.setdefault(prompt, {}).setdefault(announced, [])
    by_length: dict[int, list[Ids]] = {}
    for prompt in inside:
        by_length.setdefault(len(prompt), []).append(prompt)
    for length, some in sorted(by_length.items()):
        step = max(1, BATCH_TOKENS // length)
        for start in range(0, len(some), step):
            _read_batch(lens, prompts, some[start : start + step], inside, behind, result)
    return result


@torch.no_grad()
def _read_batch(
    lens: Lens,
    prompts: ProbePrompts,
    batch: Sequence[Ids],
    inside: Mapping[Ids, Sequence[tuple[Group, int]]],
    behind: Mapping[Ids, Mapping[Ids, Sequence[int]]],
    result: Reading,
) -> None:
    """Prompts of one length, and then what stands behind them."""
    groups: dict[Group, list[tuple[int, int]]] = {}
    for number, prompt in enumerate(batch):
        for group, row in inside[prompt]:
            groups.setdefault(group, []).append((row, number))
    noted, edits = _noting(lens, result.places, prompts, groups, 0)
    output = forward(lens, torch.tensor(batch, device=lens.device), None, edits)
    _add(result, groups, noted)
    kept = keys_of(output)
    first = output.logits[:, -1].double().log_softmax(-1)
    jobs: dict[int, list[tuple[int, Ids]]] = {}
    for number, prompt in enumerate(batch):
        for announced in behind.get(prompt, {}):
            jobs.setdefault(len(announced), []).append((number, announced))
    for width, every in jobs.items():
        for start in range(0, len(every), BEHIND):
            part = every[start : start + BEHIND]
            owned = [(row, i) for i, (n, announced) in enumerate(part) for row in behind[batch[n]][announced]]
            noted, edits = _noting(lens, result.places, prompts, {"placed": owned} if owned else {}, len(batch[0]))
            ids = torch.tensor([announced for _, announced in part], device=lens.device)
            logits = forward(lens, ids, cache_of([kept[n] for n, _ in part]), edits, 0 if width > 1 else 1).logits
            _add(result, {"placed": owned} if owned else {}, noted)
            steps = [first[[n for n, _ in part]]]
            steps += [logits[:, i].double().log_softmax(-1) for i in range(width - 1)]
            logs = sum(step.gather(1, ids[:, i : i + 1])[:, 0] for i, step in enumerate(steps))
            for (n, announced), log in zip(part, torch.as_tensor(logs).tolist(), strict=True):
                result.logs[batch[n], announced] = log


_Noted = dict[Group, Tensor]


def _noting(
    lens: Lens,
    keys: Mapping[Key, slice],
    prompts: ProbePrompts,
    groups: Mapping[Group, Sequence[tuple[int, int]]],
    before: int,
) -> tuple[_Noted, list[tuple[Any, Edit]]]:
    """Hooks that note activations of (row, its number in the batch), at tokens that are counted from `before` on."""
    numbers = max((place.stop for place in keys.values()), default=0)
    noted: _Noted = {}
    places: dict[Group, tuple[Tensor, Tensor]] = {}
    for group, owned in groups.items():
        positions = prompts.positions[group]
        if positions:
            at = [[prompts.rows[group][row].at[p] - before for p in positions] for row, _ in owned]
            noted[group] = torch.empty(len(owned), len(positions), numbers, device=lens.device)
            rows = torch.tensor([number for _, number in owned], device=lens.device)[:, None]
            places[group] = rows, torch.tensor(at, device=lens.device)

    def noter(key: Key) -> Edit:
        def note(activation: Tensor) -> None:
            for group, (rows, columns) in places.items():
                noted[group][..., keys[key]] = rearrange(
                    activation[rows, columns], "row position ... -> row position (...)"
                )

        return note

    return noted, [(lens.point(*key), noter(key)) for key in keys] if noted else []


def _add(result: Reading, groups: Mapping[Group, Sequence[tuple[int, int]]], noted: _Noted) -> None:
    for group, values in noted.items():
        result.add(group, [row for row, _ in groups[group]], values)
