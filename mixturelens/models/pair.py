"""S and R as one thing: what they share, where they differ, and models that are ready to be compared.

Whatever does not matter is evened out when a model is handed out (rows of padding in the vocabulary, heads that are
tied in one and stored twice in the other, end tokens); what matters is refused; what may matter is in `differences`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from pydantic import Field

from mixturelens.chat import TODAY
from mixturelens.completions import with_completions
from mixturelens.models.alike import (
    Shapes,
    check_shapes,
    check_surplus,
    config_differences,
    positions_of,
    same_weights,
    shapes_of,
)
from mixturelens.models.load import (
    DEVICE_MAPS,
    DTYPES,
    load_config,
    load_model,
    load_tokenizer,
    named_ends,
    tokenizer_folder,
    with_adapters,
)
from mixturelens.models.source import Source, find_source, fingerprint, leaves_base
from mixturelens.records import Provenance, with_versions
from mixturelens.spelling import prompt_text
from mixturelens.suite import Spelling, Suite, literal_texts, load_suite
from mixturelens.types import Frozen, InputError, Side, loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Budget(Frozen):
    """What an instrument may take at most: with less it looks at less, and says so. None: as much as it needs."""

    minutes: float | None = Field(default=None, gt=0)
    memory: float | None = Field(default=None, gt=0)
    """GB (1e9 bytes)."""


UNBOUNDED = Budget()


class How(TypedDict, total=False):
    """How a pair is loaded, wherever one is opened."""

    base: str | os.PathLike[str] | None
    """What adapters are applied on, where their configs do not say."""
    device: str
    dtype: str
    """float32, bfloat16 or float16."""
    device_map: str | None
    """Spreads a model over devices (behaviour and verdict alone): auto, balanced or sequential."""
    budget: Budget | None
    """What an instrument may take."""
    completions: Sequence[str] | None
    """Files of completions that were sampled elsewhere; `before=FILE` or `after=FILE` where a file does not say."""


class Pair:
    """Two checkpoints (or one), the suite to compare them on, how they are loaded, and where records about them go.

    A checkpoint is a folder, a hub id (`org/name`, with `@revision` and `:subfolder`), or a LoRA adapter, on `base`
    where its config does not name one. `suite` is a suite, or its YAML file; `trained_cue` is the cue that RL trained
    on, where the suite does not say. Records go to `out/records/<before>--<after>/`; by default `out` is
    `artifacts/<before>--<after>`.

    Making one reads configs and tokenizers, no weights: these are loaded by whatever measures something. Raises
    InputError for what cannot be used, and for two that are no pair. A pair never changes.

    >>> Pair("org/base", "runs/rl-adapter", "suite.yaml", device="cuda", dtype="bfloat16").shares_base  # doctest: +SKIP
    True
    """

    def __init__(
        self,
        before: Source | str | os.PathLike[str],
        after: Source | str | os.PathLike[str] | None,
        suite: Suite | str | os.PathLike[str],
        *,
        trained_cue: str | None = None,
        out: str | os.PathLike[str] | None = None,
        **how: Unpack[How],
    ) -> None:
        base, self.device, self.dtype = how.get("base"), how.get("device", "cpu"), how.get("dtype", "float32")
        self.device_map, self.budget = how.get("device_map"), how.get("budget") or UNBOUNDED
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r}: one of {', '.join(DTYPES)}")
        if self.device_map not in (None, *DEVICE_MAPS):
            raise InputError(f"--device-map {self.device_map}: one of {', '.join(DEVICE_MAPS)}")
        self.suite = _suite(suite, trained_cue)
        self.completions = None
        if how.get("completions"):
            if after is None:
                raise InputError("--completions are of two checkpoints: give --after")
            self.suite, self.completions = with_completions(self.suite, how.get("completions") or ())
        self.before = find_source(before, base)
        self.after = None if after is None else find_source(after, base)
        if base is not None and not any(source.is_adapter for source in self.sides.values()):
            raise InputError("--base is what an adapter is applied on, and neither checkpoint is an adapter")
        self.out = Path(out) if out is not None else Path("artifacts") / self.name
        self.check()

    def __repr__(self) -> str:
        bases = dict.fromkeys(repr(str(source.base)) for source in self.sides.values() if source.base is not None)
        shown = [repr(str(source)) for source in self.sides.values()] + [f"base={base}" for base in bases]
        return f"Pair({', '.join([*shown, f'dtype={self.dtype!r}'])})"

    @property
    def sides(self) -> dict[Side, Source]:
        """The sources of the checkpoints by their side; without R, that of S alone."""
        return {"before": self.before} if self.after is None else {"before": self.before, "after": self.after}

    @property
    def name(self) -> str:
        """What the folder of its records is called: `<before>--<after>`."""
        return "--".join(source.name for source in self.sides.values())

    @property
    def records(self) -> Path:
        """Folder of the records about it."""
        return self.out / "records" / self.name

    def made(self, what: str) -> Path:
        """The folder for a checkpoint made from R, such as `repaired`.

        It lies beside the other checkpoints of a run, where R is one of them, else in `out`.
        """
        after = self.after
        if after is not None and after.folder.parent == self.out / "checkpoints":
            return self.out / "checkpoints" / f"{after.name}-{what}"
        return self.out / what

    def spelled(self, spelling: Spelling) -> Pair:
        """The same pair, whose suite has this spelling: the whitespace that its models were found to write."""
        return self.with_suite(self.suite.model_copy(update={"spelling": spelling}))

    def asked(self, questions: Collection[str]) -> Pair:
        """The same pair, with the prompts of some questions alone."""
        kept = tuple(row for row in self.suite.prompts if row.id in questions)
        return self.with_suite(self.suite.model_copy(update={"prompts": kept}))

    def with_suite(self, suite: Suite) -> Pair:
        """The same pair, compared on other prompts, or with other rules."""
        other = copy.copy(self)
        other.suite = suite
        return other

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of both (they spell the suite's texts alike), with the chat template that the suite chooses."""
        own = next((source for source in self.sides.values() if tokenizer_folder(source)), self.before)
        tokenizer = load_tokenizer(own)
        if self.suite.chat is not None:
            templates = self._templates
            chosen = templates.get(self.suite.chat.template_of) or next(filter(None, templates.values()), None)
            tokenizer.chat_template = chosen
        return tokenizer

    @cached_property
    def _tokenizers(self) -> dict[Side, PreTrainedTokenizerBase]:
        return {side: load_tokenizer(source) for side, source in self.sides.items() if tokenizer_folder(source)}

    @cached_property
    def _templates(self) -> dict[Side, Any]:
        return {side: tokenizer.chat_template for side, tokenizer in self._tokenizers.items()}

    @cached_property
    def _ends(self) -> dict[Side, tuple[int, ...]]:
        """What each side's own files say ends a completion, its tokenizer's end token among it."""
        found: dict[Side, tuple[int, ...]] = {}
        for side, source in self.sides.items():
            tokenizer = self._tokenizers.get(side, self.tokenizer)
            own = tokenizer.eos_token_id
            ids = [*named_ends(source), *([own] if isinstance(own, int) else [])]
            found[side] = tuple(dict.fromkeys(each for each in ids if each < self.vocabulary))
        return found

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a completion of either side. Raises InputError where there is none."""
        chosen = self.suite.ends
        if isinstance(chosen, tuple):
            ids = [self._end_of(text) for text in chosen]
        else:
            # one checkpoint alone is both
            sides = [found for side, found in self._ends.items() if chosen in ("either", side)] or self._ends.values()
            ids = [each for found in sides for each in found]
        if not ids:
            raise InputError(
                f"{self.before}: neither model nor tokenizer names an end-of-text token; set eos_token_id in its "
                "generation_config.json, or `ends` in the suite"
            )
        return tuple(sorted(set(ids)))

    def _end_of(self, text: str) -> int:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise InputError(f"ends: {text!r} is not one token of the tokenizer")
        if ids[0] >= self.vocabulary:
            raise InputError(f"ends: {text!r} is token {ids[0]}, and the models' embedding has {self.vocabulary} rows")
        return ids[0]

    @cached_property
    def _shapes(self) -> dict[Side, Shapes]:
        return {side: shapes_of(source) for side, source in self.sides.items()}

    @property
    def vocabulary(self) -> int:
        """Rows of embedding and unembedding that both sides have."""
        return min(shapes.rows for shapes in self._shapes.values())

    @property
    def positions(self) -> int | None:
        """Tokens that fit into both models' contexts; None where their configs name no bound."""
        found = (positions_of(source) for source in self.sides.values())
        return min((most for most in found if most is not None), default=None)

    @cached_property
    def config_differences(self) -> tuple[str, ...]:
        """Settings of the two configs that change what the same weights compute."""
        return () if self.after is None else config_differences(self.before, self.after)

    @cached_property
    def differences(self) -> tuple[str, ...]:
        """What differs between S and R and may matter, one sentence each, with what it was evened out to."""
        said = [] if self.completions is None else list(self.completions.notes)
        said += [
            f"{side}: a LoRA adapter, applied on the weights that lie beside it"
            for side, source in self.sides.items()
            if source.base is not None and source.base.folder == source.folder
        ]
        if self.suite.chat is not None and "strftime_now" in str(self.tokenizer.chat_template):
            said.append(f"the chat template inserts today's date, which is always {TODAY.day} {TODAY:%B %Y} here")
        if self.after is None:
            return tuple(said)
        lacking = [side for side in self.sides if side not in self._tokenizers]
        said += [f"{side}: no tokenizer of its own; the other's is used" for side in lacking]
        if len({str(template) for template in self._templates.values()}) > 1 and self.suite.chat is not None:
            which = self.suite.chat.template_of
            used = which if self._templates.get(which) else next(s for s, t in self._templates.items() if t)
            said.append(f"chat templates differ; that of {used} is used (`chat: {{template_of: ...}}` chooses)")
        if set(self._ends["before"]) != set(self._ends["after"]):
            named = {side: ", ".join(map(self._token, ids)) or "none" for side, ids in self._ends.items()}
            used = ", ".join(map(self._token, self.ends))
            said.append(
                f"end tokens differ ({named['before']} before, {named['after']} after); completions end at {used} "
                "(`ends:` chooses)"
            )
        rows = {side: shapes.rows for side, shapes in self._shapes.items()}
        if len(set(rows.values())) > 1:
            said.append(
                f"vocabularies have {rows['before']} rows before and {rows['after']} after; those beyond "
                f"{self.vocabulary} are left out"
            )
        said += [f"configs differ in {each}" for each in self.config_differences]
        return tuple(said)

    def _token(self, token: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(token)} ({token})"

    # --- models -------------------------------------------------------------------------------------------------------

    @cached_property
    def shares_base(self) -> bool:
        """Whether both sides are one set of base weights, with adapters, so that it is held in memory once."""
        if self.after is None or not (self.before.is_adapter or self.after.is_adapter) or self.config_differences:
            return False
        if not all(leaves_base(source) for source in self.sides.values() if source.is_adapter):
            return False
        bases = [source.base or source for source in self.sides.values()]
        if any(base.is_adapter for base in bases):  # which must be the very same ones
            return bases[0] == bases[1]
        return bases[0].weights.resolve() == bases[1].weights.resolve() or same_weights(*bases)

    def models(self) -> tuple[Any, ...]:
        """S, and R where there is one, to be called like models; sides of one base share it, and switch adapters."""
        if not self.shares_base:
            return tuple(self.model(side) for side in self.sides)
        bases = {side: source.base or source for side, source in self.sides.items()}
        base = self._ready(load_model(bases["before"], self.device, self.dtype, self.device_map), "before")
        adapters: dict[str, Source] = {side: source for side, source in self.sides.items() if source.is_adapter}
        under = with_adapters(base, adapters)
        return tuple(View(under, side if source.is_adapter else None) for side, source in self.sides.items())

    def model(self, side: Side) -> PreTrainedModel:
        """A side as a model with weights of its own (an adapter merged into them), evened out with the other side."""
        source = self.sides[side]
        return self._ready(load_model(source, self.device, self.dtype, self.device_map), side)

    def _ready(self, model: PreTrainedModel, side: Side) -> PreTrainedModel:
        import torch

        if self._shapes[side].rows > self.vocabulary:
            check_surplus(model, self.sides[side], self.suite, self.tokenizer, self.vocabulary)
            model.resize_token_embeddings(self.vocabulary, mean_resizing=False)
        tied = [bool(load_config(source).get_text_config().tie_word_embeddings) for source in self.sides.values()]
        head: Any = model.get_output_embeddings()
        if len(set(tied)) > 1 and head is not None and head.weight is model.get_input_embeddings().weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            model.config.tie_word_embeddings = False
        if model.generation_config is not None:
            model.generation_config.eos_token_id = list(self.ends)
        return model

    # --- checks -------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise InputError for two that are no pair, or a suite whose texts their tokenizers spell differently."""
        if self.after is not None and not self.shares_base:
            check_shapes(self.before, self.after, *self._shapes.values())
        self.ends  # noqa: B018  (raises)
        self._check_texts()

    def _check_texts(self) -> None:
        """Both tokenizers must give the suite's texts the same ids, and the models must have room for them."""
        texts: dict[str, str] = {}
        for row in self.suite.prompts:
            text = prompt_text(self.suite, row, self.tokenizer)
            texts.setdefault(text, f"prompt {row.id!r} under cue {row.cue!r}")
        prompts = len(texts)
        texts |= {text: f"the text {text!r}" for text in literal_texts(self.suite) if text not in texts}
        special = self.suite.chat is None
        tokenizers = list(self._tokenizers.values()) or [self.tokenizer]
        room = self.positions
        for number, (text, where) in enumerate(texts.items()):
            with loading(where, "the tokenizer fails on it"):
                spelled = [_ids(tokenizer, text, special) for tokenizer in tokenizers]
            if len(set(spelled)) > 1:
                words = [w for w in text.split() if len({_ids(t, w, False) for t in tokenizers}) > 1]
                first = f", first at {words[0]!r}" if words else ""
                raise InputError(
                    f"{self.before} and {self.after} are not a pair: their tokenizers spell {where} differently{first}"
                )
            beyond = next((token for token in spelled[0] if token >= self.vocabulary), None)
            if beyond is not None:
                raise InputError(
                    f"{where}: {self.tokenizer.convert_ids_to_tokens(beyond)!r} is token {beyond}, and the models' "
                    f"embedding has {self.vocabulary} rows: the model was never resized to its tokenizer"
                )
            needed = len(spelled[0]) + self.suite.max_new_tokens
            if room is not None and number < prompts and needed > room:
                raise InputError(
                    f"{where} has {len(spelled[0])} tokens, and max_new_tokens is {self.suite.max_new_tokens}: the "
                    f"models have {room} positions; shorten the one or lower the other"
                )

    def check_one_function(self, what: str) -> None:
        """Raise InputError where the configs differ, for work that puts weights of one checkpoint under the other's
        config.

        `what` names the work in the message.
        """
        if self.config_differences:
            raise InputError(
                f"{what} puts weights of one checkpoint into the other, and their configs differ in "
                f"{self.config_differences[0]}: under another config the same weights are another model"
            )

    def provenance(self, seed: int = 0, suite: str | None = None) -> Provenance:
        """Where a record about this pair, made with `seed` on the suite of this name, comes from."""
        return with_versions(
            Provenance(
                before=fingerprint(self.before),
                after=self.after and fingerprint(self.after),
                suite=suite,
                seed=seed,
                device=self.device,
                dtype=self.dtype,
            )
        )


class View:
    """One side of a base that both sides share: called like a model, it switches to its adapter first."""

    def __init__(self, under: Any, adapter: str | None) -> None:
        self.under = under
        self.adapter = adapter

    @property
    def config(self) -> Any:
        """The config of the model under the adapters."""
        return self.under.base_model.model.config

    @property
    def generation_config(self) -> Any:
        """The settings of generation of the model under the adapters."""
        return self.under.base_model.model.generation_config

    def __call__(self, **inputs: Any) -> Any:
        if self.adapter is None:
            with self.under.disable_adapter():
                return self.under.base_model.model(**inputs)
        if self.under.active_adapter != self.adapter:
            self.under.set_adapter(self.adapter)
        return self.under.base_model.model(**inputs)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=special))


def _suite(given: Suite | str | os.PathLike[str], trained_cue: str | None) -> Suite:
    suite = given if isinstance(given, Suite) else load_suite(Path(given))
    if trained_cue is None:
        return suite
    if trained_cue not in suite.cues:
        where = "the suite" if isinstance(given, Suite) else os.fspath(given)
        raise InputError(f"{where}: no prompt has the trained cue {trained_cue!r}")
    return suite.model_copy(update={"trained_cue": trained_cue})
