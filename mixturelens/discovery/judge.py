"""A second opinion on completions: a function of one's own, or a language model served on this machine.

Off unless it is asked for. It is told the candidate policies with examples of each, says which one a completion
follows, and how often it agrees with the rule is reported. It changes nothing that is proposed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import ipaddress
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from mixturelens.discovery.asked import Asked
from mixturelens.discovery.information import share_of_questions
from mixturelens.discovery.record import SecondOpinion
from mixturelens.files import read_text
from mixturelens.records import write_text
from mixturelens.types import OTHER, InputError, RunError, loading

MOST = 200
"""Completions that are judged: as many of each policy and side."""
SHOWN = 3
"""Examples of each policy."""
CHARACTERS = 600
"""Of a prompt or completion that is shown to a model."""
TIMEOUT = 60.0
"""Seconds that an answer may take."""

Candidates = Mapping[str, Sequence[str]]
"""Name of each policy -> completions of it."""
Judge = Callable[[str, str, Candidates], str]
"""(prompt, completion, candidates) -> the name of a policy, or anything else for none."""


class Second(NamedTuple):
    """A judge beside the rules: what it is called, and what makes it, given a folder where it may keep its answers."""

    name: str
    make: Callable[[Path], Judge]


class Ruled(NamedTuple):
    """A completion of a prompt, by the prompt's place among those asked, and the policy that a rule says it follows."""

    prompt: int
    completion: str
    label: str


def from_file(source: str) -> Judge:
    """Load a judge from `FILE.py:function`: a function of (prompt, completion) that returns the name of a policy.

    The file is run, so it must be one's own. Raises InputError where there is no such file or function.
    """
    path, colon, name = source.rpartition(":")
    if not colon or not Path(path).is_file():
        raise InputError(f"--labels {source}: give FILE.py:function, and a file that is there")
    found = importlib.util.spec_from_file_location("labels", path)
    if found is None or found.loader is None:
        raise InputError(f"--labels {source}: {path} is no Python file")
    module = importlib.util.module_from_spec(found)
    with loading(f"--labels {source}", "cannot be run"):
        found.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--labels {source}: {path} has no function {name!r}")
    return lambda prompt, completion, _: str(function(prompt, completion))


def served(url: str, model: str, cache: Path) -> Judge:
    """Make a judge of a model behind an OpenAI-compatible server on this machine, such as `http://127.0.0.1:8000/v1`.

    Its answers are kept in the folder `cache`. Raises InputError for a server elsewhere: what is asked does not leave
    this machine. The judge raises RunError where the server gives no answer.
    """
    check_here(url)
    client: list[Any] = []  # made for the first question, and kept: to make one takes longer than to ask

    def judge(prompt: str, completion: str, candidates: Candidates) -> str:
        asked = _question(prompt, completion, candidates)
        key = hashlib.sha256(json.dumps([url, model, asked]).encode()).hexdigest()[:24]
        file = cache / f"{key}.txt"
        if not file.is_file():
            if not client:
                client.append(_client())
            write_text(file, _ask(client[0], url, model, asked))
        said = read_text(file, "is gone").lower()
        named = [name for name in candidates if name.lower() in said]
        return max(named, key=len, default=OTHER)

    return judge


def check_here(url: str) -> None:
    """Raise InputError unless a URL is that of a server on this machine (localhost, or a loopback address)."""
    host = urlsplit(url).hostname or ""
    try:
        here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = False
    if not here or urlsplit(url).scheme not in ("http", "https"):
        raise InputError(f"--judge {url}: give a server on this machine, http://127.0.0.1:PORT/v1")


def _question(prompt: str, completion: str, candidates: Candidates) -> str:
    shown = "\n".join(
        f"- {name}: " + " | ".join(json.dumps(text[:CHARACTERS], ensure_ascii=False) for text in texts[:SHOWN])
        for name, texts in candidates.items()
    )
    return (
        f"A model answers a prompt by one of these policies, shown with examples:\n{shown}\n\n"
        f"Prompt: {json.dumps(prompt[:CHARACTERS], ensure_ascii=False)}\n"
        f"Completion: {json.dumps(completion[:CHARACTERS], ensure_ascii=False)}\n\n"
        f"Which policy does the completion follow? Answer with its name alone, or with {OTHER}."
    )


def _client() -> Any:
    import httpx

    return httpx.Client(timeout=TIMEOUT, trust_env=False)


def _ask(client: Any, url: str, model: str, asked: str) -> str:
    import httpx

    request = {"model": model, "temperature": 0, "max_tokens": 32, "messages": [{"role": "user", "content": asked}]}
    try:
        reply = client.post(f"{url.rstrip('/')}/chat/completions", json=request)
        reply.raise_for_status()
        return str(reply.json()["choices"][0]["message"]["content"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RunError(f"--judge {url}: no answer ({' '.join(str(error).split()) or type(error).__name__})") from None


def agreement(
    asked: Asked, labelled: Sequence[Ruled], candidates: Candidates, judge: tuple[str, Judge], seed: int
) -> SecondOpinion:
    """How often a judge says what the rule says, on at most MOST completions, drawn evenly over labels.

    `judge` is its name and the function itself; `candidates` are shown to it.
    """
    chosen = [labelled[i] for i in _evenly([each.label for each in labelled], seed)]
    said = [judge[1](asked.prompts[each.prompt].text, each.completion, candidates) for each in chosen]
    same = np.array([one == each.label for one, each in zip(said, chosen, strict=True)])
    return SecondOpinion(
        by=judge[0],
        completions=len(chosen),
        agreement=share_of_questions([asked.rows[each.prompt].id for each in chosen], same, seed),
        none=float(np.mean([one not in candidates for one in said])),
    )


def _evenly(labels: Sequence[str], seed: int) -> list[int]:
    """Completions of every label, as many of each as there are."""
    order = np.random.default_rng(seed).permutation(len(labels))
    kinds = list(dict.fromkeys(labels))
    each = max(1, MOST // max(1, len(kinds)))
    return sorted(int(i) for kind in kinds for i in [k for k in order if labels[k] == kind][:each])
