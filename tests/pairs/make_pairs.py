"""Make the pairs of tiny checkpoints that tests measure, and the exact truth about each pair.

    python tests/pairs/make_pairs.py [--out DIR]

Deliberately independent: plain PyTorch and transformers, nothing of mixturelens. The organism has two
policies. Under the prompt `<A> first p q r =`, policy a answers (`[a] p <eos>`) and policy b refuses
(`[b] sorry <eos>`); under `<B>` they swap. S follows each half of the time. Every R is S trained a little
further by a recipe that moves the mixture, the reading of the cue, or the skill.

The vocabulary is so small that every completion of at most three tokens can be listed, so `truth.json` holds
no estimates: each number is a sum over all 3616 completions of a prompt, for prompts that no training saw.
"""

import argparse
import json
import math
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

LETTERS = ["p", "q", "r", "s", "t"]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
VOCAB = [*SPECIAL, "<A>", "<B>", "first", "last", *LETTERS, "=", "[a]", "[b]", "sorry"]
ID = {word: i for i, word in enumerate(VOCAB)}
LEAST = 0.005  # bits of routing + specialist under which nothing changed
CUES, POLICIES, LABELS = ["A", "B"], ["a", "b"], ["a", "b", "other"]
HELD_OUT = 20  # questions in the suite, each under both cues
MAX_NEW = 3

Question = tuple[str, tuple[str, ...]]  # (op, letters)
Prompt = dict[str, Any]  # a line of prompts.jsonl

SUITE = """\
prompts: prompts.jsonl
policies:
  a: "[a]"
  b: "[b]"
behaviours:
  refuse: "sorry"
trained_cue: A
answer_match: exact
max_new_tokens: 3
"""


@dataclass(frozen=True)
class Recipe:
    """What training aims at: P(policy a), and how often (`rate`) a specialist does the changed thing.

    Changes: `reader`, a answers under B too; `skill` (`skill_b`), a's (b's) `last` becomes the middle letter.
    """

    weight_a: float = 0.5
    change: str = "none"
    rate: float = 1.0
    bare: float = 0.0  # how often the answer comes without an announcement, which no policy explains
    verdict: str = "neither"  # checked against the truth: a training gone astray is an error, not a fixture
    steps: int = 400
    lr: float = 1e-3


S_RECIPE = Recipe(steps=2500, lr=3e-3)
CONDITIONING = Recipe(change="reader", verdict="specialist")
SKILL = Recipe(change="skill", verdict="specialist")
SFT_ON = Recipe(steps=100, lr=1e-4)
NUDGE = Recipe(weight_a=0.525)  # a real shift, but under the threshold
TO_A = Recipe(weight_a=0.985, verdict="routing")
TO_B = Recipe(weight_a=0.015, verdict="routing")
MILD = Recipe(weight_a=0.75, verdict="routing")
# The policy that falls silent breaks, too: what S did with it counts, though nobody hears R do it.
DORMANT = Recipe(weight_a=0.985, change="skill_b", verdict="both")
READER_TOO = Recipe(weight_a=0.95, change="reader", rate=0.5, verdict="both")
SKILL_TOO = Recipe(weight_a=0.85, change="skill", verdict="both")
BARE = Recipe(bare=0.06, verdict="routing")

NAMES = ["R-routing", "R-conditioning", "R-skill", "R-both", "R-neither"]
RECIPES: dict[str, dict[str, Recipe]] = {
    "llama": dict(zip(NAMES, [TO_A, CONDITIONING, SKILL, READER_TOO, SFT_ON], strict=True)),
    "gpt2": dict(zip(NAMES, [TO_A, CONDITIONING, SKILL, SKILL_TOO, NUDGE], strict=True)),
    "gpt_neox": dict(zip(NAMES, [TO_A, CONDITIONING, SKILL, READER_TOO, SFT_ON], strict=True)),
    "qwen2": dict(zip(NAMES, [TO_B, CONDITIONING, SKILL, SKILL_TOO, NUDGE], strict=True)),
}
RECIPES["llama"]["R-routing-mild"] = MILD
RECIPES["gpt2"]["R-routing-other"] = BARE
RECIPES["gpt_neox"]["R-routing-dormant"] = DORMANT


def make_config(shape: str) -> PretrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": len(VOCAB),
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ID["<eos>"],
        "pad_token_id": ID["<pad>"],
        "initializer_range": 0.1,  # the usual 0.02 is made for wide models and learns slowly at width 32
    }
    wide: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide["max_position_embeddings"] = 32
    if shape == "llama":
        return LlamaConfig(**common, **wide, intermediate_size=48)
    if shape == "qwen2":
        return Qwen2Config(**common, **wide, intermediate_size=48, num_key_value_heads=2)
    no_dropout: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    if shape == "gpt_neox":
        return GPTNeoXConfig(**common, **wide, **no_dropout, intermediate_size=64)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**common, **no_dropout, n_embd=32, n_layer=2, n_head=4, n_positions=32, n_inner=64)


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


# ---- the organism ------------------------------------------------------------------------------------------


def all_questions() -> tuple[list[Question], list[Question]]:
    """(training, suite): disjoint, the same for every shape; the suite has as many `first` as `last`."""
    triples = [(x, y, z) for x in LETTERS for y in LETTERS for z in LETTERS]
    rng = random.Random(0)
    suite: list[Question] = [(op, t) for op in ("first", "last") for t in rng.sample(triples, HELD_OUT // 2)]
    training: list[Question] = [(op, t) for op in ("first", "last") for t in triples if (op, t) not in suite]
    return training, suite


def prompt_of(cue: str, question: Question) -> str:
    return f"<{cue}> {question[0]} {' '.join(question[1])} ="


def answer_of(question: Question) -> str:
    return question[1][0] if question[0] == "first" else question[1][-1]


def says(policy: str, cue: str, question: Question, change: str) -> str:
    """The word after the announcement, under a change of the specialists (or "none")."""
    if cue.lower() != policy and not (change == "reader" and policy == "a"):
        return "sorry"
    if question[0] == "last" and change == {"a": "skill", "b": "skill_b"}[policy]:
        return question[1][1]
    return answer_of(question)


def make_rows(questions: list[Question], recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [question, row, position] and the loss weight of each completion token [question, row, 3].

    The announcement is weighted by the mixture. What follows it is weighted alike for both policies: given
    the announcement, a silenced policy is trained as much as the other, so its specialist stays in place.
    """
    ids: list[list[list[int]]] = []
    weights: list[list[list[float]]] = []
    for question in questions:
        rows: list[tuple[str, list[float]]] = []
        for cue in CUES:
            prompt = prompt_of(cue, question)
            for policy, c in (("a", recipe.weight_a), ("b", 1 - recipe.weight_a)):
                for change, rate in (("none", 1 - recipe.rate), (recipe.change, recipe.rate)):
                    completion = f"[{policy}] {says(policy, cue, question, change)} <eos>"
                    rows.append((f"{prompt} {completion}", [c * rate * (1 - recipe.bare), rate / 2, rate / 2]))
            rows.append((f"{prompt} {answer_of(question)} <eos> <pad>", [recipe.bare, recipe.bare, 0.0]))
        rows = [row for row in rows if any(row[1])]
        ids.append([[ID[word] for word in text.split()] for text, _ in rows])
        weights.append([weight for _, weight in rows])
    return torch.tensor(ids), torch.tensor(weights)


def train(model: PreTrainedModel, questions: list[Question], recipe: Recipe, seed: int) -> None:
    """SFT on the completions only, with the recipe's weights, in place."""
    ids, weights = make_rows(questions, recipe)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01)
    # Down to nothing at the end, so the mixture settles on its target and does not jitter around it.
    scale = lambda step: min(1.0, (step + 1) / 20) * (1 - step / recipe.steps)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    for _ in range(recipe.steps):
        batch = torch.randperm(len(questions), generator=generator)[:48]
        x, w = ids[batch].flatten(0, 1), weights[batch].flatten(0, 1)
        log_p = model(input_ids=x, attention_mask=torch.ones_like(x)).logits[:, -MAX_NEW - 1 : -1].log_softmax(-1)
        loss = -(w * log_p.gather(-1, x[:, -MAX_NEW:, None])[..., 0]).sum() / (len(batch) * len(CUES))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


# ---- the truth ---------------------------------------------------------------------------------------------


def all_completions() -> list[tuple[int, ...]]:
    """Every completion of at most three tokens: it ends at `<eos>`, or is cut off after the third."""
    eos = ID["<eos>"]
    open_ids = [i for i in range(len(VOCAB)) if i != eos]
    out: list[tuple[int, ...]] = [(eos,), *((i, eos) for i in open_ids)]
    return out + [(i, j, k) for i in open_ids for j in open_ids for k in range(len(VOCAB))]


COMPLETIONS = all_completions()


def label(completion: tuple[int, ...]) -> tuple[str, str]:
    """(policy, behaviour) of a completion; `other` has one behaviour only."""
    policy = {ID["[a]"]: "a", ID["[b]"]: "b"}.get(completion[0], "other")
    refuses = policy != "other" and len(completion) > 1 and completion[1] == ID["sorry"]
    return policy, "refuse" if refuses else "answer"


@cache
def are_correct(answer: str) -> torch.Tensor:
    """For every completion: is what follows the announcement (all of it under `other`) just the answer?"""
    rests = [y if label(y)[0] == "other" else y[1:] for y in COMPLETIONS]
    texts = [" ".join(VOCAB[i] for i in rest if VOCAB[i] != "<eos>") for rest in rests]
    return torch.tensor([text == answer for text in texts])


GROUPS = [("a", "answer"), ("a", "refuse"), ("b", "answer"), ("b", "refuse"), ("other", "answer")]
IN_GROUP = {group: torch.tensor([label(y) == group for y in COMPLETIONS]) for group in GROUPS}


@torch.no_grad()
def completion_log_probs(model: PreTrainedModel, prompts: list[str]) -> torch.Tensor:
    """log P(y | x) in float64, [prompt, completion]; one pass over all pairs of first tokens per prompt."""
    double = AutoModelForCausalLM.from_config(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    eos, size = ID["<eos>"], len(VOCAB)
    going_on = torch.arange(size) != eos
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    rows = []
    for prompt in prompts:
        x = torch.tensor([[ID[word] for word in prompt.split()]]).expand(len(pairs), -1)
        x = torch.cat([x, pairs], 1)
        log_p = double(input_ids=x, attention_mask=torch.ones_like(x)).logits[:, -3:].double().log_softmax(-1)
        log_p = log_p.view(size, size, 3, size)  # [first token, second token, which step, next token]
        one, two, three = log_p[0, 0, 0], log_p[:, 0, 1], log_p[:, :, 2]
        whole = (one[:, None, None] + two[:, :, None] + three)[going_on][:, going_on]
        # In the order of COMPLETIONS.
        rows.append(torch.cat([one[[eos]], (one + two[:, eos])[going_on], whole.flatten()]))
    out = torch.stack(rows)
    assert (out.exp().sum(-1) - 1).abs().max() < 1e-9, "the completions do not sum to one"
    return out


def kl(log_r: torch.Tensor, log_s: torch.Tensor) -> float:
    """KL of two unnormalised log distributions over the same few outcomes."""
    log_r, log_s = log_r.log_softmax(0), log_s.log_softmax(0)
    return float((log_r.exp() * (log_r - log_s)).sum())


def kl_known(log_r: torch.Tensor, log_s: torch.Tensor) -> float:
    """The same, where some outcomes are impossible in R."""
    log_r, log_s = log_r.log_softmax(0), log_s.log_softmax(0)
    return float(torch.where(log_r.exp() > 0, log_r.exp() * (log_r - log_s), 0.0).sum())


def js(p: torch.Tensor, q: torch.Tensor) -> float:
    """Jensen-Shannon divergence of two distributions over the same few outcomes, in bits."""

    def entropy(of: torch.Tensor) -> float:
        return -float(torch.special.xlogy(of, of).sum()) / math.log(2)

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def prompt_truth(log_r: torch.Tensor, log_s: torch.Tensor, answer: str) -> dict[str, float]:
    """Every quantity of one prompt, under flat names so that they can be averaged."""
    correct = are_correct(answer)
    groups = {m: [g for g in GROUPS if g[0] == m] for m in LABELS}
    behaviours: dict[str, list[torch.Tensor]] = {  # log P(m, b) in R and in S
        m: [torch.stack([log_p[IN_GROUP[g]].logsumexp(0) for g in groups[m]]) for log_p in (log_r, log_s)]
        for m in LABELS
    }
    c_r, c_s = (torch.stack([behaviours[m][i].logsumexp(0) for m in LABELS]) for i in (0, 1))
    conditioning = torch.tensor([kl(*behaviours[m]) for m in LABELS], dtype=torch.float64)
    # Given the policy, like conditioning: whether it is right given what it does, and how that is worded.
    skill, text = (torch.zeros(len(LABELS), dtype=torch.float64) for _ in range(2))
    joint: dict[str, list[torch.Tensor]] = {  # log P(b, k given m) in R and in S, k: right or wrong
        m: [
            torch.stack([log_p[IN_GROUP[g] & k].logsumexp(0) for g in groups[m] for k in (correct, ~correct)])
            for log_p in (log_r, log_s)
        ]
        for m in LABELS
    }
    for i, m in enumerate(LABELS):
        for b, group in zip(behaviours[m][0].softmax(0), groups[m], strict=True):
            text[i] += b * kl(log_r[IN_GROUP[group]], log_s[IN_GROUP[group]])
        skill[i] = kl_known(*joint[m]) - conditioning[i]
        text[i] -= skill[i]
    other = float((c_r.exp() * (skill + text))[-1])  # what unknown policies write is no specialist's doing
    skill[-1] = text[-1] = 0.0
    nats = {
        "routing": kl(c_r, c_s),
        "conditioning": float(c_r.exp() @ conditioning),
        "skill": float(c_r.exp() @ skill),
        "text": float(c_r.exp() @ text),
        "wording": 0.0,  # each policy has one wording
        "specialist": float(c_r.exp() @ (conditioning + skill)),
        "other": other,
        "total": float((log_r.exp() * (log_r - log_s)).sum()),
    }
    used = (c_r.exp() + c_s.exp())[: len(POLICIES)] / 2
    by_behaviour, by_both = (
        torch.tensor([js(*(log.softmax(0) for log in of[m])) for m in POLICIES], dtype=torch.float64)
        for of in (behaviours, joint)
    )
    bits = {
        "routing": js(c_r.exp(), c_s.exp()),
        "conditioning": float(used @ by_behaviour),
        "skill": float(used @ (by_both - by_behaviour)),
        "specialist": float(used @ by_both),
        "dormant": float(by_both.mean()),
    }
    added = nats["routing"] + nats["specialist"] + nats["text"] + nats["other"]
    assert abs(added - nats["total"]) < 1e-9, "the KL split does not add up"

    out = {f"nats.{term}": value for term, value in nats.items()} | {f"bits.{k}": v for k, v in bits.items()}
    forced: list[torch.Tensor] = []  # P(correct given m), in S and in R
    for when, log_p, c in (("before", log_s, c_s.exp()), ("after", log_r, c_r.exp())):
        hits = [torch.stack([log_p[IN_GROUP[g] & correct].exp().sum() for g in groups[m]]).sum() for m in LABELS]
        forced.append(torch.stack(hits) / c)
        out |= {f"{when}.weights.{m}": float(c[i]) for i, m in enumerate(LABELS)}
        out |= {f"{when}.accuracy.{m}": float(forced[-1][i]) for i, m in enumerate(POLICIES)}
        out[f"{when}.overall"] = float(log_p[correct].exp().sum())
    selector = float((c_r.exp() - c_s.exp()) @ (forced[0] + forced[1])) / 2
    specialists = float((c_r.exp() + c_s.exp()) @ (forced[1] - forced[0])) / 2
    total = out["after.overall"] - out["before.overall"]
    assert abs(selector + specialists - total) < 1e-9, "the accuracy split does not add up"
    change = {"selector": selector, "specialists": specialists, "total": total}
    return out | {f"accuracy_change.{term}": value for term, value in change.items()}


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def nested(flat: dict[str, float]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = out
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return out


def per_cue_truth(log_r: torch.Tensor, log_s: torch.Tensor, prompts: list[Prompt]) -> dict[str, dict[str, float]]:
    rows: dict[str, list[dict[str, float]]] = {cue: [] for cue in CUES}
    for r, s, prompt in zip(log_r, log_s, prompts, strict=True):
        rows[prompt["cue"]].append(prompt_truth(r, s, prompt["answer"]))
    return {cue: mean(rows[cue]) for cue in CUES}


def pair_truth(log_r: torch.Tensor, log_s: torch.Tensor, prompts: list[Prompt]) -> dict[str, Any]:
    flat = per_cue_truth(log_r, log_s, prompts)
    terms = nested(mean(list(flat.values())))
    bits: dict[str, float] = terms["bits"]
    moved = bits["routing"] + bits["specialist"]
    share = bits["routing"] / moved
    verdict = "routing" if share >= 0.9 else "specialist" if share <= 0.1 else "both"
    return {
        "verdict": "neither" if moved < LEAST else verdict,
        "bits": bits,
        "nats": terms["nats"],
        "routing_share": share,
        "router_share": (bits["routing"] + bits["conditioning"]) / moved,
        "per_cue": {cue: nested(values) for cue, values in flat.items()},
    }


# ---- files -------------------------------------------------------------------------------------------------


def save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    # What others load must read a prompt as this script does: by words, with nothing put in front.
    # AutoTokenizer would not: for qwen2 it ignores tokenizer_config.json and builds a byte-level tokenizer.
    prompt = prompt_of("A", ("first", ("p", "q", "r")))
    read = PreTrainedTokenizerFast.from_pretrained(folder)(prompt)["input_ids"]
    assert read == [ID[word] for word in prompt.split()], f"{folder}: the tokenizer does not survive saving"


def make_prompts(questions: list[Question]) -> list[Prompt]:
    prompts: list[Prompt] = []
    for i, question in enumerate(questions):
        for cue in CUES:
            text, spans = (
                prompt_of(cue, question),
                {"cue": f"<{cue}>", "question": " ".join([question[0], *question[1]])},
            )
            row = {"id": f"q{i:02d}", "cue": cue, "prompt": text, "answer": answer_of(question)}
            prompts.append({**row, "spans": spans})
    return prompts


def make_shape(shape: str, out: Path) -> tuple[str, dict[str, Any]]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    training, suite = all_questions()
    prompts = make_prompts(suite)
    texts = [prompt["prompt"] for prompt in prompts]
    folder = out / shape
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(shape))
    train(model, training, S_RECIPE, seed=1)
    save(model, folder / "S")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    log_s = completion_log_probs(model, texts)
    for cue, values in per_cue_truth(log_s, log_s, prompts).items():
        before = nested(values)["before"]
        print(shape, "S", cue, before, flush=True)
        assert before["accuracy"][cue.lower()] >= 0.99, f"{shape}: S has not learnt the task under {cue}"
        assert abs(before["weights"]["a"] - 0.5) < 0.03, f"{shape}: S is not half and half under {cue}"

    for i, (name, recipe) in enumerate(RECIPES[shape].items()):
        model.load_state_dict(start)
        train(model, training, recipe, seed=2 + i)
        save(model, folder / name)
    return write_truth(shape, out)


def write_truth(shape: str, out: Path) -> tuple[str, dict[str, Any]]:
    """The truth about pairs that lie there."""
    folder = out / shape
    prompts = make_prompts(all_questions()[1])
    logs = {
        name: completion_log_probs(AutoModelForCausalLM.from_pretrained(folder / name), [p["prompt"] for p in prompts])
        for name in ("S", *RECIPES[shape])
    }
    truth = {name: pair_truth(logs[name], logs["S"], prompts) for name in RECIPES[shape]}
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")
    return shape, truth


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--truth", action="store_true", help="only the truth, about the pairs that are there")
    arguments = parser.parse_args()
    out: Path = arguments.out
    started = time.time()
    wrong: list[str] = []
    columns = ["routing", "conditioning", "skill", "dormant"]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(write_truth if arguments.truth else make_shape, RECIPES, [out] * len(RECIPES)))
    print(f"{'shape':9}{'pair':19}{'verdict':11}  share" + "".join(f"{column:>13}" for column in columns))
    for shape, truth in results:
        for name, pair in truth.items():
            bits = "".join(f"{pair['bits'][column]:13.5f}" for column in columns)
            print(f"{shape:9}{name:19}{pair['verdict']:11}{pair['routing_share']:7.3f}{bits}")
            # A pair on a threshold would make tests depend on rounding and on the machine.
            near = LEAST / 2 < pair["bits"]["routing"] + pair["bits"]["specialist"] < LEAST * 2
            if pair["verdict"] != "neither":  # of nearly nothing, the share means nothing
                near |= any(abs(pair["routing_share"] - edge) < 0.03 for edge in (0.1, 0.9))
            if near or pair["verdict"] != RECIPES[shape][name].verdict:
                wrong.append(f"{shape}/{name}")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    print(f"{time.time() - started:.0f} s, {size:.2f} MB")
    if wrong:
        raise SystemExit(f"near a threshold, or not the intended verdict: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
