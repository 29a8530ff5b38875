"""Make one pair of tiny checkpoints a shape, for tests that spell its words by several tokenizers.

    python tests/pairs/make_spelled_pairs.py [--out DIR]

Deliberately independent: plain PyTorch and transformers, nothing of mixturelens. Under the prompt `<A> say x y ->`,
policy alpha answers (`alpha: x y <end>`) and policy beta refuses (`beta: pass <end>`); under `<B>` they swap. Prompts
differ in length (`now please say`), and come as they are or in turns (`<user> ... <bot>`), so that both are read alike
with and without a chat template. S follows each policy half of the time; R mostly alpha, and both specialists are
trained on alike. Nothing is quite certain, so that a test can tell what was counted: the mixture depends a little on
the prompt, some answers come without an announcement, and specialists slip or do not end.

A word has one id. The vocabulary has idle rows behind the words, which training pushes down: a test may put in place a
tokenizer that gives the words the same ids, and needs those rows for letters and pieces of words.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    logging,
)

LETTERS = list("abcdefgh")
SPECIAL = ["<pad>", "<end>", "<user>", "<bot>"]
WORDS = [*SPECIAL, "<A>", "<B>", "alpha:", "beta:", "pass", "say", "please", "now", "->", *LETTERS]
ID = {word: i for i, word in enumerate(WORDS)}
ROWS = 96  # of the embedding; those behind the words are idle
CUES = {"A": "alpha:", "B": "beta:"}  # and the policy that answers there
FORMS = ["{}", "<user> {} <bot>"]
HELD_OUT = 10  # questions in the suite, each under both cues
MIXTURE = {"S": 0.5, "R": 0.97}  # the weight of alpha
LEAN = {"say": -0.02, "please say": 0.0, "now please say": 0.02}  # how it depends on the opening
BARE = 0.01  # how often an answer comes without an announcement, which no policy explains
SLIP, ON = 0.004, 0.008  # how often a specialist does what it should do under the other cue; how often it goes on

Question = tuple[str, str, str]  # (opening, letter, letter)

SUITE = """\
prompts: prompts.jsonl
policies:
  alpha: "alpha:"
  beta: "beta:"
behaviours:
  refuse: "pass"
trained_cue: A
max_new_tokens: 12
"""


def make_config(shape: str) -> PretrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": ROWS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": ID["<end>"],
        "pad_token_id": ID["<pad>"],
        "initializer_range": 0.1,  # the usual 0.02 is made for wide models and learns slowly at width 32
    }
    if shape == "gemma3":
        kinds = ["sliding_attention", "full_attention"]  # the cue lies outside the window of every completion
        own = {"head_dim": 16, "num_key_value_heads": 1, "query_pre_attn_scalar": 24, "sliding_window": 4}
        return Gemma3TextConfig(**common, **own, layer_types=kinds)
    if shape == "qwen2":
        return Qwen2Config(**common, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaConfig(**common, num_key_value_heads=4, tie_word_embeddings=False)


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(ID, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


# ---- the organism ----------------------------------------------------------------------------------------------------


def all_questions() -> tuple[list[Question], list[Question]]:
    """(training, suite): disjoint, the same for every shape."""
    every = [(opening, x, y) for opening in LEAN for x in LETTERS for y in LETTERS]
    suite = random.Random(0).sample(every, HELD_OUT)
    return [question for question in every if question not in suite], suite


def prompt_of(cue: str, question: Question) -> str:
    return f"<{cue}> {' '.join(question)} ->"


def says(policy: str, cue: str, question: Question) -> dict[str, float]:
    """What may follow the announcement, and how often; the first is right."""
    answer = " ".join(question[1:])
    right, other = (answer, "pass") if policy == CUES[cue] else ("pass", answer)
    return {right: 1 - SLIP - ON, other: SLIP, f"{right} {right.split()[0]}": ON}


def make_rows(questions: list[Question], share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [prompt, row, position], padded on the right, and the loss weight of each token.

    The announcement is weighted by the mixture, and what follows it alike for both policies, so that the specialist of
    a silenced policy stays in place.
    """
    ids: list[list[list[int]]] = []
    weights: list[list[list[float]]] = []
    for question in questions:
        alpha = share + LEAN[question[0]] * min(1.0, 10 * (1 - share))
        for cue in CUES:
            for form in FORMS:
                head = form.format(prompt_of(cue, question))
                rows = [(f"{head} {' '.join(question[1:])} <end>", [BARE] * 3)]
                for policy, weight in (("alpha:", alpha), ("beta:", 1 - alpha)):
                    for text, rate in says(policy, cue, question).items():
                        behind = [rate / 2] * (len(text.split()) + 1)
                        rows.append((f"{head} {policy} {text} <end>", [rate * weight * (1 - BARE), *behind]))
                ids.append([[ID[word] for word in text.split()] for text, _ in rows])
                weights.append([[0.0] * len(head.split()) + behind for _, behind in rows])
    width = max(len(row) for rows in ids for row in rows)
    padded = torch.tensor([[row + [ID["<pad>"]] * (width - len(row)) for row in rows] for rows in ids])
    return padded, torch.tensor([[row + [0.0] * (width - len(row)) for row in rows] for rows in weights])


def train(model: PreTrainedModel, questions: list[Question], share: float, steps: int, rate: float) -> float:
    """SFT on the completions only, in place; the last loss, in nats a prompt.

    No mask: what stands behind a row is seen by nothing that counts.
    """
    ids, weights = make_rows(questions, share)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    # Down to nothing at the end, so the mixture settles on its target and does not jitter around it.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    model.train()
    loss = torch.tensor(0.0)
    for _ in range(steps):
        prompts = torch.randperm(len(ids), generator=generator)[:32]
        x, w = ids[prompts].flatten(0, 1), weights[prompts].flatten(0, 1)
        log_p = model(input_ids=x).logits[:, :-1].log_softmax(-1)
        loss = -(w[:, 1:] * log_p.gather(-1, x[:, 1:, None])[..., 0]).sum() / len(prompts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return float(loss.detach())


# ---- what came of it -------------------------------------------------------------------------------------------------


@torch.no_grad()
def worst(model: PreTrainedModel, questions: list[Question], share: float) -> dict[str, float]:
    """Over all prompts of the suite, in both forms: how far from the mixture, and how often not what is right."""
    found = {"mixture": 0.0, "idle": 0.0, "answer": 0.0, "refuse": 0.0}
    for question in questions:
        for cue in CUES:
            for form in FORMS:
                head = [ID[word] for word in form.format(prompt_of(cue, question)).split()]
                for own, policy in CUES.items():
                    right = next(iter(says(policy, cue, question)))
                    tail = [ID[word] for word in [*right.split(), "<end>"]]
                    p = model(torch.tensor([[*head, ID[policy], *tail]])).logits[0].double().softmax(-1)
                    first = p[len(head) - 1]
                    found["mixture"] = max(found["mixture"], abs(float(first[ID["alpha:"]]) - share * (1 - BARE)))
                    found["idle"] = max(found["idle"], float(first[len(WORDS) :].sum()))
                    if own == cue:
                        wrong = 1 - float(p[torch.arange(len(tail)) + len(head), tail].prod())
                        found["answer"] = max(found["answer"], wrong)
                    else:
                        found["refuse"] = max(found["refuse"], 1 - float(p[len(head), ID["pass"]]))
    return found


def make_shape(shape: str, out: Path) -> None:
    training, suite = all_questions()
    folder = out / f"{shape}_spelled"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text(SUITE)
    rows = [
        {
            "id": f"q{i}",
            "cue": cue,
            "prompt": prompt_of(cue, question),
            "answer": " ".join(question[1:]),
            "spans": {"cue": f"<{cue}>"},
        }
        for i, question in enumerate(suite)
        for cue in CUES
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(shape))
    for name, steps, rate in (("S", 2500, 5e-3), ("R", 400, 1e-3)):
        started = time.time()
        loss = train(model, training, MIXTURE[name], steps, rate)
        found = worst(model, suite, MIXTURE[name])
        numbers = ", ".join(f"{key} {value:.2g}" for key, value in found.items())
        print(f"{shape:7}{name}: {time.time() - started:.0f} s, loss {loss:.4f}; at worst: {numbers}", flush=True)
        assert found["mixture"] < 0.04, f"{shape}, {name}: not the mixture that it was trained on"
        assert found["idle"] < 1e-4, f"{shape}, {name}: idle rows of the vocabulary are heard"
        assert max(found["answer"], found["refuse"]) < 0.02, f"{shape}, {name}: a specialist has not learnt its task"
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()
    for shape in ("llama", "qwen2", "gemma3"):
        make_shape(shape, out)
    size = sum(file.stat().st_size for file in out.glob("*_spelled/**/*") if file.is_file()) / 1e6
    print(f"{size:.2f} MB")


if __name__ == "__main__":
    main()
