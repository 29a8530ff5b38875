"""What one network has at every position that probes ask about, and how likely each announcement is to it.

Every prompt goes through the network once, and announcements behind it. Of activations, those at the positions are
kept and no others: in memory, or on disk, a file for each batch, of which no more is read than is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixturelens.hooks.kept import forward, keys_of
from mixturelens.hooks.lens import Edit, Lens
from mixturelens.probing.prompts import Group, Prompts
from mixturelens.spelling import Ids
from mixturelens.types import Component, Site

BATCH_TOKENS = 2048
"""Tokens of one forward: larger batches fall out of the cache and are slower on a CPU."""
BEHIND = 32
"""Announcements that are read together: each takes a copy of its prompt's keys and values."""

Key = tuple[int, Component]


@dataclass
class Reading:
    """Activations at the positions of every row of every group, in parts: one for each batch of prompts."""

    folder: Path | None = None
    """Where parts are kept; in memory, if nowhere."""
    logs: dict[tuple[Ids, Ids], float] = field(default_factory=dict)
    """(prompt, announcement) -> log-probability that a completion begins so."""
    width: int = 0
    """Numbers of the widest site."""
    _parts: list[tuple[Group, list[int], dict[str, Tensor] | Path]] = field(default_factory=list)

    def add(self, group: Group, rows: list[int], values: Mapping[Key, Float[Tensor, "row position *d"]]) -> None:
        """Rows of a group, by number."""
        named = {_name(key): value.contiguous() for key, value in values.items()}
        self.width = max([self.width, *(value.shape[-1] for value in named.values())])
        part: dict[str, Tensor] | Path = named
        if self.folder is not None:
            from safetensors.torch import save_file

            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f"part-{len(self._parts):05}.safetensors"
            save_file(named, part)
        self._parts.append((group, rows, part))

    def at(
        self, group: Group, positions: Sequence[str | int | None], sites: Sequence[Site]
    ) -> Float[Tensor, "site row feature"]:
        """Activations at some sites of one shape, whose positions are numbered as in the group."""
        found: Tensor | None = None
        total = 1 + max(row for of, rows, _ in self._parts if of == group for row in rows)
        for of, rows, part in self._parts:
            if of != group:
                continue
            values: dict[str, Tensor] = {}
            for n, site in enumerate(sites):
                name = _name((site.layer, site.component))
                if name not in values:
                    values = {name: _tensor(part, name)}
                value = values[name][:, positions.index(site.position)]
                value = value if site.head is None else value[:, site.head]
                if found is None:
                    found = value.new_empty(len(sites), total, value.shape[-1])
                found[n, rows] = value
        assert found is not None
        return found


def _name(key: Key) -> str:
    return f"{key[0]}.{key[1]}"


def _tensor(part: dict[str, Tensor] | Path, name: str) -> Tensor:
    if isinstance(part, dict):
        return part[name]
    from safetensors import safe_open

    with safe_open(part, framework="pt") as opened:
        return opened.get_tensor(name)


def read(
    lens: Lens,
    prompts: Prompts,
    keys: Sequence[Key],
    announcements: Sequence[tuple[Ids, Ids]] = (),
    folder: Path | None = None,
) -> Reading:
    """Read all rows of all groups at their positions; `announcements` are (prompt, what may stand behind it)."""
    result = Reading(folder)
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
            _read_batch(lens, prompts, keys, some[start : start + step], inside, behind, result)
    return result


@torch.no_grad()
def _read_batch(
    lens: Lens,
    prompts: Prompts,
    keys: Sequence[Key],
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
    noted, edits = _noting(lens, keys, prompts, groups, 0)
    output = forward(lens, torch.tensor(batch, device=lens.device), (), edits)
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
            noted, edits = _noting(lens, keys, prompts, {"placed": owned} if owned else {}, len(batch[0]))
            ids = torch.tensor([announced for _, announced in part], device=lens.device)
            logits = forward(lens, ids, [kept[n] for n, _ in part], edits, 0 if width > 1 else 1).logits
            _add(result, {"placed": owned} if owned else {}, noted)
            steps = [first[[n for n, _ in part]]]
            steps += [logits[:, i].double().log_softmax(-1) for i in range(width - 1)]
            logs = sum(step.gather(1, ids[:, i : i + 1])[:, 0] for i, step in enumerate(steps))
            for (n, announced), log in zip(part, torch.as_tensor(logs).tolist(), strict=True):
                result.logs[batch[n], announced] = log


_Noted = dict[Group, dict[Key, Tensor]]


def _noting(
    lens: Lens, keys: Sequence[Key], prompts: Prompts, groups: Mapping[Group, Sequence[tuple[int, int]]], before: int
) -> tuple[_Noted, list[tuple[Any, Edit]]]:
    """Hooks that note activations of (row, its number in the batch), at tokens that are counted from `before` on."""
    noted: _Noted = {group: {} for group in groups if prompts.positions[group]}
    places: dict[Group, tuple[Tensor, Tensor]] = {}
    for group in noted:
        rows = [number for _, number in groups[group]]
        at = [[prompts.rows[group][row].at[p] - before for p in prompts.positions[group]] for row, _ in groups[group]]
        places[group] = (
            torch.tensor(rows, device=lens.device)[:, None],
            torch.tensor(at, device=lens.device),
        )

    def noter(key: Key) -> Edit:
        def note(activation: Tensor) -> None:
            for group, (rows, columns) in places.items():
                value = activation[rows, columns]
                # no solver takes half precision
                noted[group][key] = value.float() if value.element_size() < 4 else value

        return note

    return noted, [(lens.point(*key), noter(key)) for key in keys] if noted else []


def _add(result: Reading, groups: Mapping[Group, Sequence[tuple[int, int]]], noted: _Noted) -> None:
    for group, values in noted.items():
        result.add(group, [row for row, _ in groups[group]], values)
