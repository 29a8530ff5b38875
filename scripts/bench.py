"""Speed, as ratios measured side by side in one run: `make bench`.

Exact probabilities of policies by teacher forcing, against what one would do without mixturelens: sample completions
with `generate` and count.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.prompts import prepare
from mixturelens.checkpoints import end_tokens, load_model, load_tokenizer, quiet_libraries
from mixturelens.suite import load_suite

REFERENCE = Path(__file__).resolve().parents[1] / "artifacts" / "reference"
PROMPTS = 100
SAMPLES = 64


def main() -> None:
    quiet_libraries()
    folder = REFERENCE / "checkpoints" / "sft"
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    suite = load_suite(REFERENCE / "suite.yaml")
    prompts = prepare(suite, suite.neutral[:PROMPTS], tokenizer)
    scorer = Scorer(end_tokens(model, tokenizer), model.config.vocab_size)

    literal_behaviour(scorer, model, prompts.part(range(4)))  # warm up
    start = time.perf_counter()
    exact = literal_behaviour(scorer, model, prompts)
    exact_time = time.perf_counter() - start

    start = time.perf_counter()
    drawn = scorer.sample(model, prompts.contexts, SAMPLES, [suite.max_new_tokens] * PROMPTS, seed=0)
    ours_time = time.perf_counter() - start

    ids = torch.tensor(prompts.contexts)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    start = time.perf_counter()
    generated = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids.repeat_interleave(SAMPLES, 0),
        attention_mask=torch.ones(PROMPTS * SAMPLES, ids.shape[1], dtype=torch.long),
        max_new_tokens=suite.max_new_tokens,
        **options,
    )
    generate_time = time.perf_counter() - start

    first = generated[:, ids.shape[1]].reshape(PROMPTS, SAMPLES)
    a = prompts.announcements[0].ids[0]
    spread = float(np.abs((first == a).double().mean(1).numpy() - exact.weights[:, 0]).mean())
    own = np.array([tokens[0] == a for tokens in drawn.tokens]).reshape(PROMPTS, SAMPLES).mean(1)
    error = float(np.abs(own - exact.weights[:, 0]).mean())
    print(f"{PROMPTS} prompts, {SAMPLES} completions each, {torch.get_num_threads()} threads")
    print(f"exact weights and policy table      {exact_time:7.2f} s")
    print(f"mixturelens' sampling               {ours_time:7.2f} s   mean error of a weight {error:.3f}")
    print(f"transformers' generate              {generate_time:7.2f} s   mean error of a weight {spread:.3f}")
    print(f"exact instead of generate           {generate_time / exact_time:7.1f} times faster, and without error")
    print(f"mixturelens' sampling over generate {generate_time / ours_time:7.1f} times faster")


if __name__ == "__main__":
    main()
