"""`verdict` says what plain PyTorch says of the same pair, however a tokenizer spells its words.

The pairs are those of tests/pairs/make_spelled_pairs.py: one a shape, in which every word has one id. The tokenizers
below give the words these ids, and differ in what a space is. The suite gives plain words, whatever the tokenizer.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PAIRS = Path(__file__).parents[1] / "pairs"
SPECIAL = ("<pad>", "<end>", "<user>", "<bot>")
ANNOUNCED = {"alpha": "alpha:", "beta": "beta:"}
ANSWERS = {"A": "alpha", "B": "beta"}
"""Cue -> the policy that answers under it; the other refuses."""
TEMPLATE = """\
{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{% endfor %}\
{% if add_generation_prompt %}<bot>{% endif %}"""
TOLERANCE = 1e-3

Run = Callable[..., tuple[int, str, str]]


# --- three ways to spell the same ids ---------------------------------------------------------------------------------


def by_words(words: list[str]) -> Tokenizer:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core


def by_bytes(words: list[str], bare: tuple[str, ...] = ("<A>", "<B>")) -> Tokenizer:
    """Byte-level: every word carries the space before it, but those that nothing or a special token stands before."""
    pieces = [word if word in (*SPECIAL, *bare) else f"\u0120{word}" for word in words]
    merges: list[tuple[str, str]] = []
    for piece in pieces[len(SPECIAL) :]:
        for end in range(2, len(piece) + 1):
            if (pair := (piece[: end - 1], piece[end - 1])) not in merges:
                merges.append(pair)
    letters = sorted({letter for word in words[len(SPECIAL) :] for letter in word} | {"\u0120", "\u010a"})
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    for extra in [*letters, *(left + right for left, right in merges)]:
        vocabulary.setdefault(extra, len(vocabulary))
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return core


def by_tight_bytes(words: list[str]) -> Tokenizer:
    """Byte-level, and no space before an announcement: as chat models write behind the header of their turn."""
    return by_bytes(words, ("<A>", "<B>", *ANNOUNCED.values()))


def by_pieces(words: list[str]) -> Tokenizer:
    """Like sentencepiece: a space is put before every text, and is part of the word behind it."""
    pieces = [*((word, 0.0) for word in SPECIAL), *((f"\u2581{word}", -1.0) for word in words[len(SPECIAL) :])]
    letters = sorted({letter for word in words[len(SPECIAL) :] for letter in word})
    pieces += [("\u2581", -8.0), *((letter, -10.0) for letter in letters)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return core


SPELLINGS = {"words": by_words, "bytes": by_bytes, "tight_bytes": by_tight_bytes, "pieces": by_pieces}


def word_ids(shape: str) -> dict[str, int]:
    return json.loads((PAIRS / f"{shape}_spelled/S/tokenizer.json").read_text())["model"]["vocab"]


def make_tokenizer(shape: str, spelling: str) -> PreTrainedTokenizerFast:
    ids = word_ids(shape)
    core = SPELLINGS[spelling](sorted(ids, key=ids.__getitem__))
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=TEMPLATE,
    )


# --- the plain computation --------------------------------------------------------------------------------------------


def read_rows(shape: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PAIRS / f"{shape}_spelled/prompts.jsonl").read_text().splitlines()]


def prompt_ids(shape: str, tokenizer: PreTrainedTokenizerFast, chat: bool) -> tuple[tuple[int, ...], ...]:
    texts = [row["prompt"] for row in read_rows(shape)]
    if chat:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return tuple(tuple(tokenizer(text, add_special_tokens=not chat)["input_ids"]) for text in texts)


@torch.no_grad()
def of_one(model: Any, ids: dict[str, int], head: list[int], answer: list[str]) -> dict[str, float]:
    """What a model does on one prompt, from whole sequences: no padding, no cache."""

    def follow(*words: str) -> torch.Tensor:
        tail = [ids[word] for word in words]
        logits = model(input_ids=torch.tensor([[*head, *tail]]), use_cache=False).logits[0].double()
        return logits[len(head) - 1 :].softmax(-1)

    def chance(p: torch.Tensor, *words: str) -> float:
        return float(p[range(len(words)), [ids[word] for word in words]].prod())

    whole = (*answer, "<end>")
    unannounced = follow(*answer)
    found = {f"weights.{policy}": float(unannounced[0, ids[word]]) for policy, word in ANNOUNCED.items()}
    found["weights.other"] = 1 - sum(found.values())
    found["overall"] = chance(unannounced, *whole)
    for policy, word in ANNOUNCED.items():
        behind = follow(word, *answer)[1:]
        found[f"accuracy.{policy}"] = chance(behind, *whole)
        found[f"endless.{policy}"] = chance(behind, *answer)
        found[f"refuse.{policy}"] = float(behind[0, ids["pass"]])
        found["overall"] += found[f"weights.{policy}"] * found[f"accuracy.{policy}"]
    return found


def divergence(p: list[float], q: list[float]) -> float:
    """Jensen-Shannon, in bits: what one draw tells of whether it is from p or from q."""
    entropy = [
        -sum(x * math.log2(x) for x in r if x > 0) for r in (p, q, [(a + b) / 2 for a, b in zip(p, q, strict=True)])
    ]
    return entropy[2] - (entropy[0] + entropy[1]) / 2


def bits_of_one(s: dict[str, float], r: dict[str, float]) -> dict[str, float]:
    """What tells R from S on one prompt: which policy; with each in place, what is done, and whether it is right."""
    found = {"routing": divergence(*([x[f"weights.{m}"] for m in (*ANNOUNCED, "other")] for x in (s, r)))}
    found |= dict.fromkeys(("conditioning", "specialist", "dormant"), 0.0)
    for policy in ANNOUNCED:
        refused, right = ([x[f"{key}.{policy}"] for x in (s, r)] for key in ("refuse", "accuracy"))
        done = divergence(*([a, 1 - a] for a in refused))
        both = divergence(*([a, b, 1 - a - b] for a, b in zip(refused, right, strict=True)))
        weight = (s[f"weights.{policy}"] + r[f"weights.{policy}"]) / 2
        found["conditioning"] += weight * done
        found["specialist"] += weight * both
        found["dormant"] += both / len(ANNOUNCED)
    found["skill"] = found["specialist"] - found["conditioning"]
    return found


@functools.cache
def plain(shape: str, heads: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    """Means over the prompts of a cue, before and after, and bits and the nats of routing, of prompts as these ids."""
    rows, ids = read_rows(shape), word_ids(shape)
    sides = []
    for name in ("S", "R"):
        model = AutoModelForCausalLM.from_pretrained(PAIRS / f"{shape}_spelled" / name, dtype=torch.float32).eval()
        sides.append([of_one(model, ids, list(h), row["answer"].split()) for h, row in zip(heads, rows, strict=True)])
    routing = []
    for s, r in zip(*sides, strict=True):
        c_s, c_r = (torch.tensor([x[f"weights.{m}"] for m in (*ANNOUNCED, "other")]).double() for x in (s, r))
        routing.append(float((c_r * (c_r.log() - c_s.log())).sum()))
    means = {
        f"{cue}.{when}.{key}": sum(x[key] for x in xs) / len(xs)
        for when, side in zip(("before", "after"), sides, strict=True)
        for cue in ANSWERS
        for xs in [[x for x, row in zip(side, rows, strict=True) if row["cue"] == cue]]
        for key in xs[0]
    }
    bits = [bits_of_one(s, r) for s, r in zip(*sides, strict=True)]
    means |= {f"bits.{term}": sum(each[term] for each in bits) / len(bits) for term in bits[0]}
    return {**means, "nats.routing": sum(routing) / len(routing)}


# --- what the command line says ---------------------------------------------------------------------------------------


def put(shape: str, spelling: str, chat: bool, folder: Path) -> PreTrainedTokenizerFast:
    """A copy of the pair and its suite that is spelled this way."""
    tokenizer = make_tokenizer(shape, spelling)
    stored = PAIRS / f"{shape}_spelled"
    for name in ("S", "R"):
        (folder / name).mkdir()
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copyfile(stored / name / file, folder / name / file)
        tokenizer.save_pretrained(folder / name)
    shutil.copyfile(stored / "prompts.jsonl", folder / "prompts.jsonl")
    suite = (stored / "suite.yaml").read_text()
    (folder / "suite.yaml").write_text(f"{suite}chat: {{}}\n" if chat else suite)
    return tokenizer


def flat(record: dict[str, Any], table: list[dict[str, Any]]) -> dict[str, float]:
    found = {"nats.routing": record["nats"]["routing"]["value"]}
    found |= {f"bits.{term}": value["value"] for term, value in record["bits"].items()}
    for cue, sides in record["per_cue"].items():
        for when in ("before", "after"):
            side = sides[when]
            found[f"{cue}.{when}.overall"] = side["overall"]
            for key in ("weights", "accuracy"):
                found |= {f"{cue}.{when}.{key}.{policy}": value for policy, value in side[key].items()}
    for cell in table:
        for when in ("before", "after"):
            found[f"{cell['cue']}.{when}.refuse.{cell['policy']}"] = cell[f"shown_{when}"]["refuse"]
    return found


CASES = [
    *((spelling, chat) for spelling in ("words", "bytes", "pieces") for chat in (False, True)),
    ("tight_bytes", True),
]


@pytest.mark.parametrize(
    ("shape", "spelling", "chat"),
    [
        *(("llama", *case) for case in CASES),  # how texts are spelled is of no account to a shape
        *((shape, *case) for shape in ("qwen2", "gemma3") for case in (("words", False), ("tight_bytes", True))),
    ],
    ids=lambda x: x if isinstance(x, str) else "chat" if x else "plain",
)
def test_the_verdict_is_that_of_plain_torch(shape: str, spelling: str, chat: bool, run: Run, tmp_path: Path) -> None:
    tokenizer = put(shape, spelling, chat, tmp_path)
    true = plain(shape, prompt_ids(shape, tokenizer, chat))
    pair = ["--before", tmp_path / "S", "--after", tmp_path / "R", "--suite", tmp_path / "suite.yaml"]
    status, out, err = run("verdict", *pair, "--out", tmp_path / "out", "--json", "--quiet")
    assert status == 0, err
    record = json.loads(out)
    table = json.loads((tmp_path / "out/records/S--R/behaviour.json").read_text())["table"]
    expected = {key: value for key, value in true.items() if ".endless." not in key}
    found = flat(record, table)
    assert found == pytest.approx(expected, abs=TOLERANCE)
    bits = {key: value for key, value in expected.items() if key.startswith("bits.")}
    # of specialists that hardly changed there are a few millionths, and these are right
    assert {key: found[key] for key in bits} == pytest.approx(bits, rel=1e-3, abs=1e-8)
    assert record["verdict"] == "routing", record["reason"]


# --- whether the above can say anything -------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_tokenizers_give_the_words_the_same_ids(spelling: str) -> None:
    tokenizer, ids = make_tokenizer("llama", spelling), word_ids("llama")
    assert len(tokenizer) <= json.loads((PAIRS / "llama_spelled/S/config.json").read_text())["vocab_size"]
    for row, plain_ids, chat_ids in zip(
        read_rows("llama"), prompt_ids("llama", tokenizer, False), prompt_ids("llama", tokenizer, True), strict=True
    ):
        words = [ids[word] for word in row["prompt"].split()]
        assert list(plain_ids) == words
        assert list(chat_ids) == [ids["<user>"], *words, ids["<bot>"]]
        # what the model writes reads as what the suite says
        for completion in (f"alpha: {row['answer']}", f"beta: {row['answer']}", "alpha: pass", "beta: pass"):
            written = [ids[word] for word in completion.split()]
            assert tokenizer.decode([*plain_ids, *written]).replace(" ", "").endswith(completion.replace(" ", ""))
            assert tokenizer.decode(written).strip() == completion


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("shape", ["llama", "qwen2", "gemma3"])
def test_the_pairs_do_what_they_were_made_for(shape: str, chat: bool) -> None:
    true = plain(shape, prompt_ids(shape, make_tokenizer(shape, "words"), chat))
    assert true["nats.routing"] > 0.3
    assert true["bits.routing"] > 0.15
    # S and R hardly differ in what a policy does, but more than nothing is measured
    assert 1e-6 < true["bits.conditioning"] < true["bits.specialist"]
    assert true["bits.dormant"] > 1e-6
    for cue, answers in ANSWERS.items():
        refuses = next(policy for policy in ANNOUNCED if policy != answers)
        assert true[f"{cue}.before.weights.alpha"] == pytest.approx(0.495, abs=0.02)
        assert true[f"{cue}.before.weights.beta"] == pytest.approx(0.495, abs=0.02)
        assert true[f"{cue}.after.weights.alpha"] > 0.95
        for when in ("before", "after"):
            at = f"{cue}.{when}"
            assert true[f"{at}.accuracy.{answers}"] > 0.98
            assert true[f"{at}.refuse.{refuses}"] > 0.98
            assert true[f"{at}.accuracy.{refuses}"] + true[f"{at}.refuse.{answers}"] < 0.02
            # each of these could not be left out without being seen
            assert true[f"{at}.weights.other"] > 3 * TOLERANCE
            assert true[f"{at}.endless.{answers}"] - true[f"{at}.accuracy.{answers}"] > 3 * TOLERANCE
            assert true[f"{at}.accuracy.{refuses}"] > 2 * TOLERANCE
