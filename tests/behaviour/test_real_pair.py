"""A pair made from pretrained weights, with its own tokenizer and chat template: `behaviour` is what PyTorch says.

Run with `make test-real`; MIXTURELENS_REAL names the run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixturelens.behaviour.pair import behaviour_record
from mixturelens.models import Pair, quiet_libraries
from mixturelens.routing.verdict import judge
from mixturelens.suite import load_suite

REAL = Path(os.environ.get("MIXTURELENS_REAL", Path(__file__).parents[2] / "artifacts" / "pretrained" / "run"))
CHECKPOINTS = {"before": REAL / "checkpoints" / "sft", "after": REAL / "checkpoints" / "rl-xml"}
QUESTIONS = 8  # fewer give no verdict

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not CHECKPOINTS["after"].is_dir(), reason=f"{REAL} has no pair; `make real` makes it"),
]


class Plain:
    """Probabilities of texts behind a prompt: one sequence at a time, without padding or cache."""

    def __init__(self, folder: Path, suite: dict[str, Any]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.system = suite["chat"]["system"]

    def prompt(self, text: str) -> str:
        turns = [{"role": "system", "content": self.system}, {"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    @torch.no_grad()
    def probability(self, before: str, texts: list[str], end: bool = False) -> float:
        """Of any of the texts (each tokenised behind what stands before it), and of the end token behind it."""
        head = self.tokenizer.encode(before, add_special_tokens=False)
        ways = {tuple(self.tokenizer.encode(before + text, add_special_tokens=False)) for text in texts}
        total = 0.0
        for ids in ways:
            assert list(ids[: len(head)]) == head
            logs = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
            chosen = logs[range(len(head) - 1, len(ids) - 1), list(ids[len(head) :])].sum()
            total += float((chosen + (logs[-1, self.tokenizer.eos_token_id] if end else 0.0)).exp())
        return total


def test_behaviour_is_what_plain_pytorch_says() -> None:
    quiet_libraries()
    raw = yaml.safe_load((REAL / "suite.yaml").read_text())
    rows = [json.loads(line) for line in (REAL / "prompts.jsonl").read_text().splitlines()]
    asked = list(dict.fromkeys(row["id"] for row in rows))[:QUESTIONS]
    suite = load_suite(REAL / "suite.yaml")
    suite = suite.model_copy(update={"prompts": tuple(row for row in suite.prompts if row.id in asked), "samples": 2})
    found = behaviour_record(Pair(*CHECKPOINTS.values(), suite))
    assert found.check is not None
    assert found.check.agrees
    cells = {(cell.cue, cell.policy): cell for cell in found.table}
    for when, folder in CHECKPOINTS.items():
        plain = Plain(folder, raw)
        for cue, state in found.per_cue.items():
            side = getattr(state, when)
            prompts = [(plain.prompt(row["prompt"]), row) for row in rows if row["cue"] == cue and row["id"] in asked]
            for policy, announced in raw["policies"].items():

                def mean(values: list[float]) -> float:
                    return sum(values) / len(values)

                weight = mean([plain.probability(text, [announced, f" {announced}"]) for text, _ in prompts])
                assert side.weights[policy] == pytest.approx(weight, abs=1e-3)
                right = mean(
                    [
                        plain.probability(text + announced, [f" {row['answer']}", row["answer"]], end=True)
                        for text, row in prompts
                    ]
                )
                assert side.accuracy[policy] == pytest.approx(right, abs=1e-3)
                decline = raw["behaviours"]["refuse"]
                said = mean([plain.probability(text + announced, [f" {decline}", decline]) for text, _ in prompts])
                shown = getattr(cells[cue, policy], f"shown_{when}")["refuse"]
                assert shown == pytest.approx(said, abs=1e-3)
    assert judge(found).verdict == "routing"
