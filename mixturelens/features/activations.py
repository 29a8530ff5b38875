"""Activations of one site over many texts, of one or several models: held in memory, or in shards that are mapped."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.hooks.intervened import EnoughRead
from mixturelens.hooks.lens import Edit, Lens, Tokens
from mixturelens.models import end_tokens
from mixturelens.records import Record
from mixturelens.spelling import encode_prompts
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import PER_HEAD, Component, InputError, Site, loading

MEMORY = 1 << 30
"""Bytes of activations that are held in memory, unless asked otherwise."""
SHARD = 64 << 20
"""Bytes of activations in one file of a folder: what a kill can cost."""
BATCH_TOKENS = 4096
"""Tokens of one forward: larger batches fall out of the cache and are slower on a CPU."""
SAMPLE = 16384
"""Rows that mean and scale are taken from."""
MASSIVE = 20.0
"""Times the median length of tokens from which one is a sink: a token, the first of a text above all, on which large
models rest attention (Sun et al. 2024, arXiv 2402.17762). In deep layers it is a hundred times as long as any other."""

STORE = "store.json"


@dataclass(frozen=True)
class Storage:
    """Where activations are kept: in memory where they take at most `memory` bytes, else in the folder, if any."""

    folder: Path | None = None
    memory: int = MEMORY


At = tuple[int, Component]
Progress = Callable[[int, int], None]
"""Called as progress(done, of)."""


class Store(Record):
    """What a folder of shards holds. It is written last: without it the folder is not whole."""

    KIND = "activations"

    layer: int
    component: Component
    weights: tuple[str, ...]
    """Digest of every model's weights."""
    texts: str
    """Digest of the texts."""
    rows: int
    dim: int
    shards: int
    massive: float = 0.0
    """Times the median length from which tokens were shortened; 0: none was."""

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that stand for all that the store says of itself."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Activations:
    """Rows (tokens) of activations, in one part or several."""

    parts: tuple[Float[Tensor, "_row model d"], ...]
    digest: str = ""
    """Of the weights, texts and site that they come from."""

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def models(self) -> int:
        """Checkpoints whose activations lie side by side in every row."""
        return self.parts[0].shape[1]

    @property
    def dim(self) -> int:
        """Numbers that each of these models has at the site for one token."""
        return self.parts[0].shape[2]

    def batch(self, step: int, size: int, seed: int) -> Float[Tensor, "row model d"]:
        """The step-th batch of an endless stream that goes through all rows in one random order after the other.

        A function of (step, size, seed) alone, so that whoever resumes needs no state. Rows come sorted by their place,
        which is quicker to read; which rows are together is random.

        >>> some = Activations((torch.arange(4.0)[:, None, None],))
        >>> sorted(torch.cat([some.batch(step, 2, seed=0) for step in (0, 1)]).flatten().tolist())
        [0.0, 1.0, 2.0, 3.0]
        """
        stream = np.arange(step * size, (step + 1) * size)
        rounds, places = np.divmod(stream, len(self))
        chosen = np.empty(size, dtype=np.int64)
        for number in range(rounds[0], rounds[-1] + 1):
            chosen[rounds == number] = _order(len(self), seed, number)[places[rounds == number]]
        return self.rows(torch.from_numpy(np.sort(chosen)))

    def rows(self, index: Int[Tensor, " chosen"]) -> Float[Tensor, "chosen model d"]:
        """The rows of these numbers, in the order given; where the parts are mapped files, no other rows are read."""
        if len(self.parts) == 1:
            return self.parts[0][index]
        found = torch.empty(len(index), self.models, self.dim)
        owner = torch.bucketize(index, self._starts[1:], right=True)
        for number in owner.unique().tolist():
            mine = owner == number
            found[mine] = self.parts[number][index[mine] - self._starts[number]]
        return found

    @cached_property
    def mean(self) -> Float[Tensor, "model d"]:
        """Mean activation of each model, over SAMPLE random rows at most."""
        return self._sample.mean(0)

    @cached_property
    def scale(self) -> Float[Tensor, " model"]:
        """What to multiply each model's activations by, so that their mean square norm is d. Zeros stay as they are."""
        square = self._sample.square().sum(-1).mean(0)
        return torch.where(square > 0, (self.dim / square).sqrt(), 1.0)

    @property
    def _sample(self) -> Float[Tensor, "row model d"]:
        return self.batch(0, min(SAMPLE, len(self)), seed=0)

    @cached_property
    def _starts(self) -> Int[Tensor, " part"]:
        return torch.tensor([0, *accumulate(len(part) for part in self.parts)][:-1])


@lru_cache(maxsize=4)
def _order(rows: int, seed: int, number: int) -> Int[np.ndarray, " row"]:
    return np.random.default_rng([seed, number]).permutation(rows)


# --- texts ------------------------------------------------------------------------------------------------------------


def texts(lenses: Sequence[Lens], suite: Suite, rows: Sequence[PromptRow], seed: int = 0) -> list[list[int]]:
    """Token ids of every prompt with one completion behind it, drawn at temperature 1; its end token is kept.

    Row i's completion is drawn by lens i % len(lenses). Where rows come in a pattern (cues in turn), shuffle them
    first, or each model completes its own cue alone. All lenses share the first one's tokenizer.
    """
    contexts = encode_prompts(suite, rows, lenses[0].tokenizer)
    found = [list(context) for context in contexts]
    for number, lens in enumerate(lenses):
        own = range(number, len(contexts), len(lenses))
        vocabulary = lens.model.config.get_text_config().vocab_size
        scorer = Scorer(end_tokens(lens.model, lens.tokenizer), vocabulary, lens.device)
        drawn = scorer.sample(_called(lens), [contexts[i] for i in own], 1, [suite.max_new_tokens] * len(own), seed)
        for i, completion in zip(own, drawn.tokens, strict=True):
            found[i] += completion
    return found


def _called(lens: Lens) -> Callable[..., Any]:
    """The model under the lens, called as the plain model is."""

    def model(**inputs: Any) -> Any:
        lens.tell_width(len(inputs["input_ids"]))
        return lens.model(**inputs)

    return model


def batches(
    texts: Sequence[Sequence[int]], device: str, most: int = BATCH_TOKENS
) -> Iterator[tuple[list[int], Tokens]]:
    """Texts of about one length together: which they are, and their tokens, padded on the right.

    A causal model cannot see the padding, so the tokens do not call it padding: no mask is needed, and activations are
    those of each text alone. Whoever reads them leaves out what is behind a text's own length.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(texts[order[end]]) <= most:
            end += 1
        some = order[start:end]
        ids = torch.zeros(len(some), len(texts[some[-1]]), dtype=torch.long)
        for row, i in enumerate(some):
            ids[row, : len(texts[i])] = torch.tensor(list(texts[i]))
        yield some, Tokens(ids.to(device), torch.ones_like(ids, dtype=torch.bool).to(device))
        start = end


def own_tokens(batch: Tokens, lengths: Sequence[int]) -> Bool[Tensor, "row pos"]:
    """Which tokens of a batch are among the first `lengths[row]` of each row."""
    at = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return at < torch.tensor(lengths, device=batch.ids.device)[:, None]


def massive(values: Float[Tensor, "*token d"]) -> Bool[Tensor, " *token"]:
    """Which tokens are sinks (MASSIVE).

    >>> massive(torch.tensor([[900.0], [1.0], [2.0], [-3.0]])).tolist()
    [True, False, False, False]
    """
    length = values.float().norm(dim=-1)
    usual = length.median()
    return (length > MASSIVE * usual) & (usual > 0)


def shortened(values: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
    """The same, with sinks as long as the median token: they say nothing of a text, and would be all that is learnt.

    >>> shortened(torch.tensor([[900.0], [1.0], [2.0], [-3.0]])).tolist()
    [[2.0], [1.0], [2.0], [-3.0]]
    """
    length = values.norm(dim=-1, keepdim=True)
    return torch.where(massive(values)[..., None], values * (length.median() / length.clamp(min=1e-30)), values)


# --- collecting -------------------------------------------------------------------------------------------------------


def collect_places(
    lenses: Sequence[Lens], texts: Sequence[Sequence[int]], places: Sequence[At], storage: Storage
) -> dict[At, Activations]:
    """Activations of several places, from one forward of each text and model, where all of them fit into memory; else
    place by place, each in a folder of its own inside that of `storage`. Raises InputError as `collect` does.
    """
    places = list(dict.fromkeys(places))
    widths = {at: _width(lenses, texts, at) for at in places}
    rows = sum(len(text) for text in texts)
    if rows * len(lenses) * 4 * sum(widths.values()) > storage.memory:
        inside = {at: storage.folder and storage.folder / f"L{at[0]}.{at[1]}" for at in places}
        return {at: collect(lenses, texts, at, Storage(inside[at], storage.memory)) for at in places}
    held = {at: torch.empty(rows, len(lenses), width) for at, width in widths.items()}
    _fill(lenses, texts, held)
    weights = tuple(_digest(lens) for lens in lenses)
    return {at: Activations((held[at],), _store(weights, texts, at, widths[at], 1).digest) for at in places}


def collect(
    lenses: Sequence[Lens],
    texts: Sequence[Sequence[int]],
    at: At,
    storage: Storage | None = None,
    progress: Progress | None = None,
) -> Activations:
    """Activations of all lenses at one (layer, component) on every token of the same texts, in the texts' order.

    Held in memory where they take at most `storage.memory` bytes. Else they go to its folder, shard by shard (each
    whole or absent, so that a killed collection goes on behind the shards that are there), and are mapped, not read.

    Raises InputError for a site that is not there or has heads, for models of different width, if they do not fit and
    there is no folder, and for a folder that holds something else.
    """
    storage = storage or Storage()
    width = _width(lenses, texts, at)
    row_bytes = len(lenses) * width * 4
    cuts = _cuts([len(text) * row_bytes for text in texts])
    store = _store(tuple(_digest(lens) for lens in lenses), texts, at, width, len(cuts))

    def fill(start: int, end: int, out: Float[Tensor, "row model d"]) -> None:
        _fill(lenses, texts[start:end], {at: out})
        if progress:
            progress(end, len(texts))

    if store.rows * row_bytes <= storage.memory:
        held = torch.empty(store.rows, len(lenses), store.dim)
        done = 0
        for start, end in cuts:
            rows = sum(len(text) for text in texts[start:end])
            fill(start, end, held[done : done + rows])
            done += rows
        return Activations((held,), store.digest)
    if storage.folder is None:
        raise InputError(
            f"the activations take {store.rows * row_bytes / 2**20:,.0f} MiB, and {storage.memory / 2**20:,.0f} are "
            "allowed in memory: name a folder for them, allow more, or give fewer texts"
        )
    return _stored(storage.folder, store, cuts, texts, fill)


def _width(lenses: Sequence[Lens], texts: Sequence[Sequence[int]], at: At) -> int:
    """Numbers a token at a place, the same in all models."""
    layer, component = at
    if component in PER_HEAD:
        raise InputError(f"{component}: features are of the residual stream, of outputs or of neurons, not of heads")
    if not lenses or not texts or not all(texts):
        raise InputError("activations need at least one model and one text, and every text a token")
    for lens in lenses:
        lens.check(Site(layer=layer, component=component))
    widths = [lens.d_mlp if component == "neurons" else lens.d_model for lens in lenses]
    if len(set(widths)) > 1:
        raise InputError(f"L{layer}.{component} has {widths[0]} dimensions in one model and {max(widths)} in another")
    return widths[0]


def _store(weights: tuple[str, ...], texts: Sequence[Sequence[int]], at: At, width: int, shards: int) -> Store:
    return Store(
        layer=at[0],
        component=at[1],
        weights=weights,
        texts=hashlib.sha256(json.dumps([list(text) for text in texts]).encode()).hexdigest()[:16],
        rows=sum(len(text) for text in texts),
        dim=width,
        shards=shards,
        massive=MASSIVE,
    )


def _cuts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive texts, so many that each shard has at most SHARD bytes (or one text)."""
    cuts, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > SHARD:
            cuts.append((start, i))
            start, total = i, 0
        total += size
    return [*cuts, (start, len(sizes))]


@torch.no_grad()
def up_to(lens: Lens, batch: Tokens, places: Sequence[At]) -> dict[At, Tensor]:
    """Activations `[row, pos, d]` of a batch at each place, from one forward that ends behind their last layer."""
    found: dict[At, Tensor] = {}

    def keep(at: At) -> Edit:
        def store(activation: Tensor) -> None:
            found[at] = activation.clone()

        return store

    def stop(_: Tensor) -> None:
        raise EnoughRead

    edits = [(lens.point(*at), keep(at)) for at in places]
    beyond = max(layer for layer, _ in places) + 1
    if beyond < lens.layers:
        edits.append((lens.point(beyond, "resid_pre"), stop))
    with contextlib.suppress(EnoughRead):
        lens.run(batch, edits)
    return found


def _fill(
    lenses: Sequence[Lens], texts: Sequence[Sequence[int]], out: Mapping[At, Float[Tensor, "row model d"]]
) -> None:
    starts = [0, *accumulate(len(text) for text in texts)]
    for number, lens in enumerate(lenses):
        for some, batch in batches(texts, lens.device):
            acts = up_to(lens, batch, list(out))
            index = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in some])
            real = own_tokens(batch, [len(texts[i]) for i in some])
            for at, values in out.items():
                values[index, number] = shortened(acts[at][real].float()).cpu()


def _digest(lens: Lens) -> str:
    """Of the weights as they are in memory, whatever folder they came from."""
    digest = hashlib.sha256()
    for parameter in lens.model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _stored(
    folder: Path,
    store: Store,
    cuts: Sequence[tuple[int, int]],
    texts: Sequence[Sequence[int]],
    fill: Callable[[int, int, Tensor], None],
) -> Activations:
    """The shards of a folder; those that are not there are made first."""
    from safetensors.torch import save_file

    whole = (folder / STORE).is_file()
    if whole and Store.load(folder / STORE) != store:
        raise InputError(f"{folder} holds activations of other weights, texts or another site; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, (start, end) in enumerate(cuts):
        file = folder / f"shard-{number:05}.safetensors"
        rows = sum(len(text) for text in texts[start:end])
        if not file.is_file() and not whole:
            out = torch.empty(rows, len(store.weights), store.dim)
            fill(start, end, out)
            temporary = folder / f".{file.name}"  # one that a kill left is written over
            save_file({"activations": out}, temporary, metadata={"of": store.digest})
            temporary.replace(file)
        parts.append(_mapped(file, store, rows))
    if not whole:
        store.save(folder / STORE)
    return Activations(tuple(parts), store.digest)


def _mapped(file: Path, store: Store, rows: int) -> Float[Tensor, "row model d"]:
    """A shard as a tensor whose pages are read when they are asked for."""
    from safetensors import safe_open

    if not file.is_file():
        raise InputError(f"{file} is missing; delete the folder and collect again")
    what = "not a shard of activations; delete it and collect again"
    with loading(file, what), safe_open(file, framework="pt") as opened:
        of, part = (opened.metadata() or {}).get("of"), opened.get_tensor("activations")
    if of != store.digest or part.shape != (rows, len(store.weights), store.dim):
        raise InputError(f"{file} holds activations of other weights, texts or another site; give another folder")
    return part
