"""The whitespace that models write is found by looking, and what completions show is held against what was computed.

Models of this file are tables: the next token depends on the last one alone, so that every number follows by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_plain_torch import SPECIAL, by_bytes, by_words, make_tokenizer, put, word_ids
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mixturelens.behaviour import pair as instrument
from mixturelens.behaviour.arrays import Behaviour, Change
from mixturelens.behaviour.forced import Labelled
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.pair import measure_record
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.behaviour.settle import check_by_samples, settle
from mixturelens.routing.verdict import VerdictRecord, judge
from mixturelens.suite import Chat, Spelling, Suite
from mixturelens.types import Side

Table = Mapping[str, Mapping[str, float]]
Run = Callable[..., tuple[int, str, str]]


# --- models that are tables -------------------------------------------------------------------------------------------


def rows_of(tokenizer: PreTrainedTokenizerFast, table: Table) -> torch.Tensor:
    """Probabilities of the next token; behind what the table does not name, a completion ends."""
    ids = tokenizer.get_vocab()
    found = torch.zeros(len(ids), len(ids), dtype=torch.double)
    for word, i in ids.items():
        for following, probability in table.get(word, {"<end>": 1.0}).items():
            found[i, ids[following]] = probability
    torch.testing.assert_close(found.sum(1), torch.ones(len(ids), dtype=torch.double))
    return found


class Bigrams:
    """What a causal language model is to the scorer, and nothing else; counts how often it is asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, table: Table) -> None:
        self.logits = rows_of(tokenizer, table).log()
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: Any = 0, **_: object) -> SimpleNamespace:
        self.calls += 1
        logits = self.logits[input_ids]
        kept = logits[:, logits_to_keep] if isinstance(logits_to_keep, torch.Tensor) else logits[:, -logits_to_keep:]
        return SimpleNamespace(logits=kept, past_key_values=None)


def save_bigrams(folder: Path, tokenizer: PreTrainedTokenizerFast, table: Table) -> None:
    """The same as a checkpoint: a Llama whose only layer adds nothing, between identity and table."""
    rows = rows_of(tokenizer, table).log().clamp(min=-40).float()
    width = len(rows) + len(rows) % 2
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(rows),
            hidden_size=width,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.model.norm, *(layer.input_layernorm for layer in model.model.layers)):
            norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(len(rows), width))
        model.lm_head.weight[:, : len(rows)] = rows.T / math.sqrt(width)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def with_and_without_space() -> PreTrainedTokenizerFast:
    """Byte-level: each word once with the space before it, once without."""
    bare = ["alpha:", "beta:", "x", "pass"]
    words = [*SPECIAL, "<A>", "<B>", "\u0120->", "\u0120=>", *(f"\u0120{word}" for word in bare), *bare]
    return wrapped(by_bytes(words, tuple(words)))


def suite(**changes: Any) -> Suite:
    """Two questions under two cues; the last token of a prompt says the cue to a table."""
    rows = [
        {"id": f"q{i}", "cue": cue, "prompt": f"<{cue}>{' x' * (i + 1)} {end}", "answer": "x"}
        for i in range(2)
        for cue, end in (("A", "->"), ("B", "=>"))
    ]
    base = {"prompts": rows, "policies": {"a": "alpha:", "b": "beta:"}, "behaviours": {"refuse": "pass"}}
    return Suite.model_validate({**base, "max_new_tokens": 12, **changes})


ENDS = {"<end>": 0.95, "\u0120x": 0.05}
ALPHA = {"\u0120x": 0.6, "x": 0.3, "\u0120pass": 0.08, "<end>": 0.02}
BETA = {"\u0120pass": 0.9, "\u0120x": 0.0596, "x": 0.0004, "<end>": 0.04}
BEHIND = {"\u0120alpha:": ALPHA, "alpha:": ALPHA, "\u0120beta:": BETA, "beta:": BETA, "\u0120x": ENDS, "x": ENDS}
BOTH = {"\u0120alpha:": 0.45, "alpha:": 0.15, "\u0120beta:": 0.3, "beta:": 0.08, "<end>": 0.02}


def settled(found: Suite, tokenizer: PreTrainedTokenizerFast, *models: Any) -> Spelling:
    return settle(Scorer([tokenizer.eos_token_id], len(tokenizer)), models, found, tokenizer)


# --- whitespace is found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "chat", "lead"),
    [
        ("bytes", False, " "),
        ("bytes", True, " "),
        ("pieces", False, " "),
        ("pieces", True, ""),  # behind a special token, the tokenizer itself puts the space before a word
        ("tight_bytes", True, ""),
    ],
)
def test_the_whitespace_of_a_trained_pair_is_found(load_pair, spelling: str, chat: bool, lead: str):
    pair, tokenizer = load_pair("llama_spelled", "R"), make_tokenizer("llama", spelling)
    found = pair.suite.model_copy(update={"chat": Chat() if chat else None})
    assert settle(pair.scorer, [pair.before, pair.after], found, tokenizer) == Spelling(
        lead={"A": (lead,), "B": (lead,)}, gap={"alpha:": (" ",), "beta:": (" ",)}
    )


class Counted:
    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0

    def __call__(self, **arguments: Any) -> Any:
        self.calls += 1
        return self.model(**arguments)


def test_where_whitespace_makes_no_difference_no_model_is_run(load_pair):
    pair = load_pair("llama_spelled", "R")
    models = [Counted(pair.before), Counted(pair.after)]
    assert settle(pair.scorer, models, pair.suite, make_tokenizer("llama", "words")) == Spelling()
    assert [model.calls for model in models] == [0, 0]
    settle(pair.scorer, models, pair.suite, make_tokenizer("llama", "bytes"))
    assert min(model.calls for model in models) > 0


def test_a_suite_that_gives_its_spelling_is_taken_at_its_word():
    tokenizer = with_and_without_space()
    model = Bigrams(tokenizer, {"\u0120->": BOTH, "\u0120=>": BOTH, **BEHIND})
    own = Spelling(lead={"A": ("\n",)})
    assert settled(suite(spelling=own), tokenizer, model) == own
    assert model.calls == 0


def test_ways_to_write_whitespace_are_kept_by_their_weight_under_each_cue():
    tokenizer = with_and_without_space()
    tight = {"alpha:": 0.5, "beta:": 0.48, "<end>": 0.02}
    model = Bigrams(tokenizer, {"\u0120->": BOTH, "\u0120=>": tight, **BEHIND})
    # behind beta, `x` without a space has 0.0004 / 0.9596 of the weight of the usual way: less than a thousandth
    assert settled(suite(), tokenizer, model) == Spelling(
        lead={"A": (" ", ""), "B": ("",)}, gap={"alpha:": (" ", ""), "beta:": (" ",)}
    )


@pytest.mark.parametrize(("rare", "kept"), [(0.002, (" ", "")), (0.0005, (" ",))])
def test_a_way_that_hardly_carries_weight_is_left_out(rare: float, kept: tuple[str, ...]):
    tokenizer = with_and_without_space()
    ahead = {"\u0120alpha:": 0.9, "alpha:": rare, "<end>": 0.1 - rare}
    model = Bigrams(tokenizer, {"\u0120->": ahead, "\u0120=>": ahead, **BEHIND})
    assert settled(suite(), tokenizer, model).lead == {"A": kept, "B": kept}


def test_both_models_are_looked_at_and_the_most_usual_way_is_the_first():
    tokenizer = with_and_without_space()
    spaced = {"\u0120alpha:": 0.4, "\u0120beta:": 0.4, "<end>": 0.2}
    tight = {"alpha:": 0.9, "beta:": 0.1}
    s, r = (Bigrams(tokenizer, {"\u0120->": each, "\u0120=>": each, **BEHIND}) for each in (spaced, tight))
    assert settled(suite(), tokenizer, s, r).lead == {"A": ("", " "), "B": ("", " ")}
    assert settled(suite(), tokenizer, s).lead == {"A": (" ",), "B": (" ",)}


def test_an_announcement_that_ends_in_a_newline_beside_one_that_does_not():
    """Each is followed by what the models write behind it, whatever the suite says."""
    tokenizer = with_and_without_space()
    ahead = {"\u0120alpha:": 0.6, "\u0120beta:": 0.4}
    line = {"\u010a": 0.9, "\u0120x": 0.1}
    table = {**BEHIND, "\u0120->": ahead, "\u0120=>": ahead, "\u0120alpha:": line, "\u010a": {"x": 0.7, "pass": 0.3}}
    for policies in ({"a": "alpha:\n", "b": "beta:"}, {"a": "alpha:", "b": "beta:\n"}):
        found, model = suite(policies=policies), Bigrams(tokenizer, table)
        spelling = settled(found, tokenizer, model)
        assert spelling.lead == {"A": (" ",), "B": (" ",)}
        assert spelling.gap == {policies["a"]: ("\n", " "), policies["b"]: (" ",)}
        spelled = found.model_copy(update={"spelling": spelling})
        prompts = prepare(spelled, spelled.neutral, tokenizer)
        measured = literal_behaviour(Scorer([tokenizer.eos_token_id], len(tokenizer)), model, prompts)
        np.testing.assert_allclose(measured.weights, [[0.6, 0.4, 0.0]] * 4, atol=1e-12)
        right = (0.9 * 0.7 + 0.1) * 0.95
        np.testing.assert_allclose(measured.forced_correct[..., 0], [[right, 0.0596 * 0.95]] * 4, atol=1e-12)
        np.testing.assert_allclose(measured.forced_behaviour[..., 0, 0], [[0.9 * 0.3, 0.9]] * 4, atol=1e-12)


def test_a_script_without_spaces_needs_none():
    """To its tokenizer, whitespace is unknown; models write none."""
    letters = ["<pad>", "<unk>", "<end>", *"甲乙问答：三四？不"]
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    rows = [
        {"id": f"q{i}", "cue": "A", "prompt": f"问{what}？", "answer": "四"} for i, what in enumerate(("三", "三三"))
    ]
    found = suite(prompts=rows, policies={"a": "甲：", "b": "乙："}, behaviours={"refuse": "不"})
    ahead = {"？": {"甲": 0.7, "乙": 0.3}, "甲": {"：": 1.0}, "乙": {"：": 1.0}, "：": {"四": 0.8, "不": 0.2}}
    model = Bigrams(tokenizer, ahead)
    spelling = settled(found, tokenizer, model)
    assert spelling == Spelling(lead={"A": ("",)}, gap={"甲：": ("",), "乙：": ("",)})
    spelled = found.model_copy(update={"spelling": spelling})
    record = measure_record(Scorer([tokenizer.eos_token_id], len(tokenizer)), [model], spelled, tokenizer)
    side = record.per_cue["A"].before
    assert side.weights == pytest.approx({"a": 0.7, "b": 0.3, "other": 0.0}, abs=1e-12)
    assert side.accuracy == pytest.approx({"a": 0.8, "b": 0.8}, abs=1e-12)
    assert record.check is not None
    assert record.check.agrees
    assert {text[:2] for text in record.check.examples["before"]["A"]} <= {"甲：", "乙："}


def test_where_no_announcement_is_ever_written_nothing_is_settled():
    tokenizer = with_and_without_space()
    model = Bigrams(tokenizer, {})
    assert settled(suite(), tokenizer, model) == Spelling()


def test_where_policies_announce_nothing_the_whitespace_before_their_completions_is_found():
    tokenizer = with_and_without_space()
    tables = {"a": {"table": {"A": "answer", "B": "refuse"}}, "b": {"table": {"A": "refuse", "B": "answer"}}}
    ahead = {"\u0120x": 0.5, "\u0120pass": 0.5}
    model = Bigrams(tokenizer, {"\u0120->": ahead, "\u0120=>": {"x": 0.5, "pass": 0.5}})
    assert settled(suite(policies=tables), tokenizer, model) == Spelling(lead={"A": (" ",), "B": ("",)})


# --- both spellings are counted ---------------------------------------------------------------------------------------


def test_both_spellings_count_where_both_carry_weight():
    tokenizer = with_and_without_space()
    model = Bigrams(tokenizer, {"\u0120->": BOTH, "\u0120=>": BOTH, **BEHIND})
    scorer = Scorer([tokenizer.eos_token_id], len(tokenizer))
    spelled = suite().model_copy(update={"spelling": settled(suite(), tokenizer, model)})
    found = literal_behaviour(scorer, model, prepare(spelled, spelled.neutral, tokenizer))
    number = len(spelled.neutral)
    exact = {"rtol": 0, "atol": 1e-12}
    # alpha: 0.45 with the space and 0.15 without; beta: 0.3 and 0.08
    np.testing.assert_allclose(found.weights, [[0.6, 0.38, 0.02]] * number, **exact)
    # behind alpha, x with the space 0.6 and without 0.3, each ended with 0.95; of beta only the first way is kept
    np.testing.assert_allclose(found.forced_correct[..., 0], [[0.9 * 0.95, 0.0596 * 0.95]] * number, **exact)
    np.testing.assert_allclose(found.correct[:, :2], [[0.6 * 0.855, 0.38 * 0.0596 * 0.95]] * number, **exact)
    np.testing.assert_allclose(found.forced_behaviour[:, 0, 0], [[0.08, 0.92]] * number, **exact)
    np.testing.assert_allclose(found.forced_behaviour[:, 1, 0], [[0.9, 0.1]] * number, **exact)
    np.testing.assert_allclose(found.classes[:, 0, 0], [[0.6 * 0.08, 0.6 * 0.92]] * number, **exact)
    # one spelling alone misses the other
    one = suite(spelling={"lead": dict.fromkeys("AB", (" ",)), "gap": {"alpha:": (" ",)}})
    found = literal_behaviour(scorer, model, prepare(one, one.neutral, tokenizer))
    np.testing.assert_allclose(found.weights, [[0.45, 0.3, 0.25]] * number, **exact)
    np.testing.assert_allclose(found.forced_correct[:, 0, 0], [0.6 * 0.95] * number, **exact)


def test_samples_agree_with_both_spellings_and_contradict_one_alone():
    """Drawn completions know nothing of spellings: with one way alone they contradict what was computed."""
    tokenizer = with_and_without_space()
    other = {**BOTH, "\u0120alpha:": 0.6, "alpha:": 0.24, "\u0120beta:": 0.1, "beta:": 0.04}
    models = [Bigrams(tokenizer, {"\u0120->": each, "\u0120=>": each, **BEHIND}) for each in (BOTH, other)]
    scorer = Scorer([tokenizer.eos_token_id], len(tokenizer))
    spelling = settled(suite(), tokenizer, *models)
    assert spelling.lead == {"A": (" ", ""), "B": (" ", "")}
    for given, agrees in ((spelling, True), (Spelling(lead={"A": (" ",), "B": (" ",)}), False)):
        spelled = suite(samples=100).model_copy(update={"spelling": given})
        check = measure_record(scorer, models, spelled, tokenizer).check
        assert check is not None
        assert check.completions == 480
        assert check.agrees is agrees
        shown = check.examples["before"]["A"]
        assert len(shown) == 3
        assert {text.strip().split(":")[0] for text in shown} <= {"alpha", "beta", ""}
    seen = {(each.checkpoint, each.cue, each.what): each.literal for each in check.disagreements}
    for cue in "AB":
        assert seen["after", cue, "policy a"] == pytest.approx(0.6, abs=1e-12)
        assert seen["after", cue, "policy other"] == pytest.approx(0.3, abs=1e-12)


# --- the check by samples, on the command line ------------------------------------------------------------------------

NOTHING = {"value": None, "low": None, "high": None}


def assert_nothing_is_given(record: dict[str, Any]) -> None:
    """No share, no term, on average or under any cue."""
    given = [record["routing_share"], record["router_share"], *record["text"].values()]
    for state in (record, *record["per_cue"].values()):
        given += [*state["bits"].values(), *state["nats"].values()]
    assert all(each == NOTHING for each in given)
    assert record["changed"] == {"selector": None, "cue_reader": None, "skill": None}
    assert record["text_drifted"] is None


def verdict_of(run: Run, folder: Path) -> dict[str, Any]:
    pair = ["--before", folder / "S", "--after", folder / "R", "--suite", folder / "suite.yaml"]
    status, out, err = run("verdict", *pair, "--out", folder / "out", "--json", "--quiet")
    assert status == 0, err
    return json.loads(out)


def in_bytes(word: str) -> str:
    """A word as a byte-level tokenizer writes it in its vocabulary."""
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(False, False).pre_tokenize_str(word))


def respell(folder: Path, written: dict[str, str]) -> None:
    """The llama pair, byte-level, with announcements called otherwise: same ids, other texts."""
    put("llama", "bytes", False, folder)
    ids = word_ids("llama")
    words = [in_bytes(written.get(word, word)) for word in sorted(ids, key=ids.__getitem__)]
    for side in ("S", "R"):
        wrapped(by_bytes(words)).save_pretrained(folder / side)


WRONG = {
    # what the models write, what the suite says of alpha, and how it is said that the two differ
    "quote mark": ({"alpha:": "“alpha”:", "beta:": '"beta":'}, '"alpha":', "begin with '“alpha”:'"),
    "capital": ({}, "Alpha:", "begin with 'alpha:'"),
    "dash": ({"alpha:": "al—pha:"}, "al-pha:", "begin with 'al—pha:'"),
    "no colon": ({"alpha:": "alpha"}, "alpha:", "begin with 'alpha'"),
    "words before it": ({"alpha:": "now-alpha:"}, "alpha:", "write 'alpha:' of policy 'alpha' only behind 'now-'"),
}


@pytest.mark.parametrize(
    "what",
    [
        "quote mark",
        "words before it",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("capital", "dash", "no colon")),
    ],
)
def test_an_announcement_that_is_spelled_wrongly_is_inconclusive_and_both_spellings_are_named(
    run: Run, tmp_path: Path, what: str
):
    written, said, seen = WRONG[what]
    respell(tmp_path, written)
    text = (tmp_path / "suite.yaml").read_text()
    beta = written.get("beta:", "beta:")

    def put_suite(alpha: str) -> None:
        changed = text.replace('"alpha:"', f"'{alpha}'").replace('"beta:"', f"'{beta}'")
        (tmp_path / "suite.yaml").write_text(changed, encoding="utf-8")

    put_suite(said)
    record = verdict_of(run, tmp_path)
    assert record["verdict"] == "inconclusive"
    first = record["check"]["misspelled"][0]
    assert record["reason"] == f"The suite cannot say: its texts are not what the checkpoints write: {first}."
    alpha = written.get("alpha:", "alpha:")
    example = next(text for text in record["check"]["examples"]["before"]["A"] if alpha in text)
    number = int(first.removeprefix("under A before, ").split()[0])
    assert 24 <= number <= 56  # half of 80, as alpha is in S
    how = "do the prompts end too early?"
    if what != "words before it":
        how = f"where the suite spells policy 'alpha' '{said}'"
    between = ": " if what == "words before it" else ", "
    assert first == f"under A before, {number} of 80 completions {seen}{between}{how} ({example!r})"
    assert len(record["check"]["misspelled"]) == 4
    assert not record["check"]["agrees"]
    assert_nothing_is_given(record)
    put_suite(alpha)
    record = verdict_of(run, tmp_path)
    assert record["verdict"] == "routing", record["reason"]
    assert record["check"]["misspelled"] == []


def test_a_right_suite_agrees_and_shows_what_completions_look_like(run: Run, tmp_path: Path):
    put("llama", "bytes", False, tmp_path)
    record = verdict_of(run, tmp_path)
    assert record["verdict"] == "routing"
    assert record["routing_share"]["value"] == pytest.approx(1.0, abs=1e-3)
    check = record["check"]
    assert (check["agrees"], check["disagreements"], check["misspelled"], check["hints"]) == (True, [], [], [])
    assert check["completions"] == 2 * 20 * 8
    for side in ("before", "after"):
        for cue in "AB":
            shown = check["examples"][side][cue]
            assert len(shown) == 3
            assert all(text.startswith((" alpha:", " beta:")) for text in shown)
    behaviour = json.loads((tmp_path / "out/records/S--R/behaviour.json").read_text())
    assert behaviour["check"] == check
    assert behaviour["spelling"]["lead"] == {"A": [" "], "B": [" "]}


QUESTIONS = [f"q{i}" for i in range(10)]


def put_tables(folder: Path, last: str, *, cut: bool) -> None:
    """A pair of tables that write a last word, the policy, and what it does; prompts end behind it, or before."""
    tokenizer = wrapped(by_words([*SPECIAL, "<A>", "<B>", *QUESTIONS, last, "alpha:", "beta:", "x", "pass"]))
    for name, alpha in (("S", 0.5), ("R", 0.9)):
        table = {
            **{question: {last: 0.97, "<end>": 0.03} for question in QUESTIONS},
            last: {"alpha:": alpha, "beta:": 0.98 - alpha, "<end>": 0.02},
            "alpha:": {"x": 0.95, "pass": 0.05},
            "beta:": {"pass": 0.9, "x": 0.1},
        }
        save_bigrams(folder / name, tokenizer, table)
    end = "" if cut else f" {last}"
    rows = [{"id": q, "cue": cue, "prompt": f"<{cue}> {q}{end}", "answer": "x"} for q in QUESTIONS for cue in "AB"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policies = "policies: {a: 'alpha:', b: 'beta:'}\nbehaviours: {refuse: pass}\n"
    (folder / "suite.yaml").write_text(f"prompts: prompts.jsonl\n{policies}max_new_tokens: 6\n")


@pytest.mark.parametrize("last", ["so", "->"])
def test_prompts_that_end_too_early_are_inconclusive_and_what_is_written_first_is_named(
    run: Run, tmp_path: Path, last: str
):
    put_tables(tmp_path, last, cut=True)
    record = verdict_of(run, tmp_path)
    assert record["verdict"] == "inconclusive"
    assert record["coverage"]["before"]["value"] == pytest.approx(0.0, abs=1e-9)
    first, *_, end = record["check"]["misspelled"]
    assert record["reason"] == f"The suite cannot say: its texts are not what the checkpoints write: {first}."
    # under B in R, nine in ten are alpha
    if last == "so":
        assert " completions write 'alpha:' of policy 'a' only behind 'so': do the prompts end too early? ('so " in end
    else:
        assert " completions begin with '-> alpha:', where the suite spells policy 'a' 'alpha:' ('-> alpha: " in end
    assert_nothing_is_given(record)


def test_prompts_that_end_where_the_model_goes_on_give_the_number_that_follows_by_hand(run: Run, tmp_path: Path):
    put_tables(tmp_path, "so", cut=False)
    record = verdict_of(run, tmp_path)
    assert record["verdict"] == "routing", record["reason"]
    routing = 0.9 * math.log(0.9 / 0.5) + 0.08 * math.log(0.08 / 0.48)
    assert record["nats"]["routing"]["value"] == pytest.approx(routing, abs=1e-5)
    bits = [p * math.log2(2 * p / (p + q)) / 2 for a, b in ((0.9, 0.5), (0.08, 0.48)) for p, q in ((a, b), (b, a))]
    assert record["bits"]["routing"]["value"] == pytest.approx(sum(bits), abs=1e-5)
    for unit in ("bits", "nats"):
        assert record[unit]["specialist"]["value"] == pytest.approx(0.0, abs=1e-5)
    assert record["text_drifted"] is False
    after = record["per_cue"]["A"]["after"]
    assert after["weights"] == pytest.approx({"a": 0.9, "b": 0.08, "other": 0.02}, abs=1e-5)
    assert after["accuracy"] == pytest.approx({"a": 0.95, "b": 0.1}, abs=1e-5)
    assert record["check"]["agrees"]


def test_prompts_of_a_trained_pair_that_lack_their_last_word_are_inconclusive(run: Run, tmp_path: Path):
    put("llama", "bytes", False, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    cut = [{**row, "prompt": row["prompt"].removesuffix(" ->")} for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cut))
    record = verdict_of(run, tmp_path)
    assert record["verdict"] == "inconclusive"
    assert record["reason"] == (
        "The suite cannot say: the known policies cover only 0.000 [0.000, 0.000] of the completions before, and 0.9 "
        "is needed; under A before, 80 of 80 completions show no known policy (''); "
        "under B before, 80 of 80 completions show no known policy ('')."
    )
    # the little that is left says nothing about the pair
    assert_nothing_is_given(record)


# --- probabilities that samples contradict ----------------------------------------------------------------------------


def swapped(found: Behaviour, rows: np.ndarray) -> Behaviour:
    """Policies a and b changed places on some prompts."""
    classes, right = found.classes.copy(), found.right.copy()
    classes[rows], right[rows] = classes[rows][:, [1, 0, 2]], right[rows][:, [1, 0, 2]]
    return replace(found, classes=classes, right=right)


def a_pair() -> tuple[Scorer, list[Bigrams], PreTrainedTokenizerFast, Suite]:
    tokenizer = with_and_without_space()
    mostly = {"\u0120alpha:": 0.9, "\u0120beta:": 0.08, "<end>": 0.02}
    hardly = {"\u0120alpha:": 0.05, "\u0120beta:": 0.93, "<end>": 0.02}
    models = [Bigrams(tokenizer, {"\u0120->": each, "\u0120=>": each, **BEHIND}) for each in (mostly, hardly)]
    found = suite(samples=40)
    spelled = found.model_copy(update={"spelling": settled(found, tokenizer, *models)})
    return Scorer([tokenizer.eos_token_id], len(tokenizer)), models, tokenizer, spelled


@pytest.mark.parametrize(("side", "cue"), [("before", "A"), ("before", "B"), ("after", "B")])
def test_a_wrong_probability_is_contradicted_and_named(monkeypatch: pytest.MonkeyPatch, side: Side, cue: str):
    scorer, models, tokenizer, found = a_pair()
    plain = measure_record(scorer, models, found, tokenizer)
    assert plain.check is not None
    assert plain.check.agrees
    right = instrument.measure_change

    def wrong(*given: Any) -> Change:
        change = right(*given)
        rows = np.array([row.cue == cue for row in found.neutral])
        return replace(change, **{side: swapped(getattr(change, side), rows)})

    monkeypatch.setattr(instrument, "measure_change", wrong)
    record = measure_record(scorer, models, found, tokenizer)
    assert record.check is not None
    assert not record.check.agrees
    assert record.check.misspelled == ()
    assert {(each.checkpoint, each.cue) for each in record.check.disagreements} == {(side, cue)}
    worst = record.check.disagreements[0]
    literal = {each.what: each.literal for each in record.check.disagreements}
    truly = {"before": {"policy a": 0.9, "policy b": 0.08}, "after": {"policy a": 0.05, "policy b": 0.93}}[side]
    assert literal["policy a"] == pytest.approx(truly["policy b"], abs=1e-12)
    assert literal["policy b"] == pytest.approx(truly["policy a"], abs=1e-12)
    assert worst.what.startswith("policy ")
    assert abs(worst.literal - worst.sampled) > 0.7
    said = judge(record)
    assert said.verdict == "inconclusive"
    examples = ", ".join(map(repr, record.check.examples[side][cue]))
    assert said.reason == (
        "The suite cannot say: its texts are not what the checkpoints write: "
        f"under {cue} {side}, {worst.what} has probability {worst.literal:.2f} as the suite spells it, "
        f"and {worst.sampled:.2f} of the completions show it; they look like {examples}."
    )
    assert_nothing_is_given(json.loads(said.to_json()))
    assert said.check == record.check
    assert VerdictRecord.model_validate_json(said.to_json()) == said


def test_a_wrong_probability_of_one_checkpoint_alone_is_contradicted(monkeypatch: pytest.MonkeyPatch):
    scorer, models, tokenizer, found = a_pair()
    right = instrument.measure
    plain = measure_record(scorer, models[:1], found, tokenizer).check
    assert plain is not None
    assert plain.agrees
    assert plain.completions == 2 * 16
    assert set(plain.examples) == {"before"}
    everywhere = np.full(len(found.neutral), True)
    monkeypatch.setattr(instrument, "measure", lambda *given: swapped(right(*given), everywhere))
    check = measure_record(scorer, models[:1], found, tokenizer).check
    assert check is not None
    assert not check.agrees
    assert {each.checkpoint for each in check.disagreements} == {"before"}
    assert {each.cue for each in check.disagreements} == {"A", "B"}


# --- false alarms -----------------------------------------------------------------------------------------------------


def many_prompts() -> Prompts:
    """20 questions under two cues, for a table's tokenizer."""
    tokenizer = wrapped(by_words([*SPECIAL, "<A>", "<B>", *QUESTIONS, "->", "alpha:", "beta:", "x", "pass"]))
    rows = [
        {"id": f"{one}-{other}", "cue": cue, "prompt": f"<{cue}> {one} {other} ->", "answer": "x"}
        for one in QUESTIONS
        for other in QUESTIONS[:2]
        for cue in "AB"
    ]
    found = suite(prompts=rows)
    return prepare(found, found.neutral, tokenizer)


def some_behaviour(number: int, rng: np.random.Generator) -> Behaviour:
    classes = rng.dirichlet([0.5] * 6, size=number).reshape(number, 3, 1, 2)
    classes[:, 2, 0, 1] += classes[:, 2, 0, 0]  # of no known policy, nothing is said
    classes[:, 2, 0, 0] = 0.0
    right = np.zeros_like(classes)
    right[:, :, 0, 1] = classes[:, :, 0, 1] * rng.uniform(size=(number, 3))
    return Behaviour(classes, right, *(np.full((number, 2, 1, 2), np.nan) for _ in range(2)))


def draw(true: Behaviour, samples: int, rng: np.random.Generator) -> tuple[np.ndarray, Labelled, list[str]]:
    """Completions as they would be labelled: (prompt of each, labels, texts)."""
    number = len(true.classes)
    context = np.repeat(np.arange(number), samples)
    flat = true.classes.reshape(number, -1)[context]
    kind = (flat.cumsum(1) > rng.uniform(size=(len(context), 1)) * flat.sum(1, keepdims=True)).argmax(1)
    policy, behaviour = kind // 2, kind % 2
    at = context, policy
    chance = np.where(behaviour == 1, true.correct[at] / np.maximum(true.classes[:, :, 0, 1][at], 1e-12), 0.0)
    right = rng.uniform(size=len(context)) < chance
    label = Labelled(policy, np.zeros(len(context), int), behaviour, right)
    return context, label, [("alpha: x", "beta: x", "x")[each] for each in policy]


def test_true_probabilities_are_not_contradicted():
    """200 checks of both checkpoints, 80 completions under each cue: at most one may be a false alarm."""
    prompts, rng = many_prompts(), np.random.default_rng(0)
    assert len(prompts.rows) == 40
    alarms = 0
    for _ in range(200):
        sides: dict[Side, Any] = {}
        for side in ("before", "after"):
            true = some_behaviour(len(prompts.rows), rng)
            sides[side] = (true, *draw(true, 4, rng))
        check = check_by_samples(prompts, sides)
        assert check.completions == 320
        alarms += not check.agrees
    assert alarms <= 1


@pytest.mark.parametrize(("moved", "least"), [(0.35, 20), (0.25, 10)])
def test_probabilities_that_are_far_off_are_contradicted(moved: float, least: int):
    """A weight that is moved from one policy to the other, of all prompts: often found, and named."""
    prompts, rng = many_prompts(), np.random.default_rng(1)
    found = 0
    for _ in range(20):
        true = some_behaviour(len(prompts.rows), rng)
        classes = true.classes.copy()
        classes[:, 0, 0] *= 0.02
        classes[:, 1, 0] += moved / 2
        classes /= classes.sum((1, 2, 3), keepdims=True)
        wrong = replace(true, classes=classes, right=classes * [0.0, 0.5])
        check = check_by_samples(prompts, {"before": (wrong, *draw(true, 4, rng))})
        found += any(each.what == "policy a" and each.checkpoint == "before" for each in check.disagreements)
        sizes = [abs(each.literal - each.sampled) for each in check.disagreements]
        assert sizes == sorted(sizes, reverse=True)
        assert all(size >= 0.05 for size in sizes)
    assert found >= least
