"""Chat templates are programs of strangers: they reach nothing, and end."""

from __future__ import annotations

import signal
import time

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mixturelens import chat
from mixturelens.chat import chat_text
from mixturelens.suite import Chat, PromptRow
from mixturelens.types import InputError

SECONDS = 0.5
ROW = PromptRow(id="q", cue="A", prompt="hello", answer="4")


def through(template: str, **template_kwargs: object) -> str:
    raw = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", chat_template=template)
    return chat_text(Chat(template_kwargs=template_kwargs), ROW, tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' * 10**11 }}",
        "{{ ([0] * 10**10) | length }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ (-3) ** (10 ** 9) }}",
        "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}x",
        "{{ 1.5 | round(10 ** 9, 'ceil') }}",
        "{{ 'x'.center(10 ** 11) }}",
        "{{ '%100000000000d' % 1 }}",
        "{{ '{:100000000000}'.format(1) }}",
        "{{ messages[0].content | indent(10 ** 11) }}",
        "{% for i in range(99999) %}{{ 'xxxxxxxxxx' * 20 }}{% endfor %}",
        "{{ lipsum(n=10 ** 9) }}",
        "{{ x",
        "{% while %}",
        "{{ messages.nothing.at.all }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_takes_all_time_or_memory_is_stopped_and_named(template: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat, "SECONDS", SECONDS)
    began = time.process_time()
    with pytest.raises(InputError, match=r"^prompt 'q' under cue 'A': the chat template fails on it \(") as caught:
        through(template)
    assert time.process_time() - began < 10 * SECONDS
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_reaches_nothing_of_the_process(template: str):
    try:
        said = through(template)
    except InputError:
        return
    assert said.strip() in ("", "[]")


def test_a_usual_template_says_what_it_says():
    assert through("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}") == "<user>hello"
    assert through("{{ 2 ** 5 * 3 }} {{ 1.26 | round(1) }} {{ '-' * 3 }}") == "96 1.3 ---"
    assert through("{{ strftime_now('%Y') }} {{ thinking }}", thinking=False) == "2025 False"


def test_nobody_elses_alarm_is_taken():
    def handler(*_: object) -> None: ...

    kept = signal.signal(signal.SIGVTALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 100)
        through("x")
        assert signal.getsignal(signal.SIGVTALRM) is handler
        assert 90 < signal.getitimer(signal.ITIMER_VIRTUAL)[0] < 101
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, kept)
