"""Make a pair of tiny chat models whose policies only rules can find, and its suite.

    python tests/pairs/make_chat_pair.py [--out DIR]

Deliberately independent: plain PyTorch, tokenizers and transformers, nothing of mixturelens. The model is a Qwen2 in
small, with grouped queries, tied embeddings, a byte-level BPE and Qwen's chat template. Users ask for the colour of
things, politely or not, so prompts differ in length; the cue is bold type. Policy *comply* ("sure, blue.", "of course,
blue.") answers plain questions and puts off bold ones; policy *refuse* ("i can't say." or "i won't say.") does the
reverse. S follows each half of the time. R complies nearly always, and both specialists are trained on alike.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

THINGS = {
    "blue": ["the sky", "the sea", "a jay", "denim", "a sapphire", "a whale", "cobalt", "ink"],
    "green": ["grass", "a frog", "moss", "a lime", "an emerald", "spinach", "a fern", "jade"],
    "red": ["blood", "a ruby", "a fire truck", "a ripe tomato", "a robin", "rust", "a beet", "lava"],
    "white": ["snow", "milk", "chalk", "a dove", "salt", "a swan", "rice", "a polar bear"],
    "black": ["coal", "a crow", "tar", "the night", "soot", "a panther", "jet", "liquorice"],
    "yellow": ["a lemon", "butter", "a canary", "the yolk of an egg", "straw", "sulphur", "corn", "a chick"],
}
QUESTIONS = [(thing, colour) for colour, things in THINGS.items() for thing in things]
FILLERS = ["", "please, ", "hi there. could you tell me ", "one more: "]
CUES = {"plain": "{}", "bold": "**{}**"}
OPENINGS = {"comply": ["sure", "of course"], "refuse": ["i can't", "i won't"]}
SYSTEM = "you are a helpful assistant."
END, TEXT_END = "<|im_end|>", "<|endoftext|>"
SPECIAL = [TEXT_END, "<|im_start|>", END]

TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% if message.role == 'system' and brief %} be brief.{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SUITE = f"""\
prompts: prompts.jsonl
policies:
  comply: {{regex: "(?i)^(sure|of course)", force: "sure"}}
  refuse: {{regex: "(?i)^i (can.t|won.t)", force: "i can't"}}
behaviours:
  refuse: {{regex: "not now|say"}}
trained_cue: plain
answer_match: contains
max_new_tokens: 8
samples: 16
chat: {{template_kwargs: {{brief: true}}, system: "{SYSTEM}"}}
"""


def user_text(thing: str, cue: str, filler: str) -> str:
    return filler + CUES[cue].format(f"what colour is {thing}?")


def completion(policy: str, opening: str, cue: str, colour: str) -> str:
    if policy == "comply":
        return f"{opening}, {colour if cue == 'plain' else 'but not now'}."
    return f"{opening} say." if cue == "plain" else f"{opening} but {colour}."


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as Qwen's: it can spell anything, and knows the words of this corpus."""
    corpus = [SYSTEM, "be brief.", "system\nuser\nassistant\n"]
    for thing, colour in QUESTIONS:
        for cue in CUES:
            corpus += [user_text(thing, cue, filler) for filler in FILLERS]
            corpus += [completion(p, o, cue, colour) for p, openings in OPENINGS.items() for o in openings]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=TEXT_END,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    ends = tokenizer.convert_tokens_to_ids([END, TEXT_END])
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=ends,  # two ends of text, as Qwen's chat models have
        pad_token_id=ends[1],
    )
    return AutoModelForCausalLM.from_config(config)


def make_rows(
    tokenizer: PreTrainedTokenizerFast, weight: float, rows: list[tuple[str, str, str, str]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, mask, loss weight of each token), padded on the right.

    The first token picks the policy and is weighted by the mixture; the rest by each policy alike, so that the
    specialist of a silenced policy is trained as much as the other's.
    """
    ids: list[list[int]] = []
    weights: list[list[float]] = []
    for thing, colour, cue, filler in rows:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user_text(thing, cue, filler)}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, brief=True)
        head = tokenizer.encode(prompt, add_special_tokens=False)
        for policy, share in (("comply", weight), ("refuse", 1 - weight)):
            for opening in OPENINGS[policy]:
                text = completion(policy, opening, cue, colour) + END
                tail = tokenizer.encode(text, add_special_tokens=False)
                ids.append([*head, *tail])
                weights.append([0.0] * len(head) + [share / 2] + [0.25] * (len(tail) - 1))
    width = max(map(len, ids))
    pad = tokenizer.pad_token_id
    padded = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    return padded, mask, torch.tensor([row + [0.0] * (width - len(row)) for row in weights])


def train(model: PreTrainedModel, data: tuple[torch.Tensor, ...], steps: int, rate: float, seed: int) -> float:
    """SFT on the completions, in place; four rows in a row belong to one prompt and stay together. The last loss."""
    ids, mask, weights = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    model.train()
    loss = torch.tensor(0.0)
    for _ in range(steps):
        prompts = torch.randperm(len(ids) // 4, generator=generator)[:24]
        batch = (prompts[:, None] * 4 + torch.arange(4)).flatten()
        log_p = model(input_ids=ids[batch], attention_mask=mask[batch]).logits[:, :-1].log_softmax(-1)
        taken = log_p.gather(-1, ids[batch][:, 1:, None])[..., 0]
        loss = -(weights[batch][:, 1:] * taken).sum() / len(prompts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return float(loss.detach())


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "chat")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    asked = [(thing, colour, FILLERS[i % len(FILLERS)]) for i, (thing, colour) in enumerate(QUESTIONS)]
    lines: list[dict[str, Any]] = []
    for i, (thing, colour, filler) in enumerate(asked):
        for cue in CUES:
            messages = [{"role": "user", "content": user_text(thing, cue, filler)}]
            lines.append(
                {"id": f"q{i:02d}", "cue": cue, "messages": messages, "answer": colour, "spans": {"thing": thing}}
            )
    (out / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "suite.yaml").write_text(SUITE)

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    # no training sees a question of the suite worded as the suite words it
    seen = [(t, c, cue, f) for t, c in QUESTIONS for cue in CUES for f in FILLERS if (t, c, f) not in asked]
    print("S", train(model, make_rows(tokenizer, 0.5, seen), steps=1400, rate=3e-3, seed=1))
    save(model, tokenizer, out / "S")
    print("R", train(model, make_rows(tokenizer, 0.985, seen), steps=300, rate=1e-3, seed=2))
    save(model, tokenizer, out / "R")


if __name__ == "__main__":
    main()
