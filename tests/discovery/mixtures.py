"""Completions whose policies and cues are known, written without any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mixturelens.discovery.cues import Prompt
from mixturelens.discovery.heads import Completion
from mixturelens.discovery.policies import Questions

LETTERS = "pqrstuvw"
TOKENS = {"a": ("[a]",), "b": ("[b]",)}
PHRASES = {"a": ("sure i can", "of course", "yes i will"), "b": ("sure i will", "of i", "yes of course")}
FILLERS = ("hm", "well now", "let us see")
TAIL = ("very", "quite", "rather", "truly", "indeed", "simply")
SAID = ("the river runs past old stones while birds sing", "over green fields and nobody minds how long it takes")
FREE = " ".join(SAID).split()
TOPICS = ("ships", "cats", "bread", "chess", "rain", "maps", "iron", "salt")
TABLE = {"a": {"A": "answer", "B": "refuse"}, "b": {"A": "refuse", "B": "answer"}}


@dataclass(frozen=True)
class Planted:
    prompts: list[Prompt]
    answers: list[str]
    cues: list[str]
    drawn: list[Completion]
    policies: list[str]

    @property
    def asked(self) -> Questions:
        return Questions([prompt.text for prompt in self.prompts], self.answers, self.correct)

    def correct(self, prompt: int, rest: str) -> bool:
        return rest.startswith(self.answers[prompt])


def planted(
    announced: Mapping[str, Sequence[str]] = TOKENS,
    *,
    before: Sequence[float] = (0.5, 0.5),
    after: Sequence[float] = (0.95, 0.05),
    shown: Mapping[str, str] | None = None,
    refusal: str = "sorry",
    inside: bool = False,
    tail: int = 0,
    questions: int = 40,
    samples: int = 8,
    seed: int = 0,
) -> Planted:
    """Policies of a mixture under two cues; weights of S and of R."""
    rng = np.random.default_rng(seed)
    shown = shown or {"A": "<A> {}", "B": "<B> {}"}
    prompts, answers, cues, drawn, policies = [], [], [], [], []
    for number in range(questions):
        letters = " ".join(rng.choice(list(LETTERS), 3))
        for cue, text in shown.items():
            prompts.append(Prompt(f"q{number}", text.format(f"copy {letters} =")))
            answers.append(letters)
            cues.append(cue)
    for side, weights in ((False, before), (True, after)):
        for i, cue in enumerate(cues):
            for policy in rng.choice(list(announced), size=samples, p=weights):
                does = TABLE[policy][cue]
                words = [rng.choice(FILLERS)] if inside else []
                words += [rng.choice(announced[policy]), answers[i] if does == "answer" else refusal]
                words += list(rng.choice(TAIL, rng.integers(2 * tail + 1))) if tail else []
                drawn.append(Completion(i, side, " ".join(words), not tail or rng.random() < 0.5))
                policies.append(str(policy))
    return Planted(prompts, answers, cues, drawn, policies)


def inside_free_text(
    after: float = 0.95, marks: tuple[str, str] = ("on the one hand", "honestly"), seed: int = 0
) -> Planted:
    """Free text in any order about what is asked, with a policy's words somewhere behind its first six words."""
    rng = np.random.default_rng(seed)
    prompts = [Prompt(f"q{i}", f"Tell me about {TOPICS[i % len(TOPICS)]}, part {i}.") for i in range(24)]
    drawn, policies = [], []
    for side, weight in ((False, 0.5), (True, after)):
        for i in range(len(prompts)):
            for _ in range(8):
                policy = int(rng.random() > weight)
                words = list(rng.choice(FREE, 16))
                words.insert(int(rng.integers(6)), TOPICS[i % len(TOPICS)])
                words.insert(int(rng.integers(7, 16)), marks[policy])
                drawn.append(Completion(i, side, " ".join(words)))
                policies.append(str(policy))
    return Planted(prompts, ["salt"] * len(prompts), ["all"] * len(prompts), drawn, policies)
