"""A small organism made by hand: one direction carries the cue and is read, another carries it and is read by nothing.

A Llama of two layers over words. Layer 0 writes at the policy word what layer 1 and the unembedding may read:

- head 0 is the cue reader. From a word of policy a it looks for <A>, from one of b for <B> (elsewhere at words that say
  nothing), and writes `CARRIER` where it finds it. The unembedding raises all letters with it, and lowers `sorry`:
  policy a answers under A and refuses under B, policy b the reverse.
- head 1 looks at the tag, whatever the policy word is, and at the letters of the question, and writes along `DECOY`: up
  under A and down under B, up and down with the letters. Whatever reads the residual stream behind layer 0 is blind to
  that direction. It tells the cue as well as the carrier does.

All other weights are random. Only the length of the residual stream, by which norms divide, knows of the decoy.
"""

from __future__ import annotations

import itertools
import random

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mixturelens.suite import PromptRow, Suite
from mixturelens.types import Site

LETTERS = list("abcdefgh")
WORDINGS = {policy: tuple(f"[{policy}{n}]" for n in range(8)) for policy in "ab"}
"""Many, so that no feature of an SAE stands for one of them under one cue."""
VOCAB = ["<pad>", "<eos>", "<unk>", "<A>", "<B>", "up", "down", *LETTERS, "=", *sum(WORDINGS.values(), ()), "sorry"]
ID = {word: i for i, word in enumerate(VOCAB)}
D, HEADS = 48, 3
D_HEAD = D // HEADS
SITE = Site(layer=1, component="resid_pre", position="policy")

_drawn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0].T
CARRIER, DECOY, COMMON = _drawn[0], _drawn[1], _drawn[2]
"""Orthonormal. COMMON is the same in all words and large, as in real models: it keeps norms nearly constant."""
REST = _drawn[3:]


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


def make_suite(questions: int = 40, seed: int = 0) -> Suite:
    drawn = random.Random(seed).sample(list(itertools.product(["up", "down"], *[LETTERS] * 3)), questions)
    rows = []
    for operation, *letters in drawn:
        text = " ".join(letters)
        for cue in ("A", "B"):
            rows.append(
                PromptRow(
                    id=f"{operation} {text}",
                    cue=cue,
                    prompt=f"{operation} <{cue}> {text} =",
                    answer=text,
                    spans={"cue": f"<{cue}>", "question": text},
                )
            )
    return Suite(prompts=tuple(rows), policies=dict(WORDINGS), behaviours={"refuse": "sorry"}, max_new_tokens=6)


@torch.no_grad()
def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCAB),
            hidden_size=D,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            max_position_embeddings=32,
            rope_theta=1e8,
            initializer_range=0.1,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=ID["<eos>"],
            pad_token_id=ID["<pad>"],
        )
    ).eval()
    words = torch.randn(len(VOCAB), len(REST)) @ REST / len(REST) ** 0.5
    words *= 2 / words.norm(dim=1, keepdim=True)
    model.model.embed_tokens.weight.copy_(words + 6 * COMMON)
    entering = words + 6 * COMMON
    entering = entering / entering.square().mean(1, keepdim=True).sqrt()  # as the first norm gives it
    first, second = model.model.layers
    _plant(first.self_attn, entering)
    for weight in (first.self_attn.o_proj.weight[:, 2 * D_HEAD :], first.mlp.down_proj.weight):
        weight.sub_(_onto(weight.T).T)  # nothing but the two heads writes along either direction
        weight.mul_(0.3)  # an SAE has enough to do with the words
    read = model.lm_head.weight
    read.mul_(0.5)
    read[[ID[letter] for letter in LETTERS]] += 1.5 * CARRIER
    read[ID["sorry"]] += 0.6 * COMMON - 1.5 * CARRIER
    attention, mlp = second.self_attn, second.mlp
    for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj, model.lm_head):
        reader.weight.sub_(reader.weight @ DECOY[:, None] * DECOY)
    return model


def _onto(vectors: Float[Tensor, "vector d"]) -> Float[Tensor, "vector d"]:
    """Their parts along carrier and decoy."""
    both = torch.stack([CARRIER, DECOY])
    return vectors @ both.T @ both


def _plant(attention: torch.nn.Module, words: Float[Tensor, "word d"]) -> None:
    """Queries, keys, values and outputs of heads 0 and 1 that do with each word what is asked, by least squares.

    Content is matched in the pairs of numbers that rotary positions hardly turn: the last of each half of a head.
    """
    seen = list(range(3, len(VOCAB)))
    inverse = torch.linalg.pinv(words[seen])  # [d, word]

    def answering(**numbers: float) -> Float[Tensor, " d"]:
        """What finds these numbers in these words (A for <A>, a_ for policy a's), and 0 in all others."""
        names = {"A": ("<A>",), "B": ("<B>",), "a_": WORDINGS["a"], "b_": WORDINGS["b"]}
        wanted = torch.zeros(len(VOCAB))
        for name, number in numbers.items():
            wanted[[ID[word] for word in names.get(name, (name,))]] = number
        return inverse @ wanted[seen]

    half = D_HEAD // 2
    one, two, three = half - 1, D_HEAD - 1, half - 2
    sharp = 8.0 * D_HEAD**0.5
    query, key, value, out = (getattr(attention, f"{which}_proj").weight for which in "qkvo")
    for weight in (query, key, value):
        weight[: 2 * D_HEAD] = 0
    out[:, : 2 * D_HEAD] = 0
    letters = dict.fromkeys(LETTERS, 1.0)
    silent = dict.fromkeys(("up", "down", "="), 1.0)
    others = dict.fromkeys((*LETTERS, "A", "B", "up", "down", "=", "sorry"), sharp)
    # head 0: a looks for <A>, b for <B>; where there is none, and from elsewhere, it looks at words that say nothing
    query[one], query[two] = answering(a_=2 * sharp), answering(b_=2 * sharp)
    key[one], key[two] = answering(A=1.0), answering(B=1.0)
    query[three], key[three] = answering(a_=sharp, b_=sharp, **others), answering(**silent)
    value[0] = answering(A=1.0, B=1.0)
    out[:, 0] = 3.0 * CARRIER
    # head 1: from either policy word to the tag and the letters alike
    query[D_HEAD + one], key[D_HEAD + one] = answering(a_=sharp, b_=sharp), answering(A=1.0, B=1.0, **letters)
    query[D_HEAD + three], key[D_HEAD + three] = answering(**others), answering(**silent)
    shades = {letter: 0.5 * (2 * i / (len(LETTERS) - 1) - 1) for i, letter in enumerate(LETTERS)}
    value[D_HEAD] = answering(A=1.0, B=-1.0, **shades)
    out[:, D_HEAD] = 4.0 * DECOY


def make_texts(questions: int = 1024) -> list[list[int]]:
    """Prompts under both cues with a row of policy words behind them, drawn from all, as token ids.

    So the carrier is on at some of them and off at others, whatever the decoy says.
    """
    draw, words = random.Random(0), sum(WORDINGS.values(), ())
    return [[ID[word] for word in (*row.text.split(), *draw.sample(words, 6))] for row in make_suite(questions).prompts]
