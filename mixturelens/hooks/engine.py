"""The exact patch engine: what the model says with one site replaced, for many sites at once.

A patch at layer l and positions from p on leaves everything before it as it was. So the unpatched run is kept, and of
each patched run only the layers from l and the positions from p are computed, with the keys and values of earlier
positions taken from the unpatched run; the last layer is computed where the logits are read, and nowhere else. Patches
that start at the same position go through a layer together, those of later layers joining those of earlier ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.hooks.columns import Columns, Spans
from mixturelens.hooks.lens import Edit, Lens, Tokens
from mixturelens.hooks.unpatched import NOTHING, Unpatched, Watched
from mixturelens.types import PER_HEAD, Component, InputError, Site

MEMORY = 192 << 20
"""Bytes that the patched runs in flight may take, unless asked otherwise."""

TOGETHER: tuple[Component, ...] = ("z", "attn_out", "mlp_out")
"""Components of which several sites can be replaced at once."""

Metric = Callable[[Float[Tensor, "part vocabulary"], Int[Tensor, " part"]], Float[Tensor, " part"]]
Source = Mapping[tuple[int, Component], Tensor]


class Engine:
    """Patches into one batch of prompts, the base (corrupt) run.

    >>> engine = Engine(lens, corrupt)                                                    # doctest: +SKIP
    >>> source, _ = lens.capture(clean, [(layer, "z") for layer in range(lens.layers)])   # doctest: +SKIP
    >>> engine.sweep([Site(layer=0, component="z", head=3, position=8)], source, odds)    # doctest: +SKIP
    tensor([[10.9, 10.7, ...]])                                                           [site, row]
    """

    def __init__(
        self,
        lens: Lens,
        base: Tokens,
        spans: Sequence[Spans] | None = None,
        *,
        memory: int = MEMORY,
        watch: Watched = NOTHING,
    ) -> None:
        """Runs the base once. `spans` names positions of each row, counted from the start of its prompt.

        What the base has at `watch` is in `seen` afterwards: a source for other engines. Sites must not begin before
        its first column. `memory` bounds, in bytes, what patching holds at a time.

        Raises RunError if this model's blocks cannot be called alone and give back what the model gives.
        """
        self.lens, self.base, self.memory = lens, base, memory
        self.width = base.ids.shape[1]
        self._columns = Columns(base, spans)
        self._run = Unpatched(lens, base, watch)
        self.logits, self.seen = self._run.logits, self._run.seen

    def sweep(
        self,
        sites: Sequence[Site],
        source: Source,
        metric: Metric,
        progress: Callable[[int, int], None] | None = None,
    ) -> Float[Tensor, "site row"]:
        """`metric` of every row, with each site in turn replaced by what `source` has there.

        `source[layer, component]` is an activation of the whole batch, as `Lens.capture` returns it: of the clean
        prompts, of another checkpoint, zeros, or a mean. Columns before the first that is replaced may be left out.
        `metric(logits, rows)` gets the logits of the last column.
        Raises InputError for a site that does not exist or that the source lacks.
        """
        for site in sites:
            self.lens.check(site)
            if (site.layer, site.component) not in source:
                raise InputError(f"{site}: the source holds no {site.component} of layer {site.layer}")

        def run(some: list[int], columns: tuple[int, ...], part: Int[Tensor, " part"]) -> Tensor:
            return self._together([sites[n] for n in some], columns, part, source)

        return self._swept(sites, run, metric, progress)

    def sweep_groups(
        self,
        groups: Sequence[Sequence[Site]],
        source: Source,
        metric: Metric,
        progress: Callable[[int, int], None] | None = None,
    ) -> Float[Tensor, "group row"]:
        """Like `sweep`, with all sites of each group replaced at once: outputs (of heads, too) at one position.

        Raises InputError for a group of several positions, or with anything but `z`, `attn_out` and `mlp_out`.
        """
        for group in groups:
            for site in group:
                self.lens.check(site)
            if len({site.position for site in group}) != 1 or {s.component for s in group} - set(TOGETHER):
                raise InputError(f"{', '.join(map(str, group))}: only outputs at one position are replaced together")

        def run(some: list[int], columns: tuple[int, ...], part: Int[Tensor, " part"]) -> Tensor:
            return self._grouped([groups[n] for n in some], columns, part, source)

        firsts = [min(group, key=lambda site: site.layer) for group in groups]
        return self._swept(firsts, run, metric, progress)

    def _swept(
        self,
        firsts: Sequence[Site],
        run: Callable[[list[int], tuple[int, ...], Int[Tensor, " part"]], Tensor],
        metric: Metric,
        progress: Callable[[int, int], None] | None,
    ) -> Float[Tensor, "patch row"]:
        """`metric` of every patch and row. `firsts` say where patches begin; `run` gives the stream behind some."""
        device = self.base.ids.device
        result = torch.zeros(len(firsts), len(self.base), device=device)
        done, total = 0, result.numel()
        with torch.inference_mode():
            for columns, rows, numbers in self._places(firsts):
                for part, some in self._parts(columns[0], rows, numbers):
                    values = metric(self._run.logits_of(run(some, columns, part)), part.repeat(len(some)))
                    result[torch.tensor(some, device=device)[:, None], part] = values.view(len(some), -1).float()
                    done += values.numel()
                    if progress:
                        progress(done, total)
        return result

    def logits_with(
        self,
        site: Site,
        values: Float[Tensor, "run column size"],
        rows: Int[Tensor, " row"],
    ) -> Float[Tensor, "run vocabulary"]:
        """Logits of the last column with `values` at one site of these rows; differentiable in `values`.

        `column` counts the tokens of the site's position; `size` is d_model, or d_head at one head (of z, q, k or v),
        or d_mlp for neurons. A row may occur several times, with other values. The weights get no gradient;
        the values get none where the logits do not depend on them.
        Raises InputError for a site that does not exist, or values that do not fit it.

        >>> engine.logits_with(Site(layer=0, component="resid_post", position="cue"), values, rows)   # doctest: +SKIP
        """
        self.lens.check(site)
        per_head = site.component in PER_HEAD
        if site.component == "pattern" or site.neuron is not None or per_head != (site.head is not None):
            raise InputError(f"{site}: values are put at the residual stream, at an output, or at one head")
        if len(values) != len(rows):
            raise InputError(f"{site}: {len(values)} values for {len(rows)} rows")
        runs: dict[tuple[int, ...], list[int]] = {}
        for run, row in enumerate(rows.tolist()):
            runs.setdefault(self._columns.of(site.position, row), []).append(run)
        found: list[Tensor] = []
        with no_gradient_for(self.lens.model):
            for columns, same in runs.items():
                if values.shape[1] != len(columns):
                    raise InputError(f"{site}: {values.shape[1]} tokens given, where a row has {len(columns)}")
                run = torch.tensor(same, device=rows.device)
                heads = (self.lens.heads_of(site.component),) if per_head else ()
                given = values.new_zeros(len(same), self.width, *heads, values.shape[2])
                unit = (site.head,) if per_head else ()
                given[(slice(None), list(columns), *unit)] = values[run]
                source: Source = {(site.layer, site.component): given}
                place = torch.arange(len(same), device=rows.device)
                found.append(self._run.logits_of(self._together([site], columns, rows[run], source, place)))
        order = torch.tensor([run for same in runs.values() for run in same], device=rows.device)
        return torch.cat(found)[order.argsort()]

    def _places(self, sites: Sequence[Site]) -> Iterator[tuple[tuple[int, ...], Int[Tensor, " run"], list[int]]]:
        """(columns, rows, numbers of sites): rows in which these sites lie at these columns; sites by layer."""
        positions: dict[str | int | None, list[int]] = {}
        for number, site in enumerate(sites):
            positions.setdefault(site.position, []).append(number)
        for position, numbers in positions.items():
            numbers.sort(key=lambda number: sites[number].layer)
            rows: dict[tuple[int, ...], list[int]] = {}
            for row in range(len(self.base)):
                rows.setdefault(self._columns.of(position, row), []).append(row)
            for columns, same in rows.items():
                yield columns, torch.tensor(same, device=self.base.ids.device), numbers

    def _parts(
        self, start: int, rows: Int[Tensor, " run"], numbers: list[int]
    ) -> Iterator[tuple[Int[Tensor, " part"], list[int]]]:
        """Rows and sites in parts that fit into memory: all sites of a few rows, rather than a few sites of all."""
        lens, window = self.lens, self.width - start
        per_token = 8 * lens.d_model + 3 * lens.d_mlp + 3 * lens.heads * self.width
        keys = 4 * self.width * lens.kv_heads * lens.d_head
        each = 4 * (window * per_token + keys + 3 * self.logits.shape[1])
        number = max(1, int(self.memory // each))
        some = max(1, number // len(numbers))
        for first in range(0, len(rows), some):
            for begin in range(0, len(numbers), number):
                yield rows[first : first + some], numbers[begin : begin + number]

    def _together(
        self,
        sites: Sequence[Site],
        columns: tuple[int, ...],
        rows: Int[Tensor, " run"],
        source: Source,
        places: Int[Tensor, " run"] | None = None,
    ) -> Float[Tensor, "job 1 d_model"]:
        """The residual stream behind the last layer, at the last column, of every site (by layer) x row.

        `places`: where in the source each run's activations lie, if not at its row.
        """
        places = rows if places is None else places
        hidden: list[Tensor] = []
        running = 0
        for layer in range(sites[0].layer, self.lens.layers):
            if hidden:
                hidden = [self._run.advance(layer, torch.cat(hidden), rows.repeat(running), columns[0])]
            entering = [site for site in sites if site.layer == layer]
            for same in _runs(entering):
                hidden.append(self._enter(same, columns, rows.repeat(len(same)), places.repeat(len(same)), source))
            running += len(entering)
        return torch.cat(hidden)

    def _grouped(
        self, groups: Sequence[Sequence[Site]], columns: tuple[int, ...], rows: Int[Tensor, " run"], source: Source
    ) -> Float[Tensor, "job 1 d_model"]:
        """Like `_together`, of groups in the order of their first layers: later sites of a group join as it passes."""
        start, last = columns[0], self.width - 1
        hidden: Tensor | None = None
        running = 0
        for layer in range(min(site.layer for site in groups[0]), self.lens.layers):
            final = layer == self.lens.layers - 1
            at = [c for c in columns if not final or c == last]
            if hidden is not None:
                own = [[site for site in group if site.layer == layer] for group in groups[:running]]
                inside = [0] if final else [c - start for c in at]
                edits = self._group_edits(own, rows, at, inside, source) if at else []
                hidden = self._run.advance(layer, hidden, rows.repeat(running), start, edits)
            entering = [group for group in groups[running:] if min(site.layer for site in group) == layer]
            if entering:
                own = [[site for site in group if site.layer == layer] for group in entering]
                fresh = self._enter_groups(layer, own, at, rows, source, start, final)
                hidden = fresh if hidden is None else torch.cat([hidden, fresh])
                running += len(entering)
        assert hidden is not None
        return hidden

    def _enter_groups(
        self,
        layer: int,
        groups: Sequence[Sequence[Site]],
        at: list[int],
        rows: Int[Tensor, " run"],
        source: Source,
        start: int,
        final: bool,
    ) -> Float[Tensor, "job window d_model"]:
        """Behind their first layer, what the groups have become; outputs change their own columns alone."""
        every = rows.repeat(len(groups))
        after = self._run.resid[layer + 1][every, -1 if final else start - self.width :]
        if not at:
            return after
        through, inside = self._through(at)
        edits = self._group_edits(groups, rows, at, inside, source)
        unchanged = self._run.unchanged(layer, every, at[-1] + 1)
        changed = self._run.block(
            layer, self._run.resid[layer][every][:, self._from_end(through)], every, through, unchanged, edits
        )[:, inside]
        if final:
            return changed
        after[:, [c - start for c in at]] = changed
        return after

    def _group_edits(
        self,
        groups: Sequence[Sequence[Site]],
        rows: Int[Tensor, " run"],
        columns: Sequence[int],
        inside: Sequence[int],
        source: Source,
    ) -> list[tuple[Any, Edit]]:
        """One edit for each component that some groups replace in this layer: of their own runs alone."""
        device = rows.device
        found: dict[Component, list[tuple[int, Site]]] = {}
        for number, group in enumerate(groups):
            for site in group:
                found.setdefault(site.component, []).append((number, site))
        column, place = (torch.tensor(list(each), device=device) for each in (self._from_end(columns), inside))
        edits = []
        for component, members in found.items():
            run = torch.cat([torch.arange(len(rows), device=device) + n * len(rows) for n, _ in members])[:, None]
            taken = rows.repeat(len(members))[:, None]
            units = [site.head for _, site in members]
            given = source[members[0][1].layer, component].to(self._run.resid[0].dtype)
            at: tuple[Any, ...] = (place,)
            of: tuple[Any, ...] = (column,)
            if component in PER_HEAD:
                unit = torch.tensor(units, device=device).repeat_interleave(len(rows))[:, None]
                at, of = (place, unit), (column, unit)

            def edit(activation: Tensor, run=run, at=at, values=given[(taken, *of)]) -> Tensor:
                activation[(run, *at)] = values
                return activation

            edits.append((self.lens.point(members[0][1].layer, component), edit))
        return edits

    def _enter(
        self,
        sites: Sequence[Site],
        columns: tuple[int, ...],
        rows: Int[Tensor, " run"],
        places: Int[Tensor, " run"],
        source: Source,
    ) -> Float[Tensor, "run window d_model"]:
        """Behind its own layer, what each site's patch has become, from the first column on (or at the last one)."""
        layer, component, start = sites[0].layer, sites[0].component, columns[0]
        final = layer == self.lens.layers - 1
        at = list(columns)
        given = source[layer, component].to(self._run.resid[layer].dtype)
        if component == "resid_pre":
            if final:
                return self._run.at_last(given[places][:, self._from_end(at)], rows, columns)
            hidden = self._run.resid[layer][rows, start - self.width :]
            hidden[:, [c - start for c in at]] = given[places][:, self._from_end(at)]
            return self._run.advance(layer, hidden, rows, start)
        if component in ("k", "v"):
            edit = self._edit(sites, places, at, [c - start for c in at], given)
            hidden = self._run.resid[layer][rows, start - self.width :]
            hidden = self._run.onwards(layer, hidden, rows, start, [edit])  # every query from here on sees it
            return hidden[:, -1:] if final else hidden
        # everything else changes its own columns alone, and in the last layer only the last one is read
        if final:
            at = [c for c in at if c == self.width - 1]
        after = self._run.resid[layer + 1][rows, -1 if final else start - self.width :]
        if not at:
            return after
        if component == "resid_post":
            changed = given[places][:, self._from_end(at)]
        else:
            through, inside = self._through(at)
            edit = self._edit(sites, places, at, inside, given)
            unchanged = self._run.unchanged(layer, rows, at[-1] + 1)
            hidden = self._run.resid[layer][rows][:, self._from_end(through)]
            changed = self._run.block(layer, hidden, rows, through, unchanged, [edit])[:, inside]
        if final:
            return changed
        after[:, [c - start for c in at]] = changed
        return after

    def _from_end(self, columns: Sequence[int]) -> list[int]:
        """Columns as a source counts them: from the end, as it may hold the last ones alone."""
        return [column - self.width for column in columns]

    def _through(self, at: list[int]) -> tuple[list[int], list[int]]:
        """The columns that go through a block so that those at `at` are right, and where among them these lie."""
        through = at if self._run.apart else list(range(at[0], at[-1] + 1))
        return through, [through.index(c) for c in at]

    def _edit(
        self,
        sites: Sequence[Site],
        places: Int[Tensor, " run"],
        columns: Sequence[int],
        inside: Sequence[int],
        given: Tensor,
    ) -> tuple[Any, Edit]:
        """Replaces each site's unit at `columns`, which lie at `inside` of the window, by what is given."""
        device, component = places.device, sites[0].component
        column = torch.tensor(self._from_end(columns), device=device)
        place = torch.tensor(list(inside), device=device)[None]
        run = torch.arange(len(places), device=device)[:, None]
        units = [unit for site in sites if (unit := _unit(site)) is not None]
        unit = (
            torch.tensor(units, device=device).repeat_interleave(len(places) // len(sites))[:, None] if units else None
        )

        def edit(activation: Tensor) -> Tensor:
            # in place: the residual stream between attention and MLP is read twice, by the norm and by the sum
            if component == "pattern":
                keys = activation.shape[-1]
                if unit is None:
                    activation[:, :, place[0]] = given[places][:, :, column, :keys]
                else:
                    activation[run, unit, place] = given[places[:, None], unit, column, :keys]
            elif unit is None:
                activation[run, place] = given[places[:, None], column]
            else:
                activation[run, place, unit] = given[places[:, None], column, unit]
            return activation

        return self.lens.point(sites[0].layer, component), edit


@contextlib.contextmanager
def no_gradient_for(model: torch.nn.Module) -> Iterator[None]:
    """Let the weights take no gradient for the length of a block: gradients then go through activations alone."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _unit(site: Site) -> int | None:
    return site.head if site.component in PER_HEAD else site.neuron


def _runs(sites: Sequence[Site]) -> list[list[Site]]:
    """Neighbours of one component, all with a unit or all without, which one hook can serve."""
    runs: list[list[Site]] = []
    for site in sites:
        kind = (site.component, _unit(site) is None)
        if not runs or kind != (runs[-1][0].component, _unit(runs[-1][0]) is None):
            runs.append([])
        runs[-1].append(site)
    return runs
