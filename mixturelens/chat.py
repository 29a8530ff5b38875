"""Chat templates: programs of a checkpoint, rendered in transformers' sandbox, on one date, within limits."""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mixturelens.limits import limited
from mixturelens.suite import Chat, PromptRow
from mixturelens.types import InputError, loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime.datetime(2025, 1, 1, 12, 0)
"""The date for templates that insert today's, so that numbers do not change overnight."""
SECONDS = 5.0
"""That a template may take on one prompt."""
LONGEST = 10_000_000
"""Characters of a prompt that a template makes."""
BITS = 10_000
"""Of a number that a template makes by a product or a power; and the digits that it may round to."""


def chat_text(chat: Chat, row: PromptRow, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt through the chat template; a last message of the assistant is left open, to be continued.

    Raises InputError naming the prompt for whatever the template does not take, and for a template that takes more
    time or memory than any needs.
    """
    of = getattr(tokenizer, "name_or_path", "") and f" of {tokenizer.name_or_path}"  # its folder
    if not tokenizer.chat_template:
        raise InputError(
            f"the suite has `chat:`, but the tokenizer{of} has no chat template; remove `chat:` or add one"
        )
    messages = list(row.messages or ({"role": "user", "content": row.text},))
    if chat.system is not None:
        messages = [{"role": "system", "content": chat.system}, *messages]
    opened = messages[-1]["role"] == "assistant"
    where, what = f"prompt {row.id!r} under cue {row.cue!r}", f"the chat template{of} fails on it"
    with loading(where, what), _one_world():
        try:
            with limited(SECONDS):
                text = tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=not opened,
                    continue_final_message=opened,
                    **chat.template_kwargs,
                )
        except MemoryError:
            raise InputError(f"{where}: {what} (it takes all memory); mend the template") from None
    if not isinstance(text, str) or len(text) > LONGEST:
        raise InputError(f"{where}: {what} (it makes no text of at most {LONGEST} characters); mend the template")
    return text


@contextlib.contextmanager
def _one_world() -> Iterator[None]:
    """Templates ask for today's date, and all get the same one; and none counts further than a machine can."""
    from transformers.utils import chat_template_utils as theirs

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return TODAY

    kept = theirs.datetime, theirs.ImmutableSandboxedEnvironment  # pyright: ignore[reportAttributeAccessIssue]
    theirs.datetime, theirs.ImmutableSandboxedEnvironment = Fixed, _sandbox()  # pyright: ignore
    try:
        yield
    finally:
        theirs.datetime, theirs.ImmutableSandboxedEnvironment = kept  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _sandbox() -> Any:
    """transformers' sandbox without the few operations that are one step for Python, and take hours: what takes many
    steps, `limited` stops."""
    from jinja2.exceptions import SecurityError
    from jinja2.filters import do_round
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.filters["round"] = rounded

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            bits = [each.bit_length() for each in (left, right) if isinstance(each, int)]
            if len(bits) == 2 and (bits[0] * abs(right) if operator == "**" else sum(bits)) > BITS:
                raise SecurityError(f"{operator} makes a number of more than {BITS} bits")
            return super().call_binop(context, operator, left, right)

    def rounded(value: Any, precision: int = 0, method: Any = "common") -> Any:
        if abs(precision) > BITS:
            raise SecurityError(f"rounds to more than {BITS} digits")
        return do_round(value, precision, method)

    return Bounded
