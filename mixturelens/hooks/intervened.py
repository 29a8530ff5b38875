"""A model with interventions in place, called like the model itself: behaviour is measured on it as on any other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mixturelens.hooks.edits import Rewrite, clamp_of, edit_of
from mixturelens.hooks.kept import KeptBeginnings, Keys, cache_of, cut, forward, keys_of
from mixturelens.hooks.lens import Edit, Lens
from mixturelens.hooks.placed import PlacedPrompt, check_position
from mixturelens.models import beginnings
from mixturelens.models.beginnings import LONG, keeps
from mixturelens.types import PER_HEAD, Component, InputError, Intervention


class EnoughRead(Exception):
    """Ends a run once all that is wanted of it has been read."""


@dataclass
class _Past:
    """The key-value caches of the run itself and of those it reads from."""

    prompts: list[PlacedPrompt]
    seen: list[int]
    own: Any
    sources: dict[str, tuple[Any, Tensor]] = field(default_factory=dict)
    """cue -> cache, and which of its columns are no padding."""


@dataclass(frozen=True)
class _Call:
    """What a call asks about: for each row its prompt, and the token index of its first column (negative: padding)."""

    prompts: list[PlacedPrompt]
    first: list[int]
    ids: Int[Tensor, "row window"]

    def tokens(self) -> Int[Tensor, "row window"]:
        """Index of each column's token in its row's prompt and completion."""
        first = torch.tensor(self.first, device=self.ids.device)
        return first[:, None] + torch.arange(self.ids.shape[1], device=self.ids.device)


class Intervened:
    """The model of a lens with interventions in place, for prompts that are known beforehand.

    Positions: the spans of the suite, `last` (of the prompt), `completion` (everything behind the prompt: the policy
    word and after), a token's index, or none for everywhere. `replace` and `mean` read from the same question and the
    same completion under other cues, aligned at the end of the prompt.

    Before the first token that is intervened in, a prompt's keys and values are the model's own: those are computed
    once, and `kept` shares them between intervened models of one lens.

    Raises InputError for a site or a position that does not exist, and when asked about an unknown prompt.
    """

    padding = -1
    """What may be given behind a row in place of tokens: nothing is computed there."""

    def __init__(
        self,
        lens: Lens,
        interventions: Sequence[Intervention | Rewrite],
        prompts: Mapping[tuple[int, ...], PlacedPrompt],
        kept: KeptBeginnings | None = None,
    ) -> None:
        self.lens, self.interventions, self.prompts = lens, tuple(interventions), prompts
        self.kept = KeptBeginnings(lens) if kept is None else kept
        self._own: dict[tuple[int, ...], Keys] = {}
        self.lengths = sorted({len(ids) for ids in prompts}, reverse=True)
        cues = list(dict.fromkeys(cue for prompt in prompts.values() for cue in prompt.under))
        names = {"last", "completion", *(name for prompt in prompts.values() for name in prompt.spans)}
        for each in self.interventions:
            lens.check(each.site)
            if each.site.component == "pattern":
                raise InputError(f"{each.site}: attention patterns can be patched, but not intervened in")
            if isinstance(each.site.position, str) and each.site.position not in names:
                raise InputError(
                    f"{each.site}: no position {each.site.position!r} here; there are {', '.join(sorted(names))}"
                )
            if each.source is not None and each.source not in cues:
                raise InputError(f"{each}: no prompt has cue {each.source!r}; cues are {', '.join(cues)}")
            if each.vector is not None and len(each.vector) != self._size(each):
                raise InputError(f"{each.site}: the vector has {len(each.vector)} numbers, not {self._size(each)}")
        self.sources = list(
            dict.fromkeys(
                cue
                for each in self.interventions
                for cue in ([each.source] if each.source else cues if each.do == "mean" else [])
            )
        )
        self.read = list(
            dict.fromkeys(self._key(each) for each in self.interventions if each.do in ("replace", "mean"))
        )
        for each in self.interventions:
            check_position(each, self.sources if each.do == "mean" else [each.source] if each.source else [], prompts)

    def _key(self, each: Intervention | Rewrite) -> tuple[int, Component]:
        return each.site.layer, each.site.component

    def _size(self, each: Intervention | Rewrite) -> int:
        lens, site = self.lens, each.site
        if site.component in PER_HEAD:
            return lens.d_head
        return (1 if site.neuron is not None else lens.d_mlp) if site.component == "neurons" else lens.d_model

    def __call__(
        self,
        input_ids: Int[Tensor, "row window"],
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: _Past | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> Any:
        """Like the model; the cache it returns holds those of the runs it reads from, too.

        Where long prompts are read in whole rows, logits within them and at padding are not computed, and NaN.
        """
        ends = ((input_ids >= 0) * torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)).amax(1).tolist()
        input_ids = input_ids.clamp(min=0)
        call = self._understand(input_ids, attention_mask, past_key_values)
        alone = attention_mask is None and past_key_values is None and not use_cache
        long = min(len(prompt.ids) for prompt in call.prompts) >= LONG
        if alone and long and isinstance(logits_to_keep, Tensor) and keeps(self.lens.model):
            return self._behind_prompts(call, logits_to_keep, ends)
        given: dict[str, list[Tensor]] = {}
        past = past_key_values or _Past(call.prompts, [], None)
        for cue in self.sources:
            given[cue] = self._source(call, cue, attention_mask, past, use_cache)
        edits = self._edits(call, given)
        output = self._run(input_ids, edits, attention_mask, position_ids, past.own, use_cache, logits_to_keep)
        if use_cache:
            past.own = output.past_key_values
            past.seen = [first + input_ids.shape[1] for first in call.first]
            output.past_key_values = past
        return output

    # --- whole rows, behind what is kept of their prompts ----------------------------------------------------------

    def _behind_prompts(self, call: _Call, keep: Int[Tensor, " kept"], ends: Sequence[int]) -> SimpleNamespace:
        """Logits of whole rows at some columns, from the last token of each row's prompt to the end of the row."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(call.prompts):
            lengths = (len(prompt.ids), self._touched(prompt), *(len(prompt.under[cue]) for cue in self.sources))
            groups.setdefault(lengths, []).append(row)
        logits: Tensor | None = None
        for (length, touched, *_), rows in groups.items():
            start = length - 1
            width = max(length, min(int(keep.max()) + 1, max(ends[row] for row in rows)))
            inside = (keep >= start) & (keep < width)
            if not bool(inside.any()):
                continue
            prompts = [call.prompts[row] for row in rows]
            some = _Call(prompts, [start] * len(rows), call.ids[rows, start:width])
            found = self._window(some, self._keys_behind(prompts, start, touched), keep[inside] - start).logits
            if logits is None:
                logits = found.new_full((len(call.prompts), len(keep), found.shape[-1]), torch.nan)
            row = torch.tensor(rows, device=found.device)[:, None]
            logits[row, inside.nonzero()[:, 0]] = found  # pyright: ignore[reportOptionalSubscript]
        assert logits is not None, "no column lies behind a prompt"
        return SimpleNamespace(logits=logits)

    def _touched(self, prompt: PlacedPrompt) -> int:
        """The first token of a prompt that is intervened in; its last one, if none before it is."""
        last = len(prompt.ids) - 1
        first = [last]
        for each in self.interventions:
            position = each.site.position
            if position is None or isinstance(position, int):
                first.append(position or 0)
            elif position not in ("last", "completion"):
                first += prompt.spans.get(position, ())
        return min(first)

    def _keys_behind(self, prompts: Sequence[PlacedPrompt], start: int, touched: int) -> list[Keys]:
        """Keys and values of prompts before their last token, under the interventions."""
        if touched == start:
            return self.kept.of([prompt.ids for prompt in prompts])
        new = list({prompt.ids: prompt for prompt in prompts if prompt.ids not in self._own}.values())
        if new:
            before = [cut(keys, touched) for keys in self.kept.of([each.ids for each in new])] if touched else []
            ids = torch.tensor([each.ids[touched:start] for each in new], device=self.lens.device)
            output = self._window(_Call(new, [touched] * len(new), ids), before, 1)
            self._own |= dict(zip((each.ids for each in new), keys_of(output), strict=True))
        return [self._own[prompt.ids] for prompt in prompts]

    def _window(self, call: _Call, behind: Sequence[Keys], keep: int | Tensor) -> Any:
        """Some tokens of rows whose prompts have one length, under the interventions."""
        given = {cue: self._seen_under(call, cue) for cue in self.sources}
        return forward(self.lens, call.ids, cache_of(behind), self._edits(call, given), keep)

    def _seen_under(self, call: _Call, cue: str) -> list[Tensor]:
        """What the same questions and completions have under a cue, at the tokens of a window: one for each read."""
        others = [prompt.under[cue] for prompt in call.prompts]
        length, first = len(call.prompts[0].ids), call.first[0]
        start = first + len(others[0]) - length
        rows = [
            [*other[start:], *ids[length - first :]][: len(ids)]
            for other, ids in zip(others, call.ids.tolist(), strict=True)
        ]
        behind = [cut(keys, start) for keys in self.kept.of(others)] if start else []
        return self._read_behind(cache_of(behind), torch.tensor(rows, device=call.ids.device))

    def _read_behind(self, cache: Any, ids: Int[Tensor, "row window"]) -> list[Tensor]:
        """What is to be read, of tokens that follow a cache, which holds them afterwards where it was read."""
        found: dict[int, Tensor] = {}
        with contextlib.suppress(EnoughRead):
            forward(self.lens, ids, cache, self._reads(found, stop=True))
        return [found[index] for index in range(len(self.read))]

    def _reads(self, found: dict[int, Tensor], stop: bool) -> list[tuple[Any, Edit]]:
        """Hooks that note what is to be read; with `stop` they end the run as soon as all of it has been."""

        def keep(index: int) -> Edit:
            def store(activation: Tensor) -> None:
                found[index] = activation.clone()
                if len(found) == len(self.read) and stop:
                    raise EnoughRead

            return store

        return [(self.lens.point(*key), keep(index)) for index, key in enumerate(self.read)]

    # --- token by token, behind what is kept of their prompts ------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        """Whether rows can go on token by token from what is kept of their prompts (`begun`)."""
        return keeps(self.lens.model)

    def begun(
        self, contexts: Sequence[tuple[int, ...]], ahead: Sequence[int]
    ) -> Iterator[tuple[list[int], beginnings.Growing]]:
        """(some of the contexts, rows that go on from them), where so many tokens are to come behind each.

        A context is a prompt, perhaps with tokens behind it.
        """
        prompts = [self._prompt_of(context) for context in contexts]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (context, prompt) in enumerate(zip(contexts, prompts, strict=True)):
            others = (len(prompt.under[cue]) for cue in self.sources)
            groups.setdefault((len(context), len(prompt.ids), self._touched(prompt), *others), []).append(i)
        for (whole, length, touched, *_), group in groups.items():
            for part in beginnings.cut([length - 1] * len(group), [whole - length + 1 + ahead[i] for i in group]):
                some = [group[n] for n in part]
                with torch.inference_mode():
                    behind = self._keys_behind([prompts[i] for i in some], length - 1, touched)
                    rows = _Rows(self, [prompts[i] for i in some], [contexts[i] for i in some], behind)
                yield some, rows

    # --- as it is called -------------------------------------------------------------------------------------------

    def _run(
        self,
        ids: Tensor,
        edits: Sequence[tuple[Any, Edit]],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: Any,
        use_cache: bool,
        keep: int | Tensor,
    ) -> Any:
        options = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past}
        self.lens.tell_width(len(ids))
        with self.lens.hooked(edits):
            return self.lens.model(
                input_ids=ids,
                logits_to_keep=keep,
                use_cache=use_cache,
                **{name: value for name, value in options.items() if value is not None},
            )

    def _understand(self, ids: Tensor, mask: Tensor | None, past: _Past | None) -> _Call:
        if past is not None:
            return _Call(past.prompts, past.seen, ids)
        skips = [0] * len(ids) if mask is None else (ids.shape[1] - mask.sum(1)).tolist()
        found = []
        for row, skip in zip(ids.tolist(), skips, strict=True):
            found.append(self._prompt_of(row, skip))
        return _Call(found, [-skip for skip in skips], ids)

    def _prompt_of(self, ids: Sequence[int], start: int = 0) -> PlacedPrompt:
        """The longest prompt that begins there."""
        for length in self.lengths:
            prompt = self.prompts.get(tuple(ids[start : start + length]))
            if prompt is not None:
                return prompt
        raise InputError("an intervened model was asked about a prompt that is not among those it was made for")

    def _source(self, call: _Call, cue: str, mask: Tensor | None, past: _Past, use_cache: bool) -> list[Tensor]:
        """What the same questions and completions have under a cue, column by column of the call: one for each read."""
        if past.own is not None:
            # only the completion grows, and that is the same under every cue
            cache, real = past.sources[cue]
            real = torch.cat([real, torch.ones_like(call.ids)], 1)
            found, cache = self._observe(call.ids, real, cache, use_cache)
            past.sources[cue] = cache, real
            return found
        rows = [
            [*prompt.under[cue], *ids[len(prompt.ids) - first :]]
            for prompt, first, ids in zip(call.prompts, call.first, call.ids.tolist(), strict=True)
        ]
        width = max(len(row) for row in rows)
        ids, real = (torch.zeros(len(rows), width, dtype=torch.long, device=call.ids.device) for _ in range(2))
        # where completions are drawn, they grow at the end, so padding goes to the front
        skips = [width - len(row) if use_cache or mask is not None else 0 for row in rows]
        for index, (row, skip) in enumerate(zip(rows, skips, strict=True)):
            ids[index, skip : skip + len(row)] = torch.tensor(row, device=ids.device)
            real[index, skip:] = 1
        found, cache = self._observe(ids, real, None, use_cache)
        if use_cache:
            past.sources[cue] = cache, real
        shift = [s + len(p.under[cue]) - len(p.ids) for s, p in zip(skips, call.prompts, strict=True)]
        at = (call.tokens() + torch.tensor(shift, device=ids.device)[:, None]).clamp(0, width - 1)
        row = torch.arange(len(rows), device=ids.device)[:, None]
        return [values[row, at] for values in found]

    def _observe(self, ids: Tensor, real: Tensor, past: Any, use_cache: bool) -> tuple[list[Tensor], Any]:
        """What is to be read, of a run that ends as soon as it has been read, unless its cache is wanted."""
        found: dict[int, Tensor] = {}
        edits = self._reads(found, stop=not use_cache)
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        mask = real if bool((real == 0).any()) else None
        cache = None
        with contextlib.suppress(EnoughRead):
            cache = self._run(ids, edits, mask, positions, past, use_cache, 1).get("past_key_values")
        return [found[index] for index in range(len(self.read))], cache

    def _edits(self, call: _Call, given: Mapping[str, list[Tensor]]) -> list[tuple[Any, Edit]]:
        edits = []
        before: Intervention | Rewrite | None = None
        for each in self.interventions:
            source = None
            if each.do in ("replace", "mean"):
                index = self.read.index(self._key(each))
                cues = [each.source] if each.source else self.sources
                source = torch.stack([given[str(cue)][index] for cue in cues]).mean(0)
            point = self.lens.point(*self._key(each))
            # units clamped at one site all read what was there before any of them wrote
            together = before is not None and (before.do, before.site) == ("clamp", each.site) and each.do == "clamp"
            if each.do == "clamp":
                some = [*(edits.pop()[2] if together else ()), each]
                edits.append((point, clamp_of(some, self._columns(each, call)), some))
            else:
                edits.append((point, edit_of(each, self._columns(each, call), source), ()))
            before = each
        return [(point, edit) for point, edit, _ in edits]

    def _columns(self, each: Intervention | Rewrite, call: _Call) -> Bool[Tensor, "row window"]:
        token = call.tokens()
        position = each.site.position
        ends = torch.tensor([len(prompt.ids) for prompt in call.prompts], device=token.device)[:, None]
        if position is None:
            return token >= 0
        if isinstance(position, int):
            return token == position
        if position == "completion":
            return token >= ends
        if position == "last":
            return token == ends - 1
        chosen = torch.zeros_like(token, dtype=torch.bool)
        for row, prompt in enumerate(call.prompts):
            for at in prompt.spans.get(position, ()):
                chosen[row] |= token[row] == at
        return chosen


class _Rows:
    """Rows that go on under interventions, and beside them, under other cues, the runs that these read from."""

    def __init__(
        self, model: Intervened, prompts: list[PlacedPrompt], contexts: Sequence[Sequence[int]], behind: Sequence[Keys]
    ) -> None:
        self._model, self._prompts, self._seen = model, prompts, len(prompts[0].ids) - 1
        self._own = cache_of(behind)
        # what stops at a layer needs no keys and values above it
        layers = max((layer for layer, _ in model.read), default=0) + 1
        self._sources: dict[str, Any] = {}
        given: dict[str, list[Tensor]] = {}
        more = [list(each[len(prompts[0].ids) :]) for each in contexts]
        for cue in model.sources:
            others = [prompt.under[cue] for prompt in prompts]
            self._sources[cue] = cache_of([keys[:layers] for keys in model.kept.of(others)])
            ends = [[other[-1], *each] for other, each in zip(others, more, strict=True)]
            given[cue] = model._read_behind(self._sources[cue], self._tensor(ends))
        self.logits = self._put(self._tensor([[p.ids[-1], *m] for p, m in zip(prompts, more, strict=True)]), given)

    @torch.inference_mode()
    def go_on(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """As `Growing` says."""
        if list(rows) != list(range(len(self._prompts))):
            at = torch.tensor(list(rows), device=self._model.lens.device)
            for cache in (self._own, *self._sources.values()):
                cache.batch_select_indices(at)
            self._prompts = [self._prompts[row] for row in rows]
        ids = self._tensor([[token] for token in tokens])
        self.logits = self._put(
            ids, {cue: self._model._read_behind(cache, ids) for cue, cache in self._sources.items()}
        )

    def _tensor(self, ids: Sequence[Sequence[int]]) -> Int[Tensor, "row window"]:
        return torch.tensor(ids, device=self._model.lens.device)

    def _put(self, ids: Int[Tensor, "row window"], given: Mapping[str, list[Tensor]]) -> Tensor:
        """Logits of the token behind some more tokens, of which other runs have what is given."""
        model, call = self._model, _Call(self._prompts, [self._seen] * len(ids), ids)
        self._seen += ids.shape[1]
        return forward(model.lens, ids, self._own, model._edits(call, given), 1).logits[:, -1]
