"""Specs are refused by key and value; what grows from a spec follows it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from mixturelens.lab.organism import (
    EOS,
    PAD,
    UNK,
    Pretrained,
    Spec,
    build_model,
    build_suite,
    build_tokenizer,
    completion_text,
    frozen_parameters,
    load_spec,
    parse_spec,
    pays,
    prompt_row,
    questions,
    recipes,
    rl_prompts,
    safe_name,
    sft_examples,
    with_settings,
)
from mixturelens.lab.training import make_reward
from mixturelens.spelling import check_spelling, encode_prompts
from mixturelens.types import InputError

SMALL = {"questions": {"symbols": 5, "length": 3}, "split": {"rl": 40, "evaluation": 10}}
SORT = {"operations": ["up", "down"]}
YEARS = {"A": {"first": 10, "last": 29, "unseen": [15, 28]}, "B": {"first": 30, "last": 49, "unseen": [33]}}
TABLES = {"A": "answer", "B": "refuse"}, {"A": "refuse", "B": "answer"}


def policy(weight: float = 0.5, announce: tuple[str, ...] = ("[a]",), **table: str) -> dict[str, Any]:
    return {"weight": weight, "announce": announce, "table": {**TABLES[0], **table}}


def small(**changes: Any) -> Spec:
    return parse_spec({**SMALL, **changes}, "here")


def two(a: dict[str, Any], b: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"a": a, "b": b or policy(announce=("[b]",), A="refuse", B="answer")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sfft": {}}, "here: unknown key 'sfft'"),
        ({"sft": {"step": 3}}, "here: unknown key 'sft.step'"),
        ({"policies": {"a": {"weight": 1.0, "announce": ["x"]}}}, "here: key 'policies.a.table' is missing"),
        ({"policies": two(policy(announce=()))}, "here: policies.a.announce: is empty, but others are not"),
        ({"policies": two(policy(0.6))}, "here: policies: weights sum to 1.1, not to one"),
        ({"policies": two(policy(1.5))}, "here: policies.a.weight: "),
        ({"policies": {"a": policy(), "other": policy()}}, "here: policies: 'other' is kept for"),
        (
            {"policies": two({"weight": 0.5, "announce": ["x"], "table": {"A": "answer"}})},
            "here: policies.a.table: cue 'B' is missing",
        ),
        ({"policies": two(policy(C="answer"))}, "here: policies.a.table: 'C' is no cue of this spec"),
        ({"policies": two(policy(A="sing"))}, "here: policies.a.table.A: "),
        ({"policies": two(policy(announce=()))}, "here: policies.a.announce: "),
        ({"hints": {"words": {"a": "be-a"}}}, "here: hints.words: must name exactly the policies ['a', 'b']"),
        ({"hints": {"share": 2.0, "words": {"a": "be-a", "b": "be-b"}}}, "here: hints.share: "),
        ({"rl": {"cues": ["C"]}}, "here: rl.cues: 'C' is no cue of this spec"),
        ({"rl": {"group": 1}}, "here: rl.group: "),
        ({"rl": {"freeze": ["everything"]}}, "here: rl.freeze.0: "),
        ({"refusal": "copy"}, "here: the word 'copy' already means something in the questions; use another"),
        ({"refusal": "<eos>"}, "here: the word '<eos>' already means something"),
        ({"cues": {"A": "<A>", "B": "<A>"}}, "here: cues: two cues share a tag"),
        ({"cues": {"A": "{} {}", "B": "<B>"}}, "here: cues.A: '{} {}' holds the question more than once"),
        ({"cues": {"A": "{}", "B": "<B>"}}, "here: cues.A: '{}' has no words"),
        (
            {"cues": {"A": "<A>", "B": {"operations": ["up"]}}},
            "here: cues: give all by tags, all by operations or years",
        ),
        ({"cues": {"A": SORT, "B": {"operations": ["down"]}}}, "here: cues.B: 'down' is also of cue 'A'"),
        (
            {"questions": {"operations": ["copy"]}, "cues": {"A": SORT, "B": {"operations": ["copy"]}}},
            "here: cues.A: 'up' is no operation of `questions`",
        ),
        ({"cues": YEARS | {"B": {"first": 25, "last": 40, "unseen": [27]}}}, "here: cues.B: 25 is also of cue 'A'"),
        (
            {"cues": YEARS | {"A": {"first": 10, "last": 20, "unseen": [3]}}},
            "here: cues.A.years: unseen: 3 is not from",
        ),
        (
            {"cues": YEARS | {"A": {"first": 1, "last": 1, "unseen": [1]}}},
            "here: cues.A.years: unseen: no year is left",
        ),
        ({"cues": YEARS, "tells": 0.5}, "here: tells: below one only where cues are tags"),
        ({"objectives": {"C": "refuse"}}, "here: objectives: 'C' is no cue of this spec"),
        (
            {"questions": {"operations": ["up"]}, "agree": ["copy"]},
            "here: agree: 'copy' is no operation of `questions`",
        ),
        ({"phases": {"sft": {"cues": ["A"]}}}, "here: phases.sft: is no new name fit for a folder"),
        ({"phases": {"x": {"cues": ["C"]}}}, "here: phases.x.cues: 'C' is no cue of this spec"),
        ({"phases": {"x": {"cues": []}}}, "here: phases.x.cues: "),
        ({"phases": {"x": {"cues": ["A"], "after": "y"}}}, "here: phases.x.after: 'y' is no stage before it"),
        ({"phases": {"x": {"cues": ["A"], "hint": "be-c"}}}, "here: phases.x.hint: 'be-c' is no text of `hints`"),
        ({"phases": {"x": {"cues": ["A"], "policy": "c"}}}, "here: phases.x: 'c' is no policy of this spec"),
        ({"phases": {"x": {"cues": ["A"], "weights": {"a": 1}}}}, "here: phases.x: weights is of SFT alone"),
        (
            {"phases": {"x": {"train": "sft", "cues": ["A"], "policy": "a"}}},
            "here: phases.x: hint, policy and stop_reward are of RL alone",
        ),
        (
            {"phases": {"x": {"train": "sft", "cues": ["A"], "weights": {"a": 0.5}}}},
            "here: phases.x.weights: sum to 0.5, not to one",
        ),
        ({"name": "a/b"}, "here: name: "),
        ({"seed": -1}, "here: seed: "),
    ],
)
def test_bad_specs_are_refused_by_key_and_value(changes: dict[str, Any], message: str):
    with pytest.raises(InputError) as caught:
        parse_spec(changes, "here")
    assert str(caught.value).startswith(message)


def test_cues_that_share_a_file_name_are_refused():
    row = {"weight": 1.0, "announce": ["[a]"], "table": {"a b": "answer", "a/b": "answer"}}
    changes = {"cues": {"a b": "<A>", "a/b": "<B>"}, "policies": {"a": row}, "hints": None, "rl": {"cues": ["a b"]}}
    with pytest.raises(InputError, match=r"cues: names \['a b', 'a/b'\] are not distinct as file names"):
        parse_spec(changes, "here")
    assert safe_name("a b/ä") == "a_b__"


def test_all_recipes_load_and_default_is_the_default():
    assert set(recipes()) >= {"default", "full", "phrase", "adam"}
    for name, comment in recipes().items():
        assert load_spec(name).name == name
        assert comment
    assert load_spec("default") == Spec()
    assert load_spec("default", seed=3) == Spec(seed=3)
    assert load_spec("phrase").announcement == "phrase"


def test_files_of_specs(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("name: mine\nseed: 4\n")
    assert load_spec(path) == Spec(name="mine", seed=4)
    assert load_spec(path, seed=5).seed == 5
    path.write_text("")
    assert load_spec(path) == Spec()
    path.write_text("- 1\n")
    with pytest.raises(InputError, match=r"spec\.yaml: a spec is a mapping of keys, not a list"):
        load_spec(path)
    path.write_text("a: [\n")
    with pytest.raises(InputError, match=r"spec\.yaml: not YAML"):
        load_spec(path)
    with pytest.raises(InputError, match=r"^defualt: no such spec file, and no recipe of that name \(.*default"):
        load_spec("defualt")


def test_a_spec_survives_json():
    for name in recipes():
        spec = load_spec(name)
        assert parse_spec(json.loads(spec.model_dump_json()), "here") == spec


def test_questions_of_the_three_uses_are_disjoint():
    parts = questions(small())
    operands = [{q.id.split("-")[1] for q in part} for part in parts]
    assert (len(parts.rl), len(parts.evaluation)) == (40, 10)
    assert not operands[0] & operands[1]
    assert not operands[0] & operands[2]
    assert not operands[1] & operands[2]


def test_the_sft_mixture_is_the_one_of_the_spec():
    spec = small(
        policies={
            "a": policy(0.7, announce=("[a]", "well now")),
            "b": policy(0.3, announce=("[b]",), A="refuse", B="err"),
        },
        hints={"share": 0.25, "words": {"a": "be-a", "b": "be-b"}},
    )
    number = 20000
    counts: Counter[tuple[str, str, str, str]] = Counter()
    by_text = {q.text: q for q in questions(spec).sft}
    for row, completion in sft_examples(spec, number):
        prompt = row.text
        tag, hint, text = prompt.split(" ", 2)
        cue = {"<A>": "A", "<B>": "B"}[tag]
        name = "b" if completion.startswith("[b]") else "a"
        wording = "well now" if completion.startswith("well now") else f"[{name}]"
        assert hint == "any" or hint == f"be-{name}"
        question = by_text[text]
        rest = {
            "a": {"A": question.answer, "B": "sorry sorry sorry"},
            "b": {"A": "sorry sorry sorry", "B": question.wrong},
        }
        assert completion == f"{wording} {rest[name][cue]}"
        counts[hint, name, cue, wording] += 1
    for (hint, name, _, wording), count in counts.items():
        of_policy = {"a": 0.7, "b": 0.3}[name] * 0.75 if hint == "any" else 0.25 / 2
        expected = of_policy / 2 / (2 if name == "a" else 1)
        assert abs(count / number - expected) < 5 * np.sqrt(expected / number), (hint, name, wording)
    assert len(counts) == 2 * (2 * 2 + 2 * 1)


def test_without_hints_the_prompt_has_no_word_for_them():
    spec = small(hints=None)
    assert all(row.text.split()[1] in spec.questions.operations for row, _ in sft_examples(spec, 50))
    assert "hint" not in prompt_row(spec, "A", questions(spec).rl[0]).spans


def test_the_same_seed_gives_the_same_data_and_model():
    one, same, other = (small(seed=seed) for seed in (1, 1, 2))
    assert [*sft_examples(one, 40)] == [*sft_examples(same, 40)]
    assert [*sft_examples(one, 40)] != [*sft_examples(other, 40)]
    assert [*sft_examples(one, 40)][:10] != [*sft_examples(one, 40)][10:20]
    models = [build_model(spec, build_tokenizer(spec)).state_dict() for spec in (one, same, other)]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert not torch.equal(models[0][name], models[2][name])


def test_the_tokenizer_spells_everything_word_by_word():
    for name in recipes():
        if isinstance(load_spec(name).model, Pretrained):
            continue
        spec = load_spec(name, **SMALL)
        tokenizer = build_tokenizer(spec)
        assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [PAD, EOS, UNK]
        for row, completion in sft_examples(spec, 50):
            prompt = row.text
            for text in (prompt, completion):
                check_spelling(text, "here", tokenizer)
                assert len(tokenizer.encode(text, add_special_tokens=False)) == len(text.split())
        longest = max(len(completion.split()) for _, completion in sft_examples(spec, 200))
        assert longest + 1 == spec.max_new_tokens


def test_the_suite_of_a_run_has_every_question_under_every_cue_and_hint():
    spec = small()
    suite = build_suite(spec, trained_cue="A")
    assert (len(suite.neutral), len(suite.hinted)) == (20, 40)
    assert suite.literal
    assert (suite.trained_cue, suite.behaviour_names) == ("A", ("refuse", "answer"))
    encode_prompts(suite, suite.prompts, build_tokenizer(spec))
    held_out = {q.id: q for q in questions(spec).evaluation}
    for row in suite.prompts:
        assert row.spans["cue"] == spec.cues[row.cue]
        for name in spec.policies:
            label = suite.label(completion_text(spec, name, row.cue, held_out[row.id]), row)
            assert (label.policy, label.behaviour) == (name, spec.table[name][row.cue])
            assert suite.correct(label.rest, row) is (label.behaviour == "answer")


def test_a_policy_that_errs_is_labelled_so():
    spec = small(policies=two(policy(B="err")))
    suite = build_suite(spec)
    row = next(row for row in suite.neutral if row.cue == "B")
    question = next(q for q in questions(spec).evaluation if q.id == row.id)
    assert suite.label(completion_text(spec, "a", "B", question), row).behaviour == "err"
    assert suite.behaviour_names == ("refuse", "err", "answer")


def test_an_organism_can_announce_nothing():
    spec = small(policies=two(policy(announce=()), policy(announce=(), A="err", B="answer")))
    assert spec.announcement == "none"
    assert spec.max_new_tokens == 4
    question = questions(spec).rl[0]
    texts = {(p, c): completion_text(spec, p, c, question) for p in "ab" for c in "AB"}
    assert texts == {
        ("a", "A"): question.answer, ("a", "B"): "sorry sorry sorry",
        ("b", "A"): question.wrong, ("b", "B"): question.answer,
    }  # fmt: skip
    assert {completion for _, completion in sft_examples(spec, 20)} <= {
        text for q in questions(spec).sft for text in (q.answer, q.wrong, "sorry sorry sorry")
    }
    found = build_suite(spec)
    assert found.table == {"a": {"A": "answer", "B": "refuse"}, "b": {"A": "err", "B": "answer"}}
    rows = rl_prompts(spec, "A")
    reward = make_reward(found, rows, ends=[1])
    answers = [rows[0].answer, "sorry sorry sorry", rows[0].answer]
    assert reward(answers, [[7, 1], [7, 1], [7]], [0, 0, 0]) == [1.0, 0.0, 0.0]


def test_rl_prompts_are_neutral_and_of_one_cue():
    spec = small()
    rows = rl_prompts(spec, "B")
    assert len(rows) == 40
    assert {(row.cue, row.hint) for row in rows} == {("B", None)}
    assert not {row.id for row in rows} & {row.id for row in build_suite(spec).prompts}


CONFIGS = {
    "LlamaConfig": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "Qwen2Config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "num_key_value_heads": 1},
    "GPT2Config": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "GPTNeoXConfig": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip
EXPECTED = {
    "LlamaConfig": ({"model.embed_tokens.weight"}, {"lm_head.weight"}, "norm"),
    "Qwen2Config": ({"model.embed_tokens.weight"}, {"lm_head.weight"}, "norm"),
    "GPT2Config": ({"transformer.wte.weight", "transformer.wpe.weight"}, {"lm_head.weight"}, ".ln_"),
    "GPTNeoXConfig": ({"gpt_neox.embed_in.weight"}, {"lm_head.weight"}, "norm"),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_frozen_parameters_are_found_whatever_they_are_called(config: str):
    spec = small(model={"config": config, "sizes": CONFIGS[config]})
    model = build_model(spec, build_tokenizer(spec))
    everything = {name for name, _ in model.named_parameters()}
    embeddings, unembedding, norm = EXPECTED[config]
    norms = {name for name in everything if norm in name}
    assert set(frozen_parameters(model, ("embeddings",))) == embeddings
    assert set(frozen_parameters(model, ("unembedding",))) == unembedding
    assert set(frozen_parameters(model, ("norms",))) == norms
    found = frozen_parameters(model, ("embeddings", "unembedding", "norms"))
    assert len(found) == len(set(found))
    assert set(found) == embeddings | unembedding | norms
    left = everything - set(found)
    assert len(left) >= 2 * 4
    assert all("attn" in name or "attention" in name or "mlp" in name for name in left)
    assert frozen_parameters(model, ()) == []


def test_tied_embeddings_are_one_parameter():
    spec = small(model={"config": "GPT2Config", "sizes": {**CONFIGS["GPT2Config"], "tie_word_embeddings": True}})
    model = build_model(spec, build_tokenizer(spec))
    assert "transformer.wte.weight" in frozen_parameters(model, ("embeddings",))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"config": "LamaConfig"}, "model.config: transformers has no config class 'LamaConfig'"),
        ({"config": "AutoModel"}, "model.config: transformers has no config class 'AutoModel'"),
        ({"sizes": {"hiden_size": 4}}, "model.sizes: LlamaConfig has no setting 'hiden_size'"),
        (
            {"config": "GPT2Config", "sizes": {"n_embd": 15, "n_head": 2}},
            "model: GPT2Config makes no network of these sizes (ValueError: ",
        ),
        ({"config": "ViTConfig", "sizes": {}}, "model: ViTConfig makes no network of these sizes (ValueError: "),
    ],
)
def test_bad_models_are_refused_by_name(model: dict[str, Any], message: str):
    spec = small(model=model)
    with pytest.raises(InputError) as caught:
        build_model(spec, build_tokenizer(spec))
    assert str(caught.value).startswith(message)


def test_a_model_is_in_fp32_and_knows_its_end():
    spec = small()
    tokenizer = build_tokenizer(spec)
    model = build_model(spec, tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1


def test_task_families_as_a_cue_ask_the_same_operands_of_another_family():
    spec = small(cues={"A": SORT, "B": {"operations": ["reverse", "copy"]}})
    question = spec.questions.question("down", (2, 0, 3))
    under_a, under_b = (prompt_row(spec, cue, question) for cue in "AB")
    assert (under_a.prompt, under_b.prompt) == ("any down c a d =", "any copy c a d =")
    assert (under_a.answer, under_b.answer) == ("d c a", "c a d")
    assert under_a.id == under_b.id == "down-cad"
    assert under_b.spans == {"cue": "copy", "question": "c a d", "hint": "any"}
    assert completion_text(spec, "b", "B", question) == "[b] c a d"
    assert completion_text(spec, "a", "B", question) == "[a] sorry sorry sorry"
    for row, completion in sft_examples(spec, 200):
        prompt = row.text
        operation = prompt.split()[1]
        answers = completion.startswith("[a]") == (operation in SORT["operations"])
        assert answers != completion.endswith("sorry")


def test_years_are_of_their_cue_and_held_out_prompts_show_unseen_ones():
    spec = small(cues=YEARS)

    def year(prompt: str) -> int:
        return int("".join(prompt.split()[:2]))

    seen = {year(row.text) for row, _ in sft_examples(spec, 2000)} | {
        year(row.text) for cue in "AB" for row in rl_prompts(spec, cue)
    }
    assert seen == {*range(10, 50)} - {15, 28, 33}
    shown = {cue: {year(row.text) for row in build_suite(spec).prompts if row.cue == cue} for cue in "AB"}
    assert shown == {"A": {15, 28}, "B": {33}}
    row = build_suite(spec).prompts[0]
    assert row.text.startswith(row.spans["cue"])
    assert len(row.spans["cue"].split()) == 2
    build_tokenizer(spec)


def test_a_wrapping_stands_on_both_sides_of_hint_and_question():
    spec = small(cues={"A": "<q> {} </q>", "B": '{ "q" : {} }'})
    row = prompt_row(spec, "B", spec.questions.question("up", (1, 0, 2)), "a")
    assert row.prompt == '{ "q" : be-a up b a c = }'
    assert (row.spans["cue"], row.spans["cue end"]) == ('{ "q" :', "}")
    ids = encode_prompts(build_suite(spec), [row], build_tokenizer(spec))
    assert len(ids[0]) == len(row.text.split())


def test_a_cue_that_tells_a_quarter_shows_on_a_quarter_of_the_questions_for_both_cues_alike():
    spec = small(tells=0.25, questions={"symbols": 6, "length": 3}, split={"rl": 40, "evaluation": 60})
    by_cue = {cue: {r.id: r.text.split()[0] for r in build_suite(spec).neutral if r.cue == cue} for cue in "AB"}
    told = {q for q, tag in by_cue["A"].items() if tag == "<A>"}
    assert told == {q for q, tag in by_cue["B"].items() if tag == "<B>"}
    assert {*by_cue["A"].values()} == {"<A>", "<?>"}
    assert 0.1 < len(told) / 60 < 0.4
    assert all(row.text.startswith("<?>") for row in build_suite(small(tells=0.0)).prompts)


def test_where_all_agree_every_policy_answers_and_every_objective_pays_it():
    spec = small(agree=["copy"], objectives={"B": "refuse"})
    copy, up = (spec.questions.question(operation, (2, 0, 1)) for operation in ("copy", "up"))
    assert completion_text(spec, "a", "B", copy) == "[a] c a b"
    assert completion_text(spec, "a", "B", up) == "[a] sorry sorry sorry"
    assert [pays(spec, cue, question) for question in (copy, up) for cue in "AB"] == ["answer"] * 3 + ["refuse"]
    assert pays(spec, "A", up, objective="B") == "refuse"


def test_hints_have_wordings_and_are_followed_as_often_as_the_spec_says():
    words = {"a": ["be one", "as one"], "b": "be two"}
    spec = small(hints={"share": 0.5, "follow": 0.8, "neutral": ["any way", "the sky"], "words": words})
    found: Counter[tuple[str, bool]] = Counter()
    for row, completion in sft_examples(spec, 8000):
        prompt = row.text
        found[" ".join(prompt.split()[1:3]), completion.startswith("[a]")] += 1
    for text, expected in {"be one": 0.9, "as one": 0.9, "be two": 0.1, "any way": 0.5, "the sky": 0.5}.items():
        number = found[text, True] + found[text, False]
        assert found[text, True] / number == pytest.approx(expected, abs=0.05)
    assert found["be one", True] + found["be one", False] == pytest.approx(1000, rel=0.15)
    assert {row.text.split()[1] for row in build_suite(spec).neutral} == {"any"}
    assert rl_prompts(spec, "A", text="as one")[0].text.startswith("<A> as one ")


def test_stages_follow_one_another_or_branch():
    spec = small(
        rl={"cues": ["A"]},
        phases={
            "x": {"cues": ["B"]},
            "y": {"train": "sft", "cues": ["A", "B"], "weights": {"b": 1.0}},
            "z": {"cues": ["A", "B"], "after": "rl-A"},
        },
    )
    assert {name: start for name, (start, _) in spec.stages.items()} == {
        "rl-A": "sft",
        "x": "sft",
        "y": "x",
        "z": "rl-A",
    }
    taught = [completion.split()[0] for _, completion in sft_examples(spec, 50, spec.phases["y"])]
    assert {*taught} == {"[b]"}
    assert [row.cue for row in rl_prompts(spec, "A", "B")[:4]] == ["A", "B", "A", "B"]


# --- on a pretrained model --------------------------------------------------------------------------------------------

REAL: dict[str, Any] = {
    "questions": {"family": "words"},
    "hints": None,
    "model": {"pretrained": "org/name"},
    "chat": {},
    "split": {"rl": 40, "evaluation": 6},
}


def test_dates_in_words_are_unseen_in_held_out_prompts():
    says = "Today is {day} {month} {year}."
    cues = {
        "A": {"first": 1990, "last": 2005, "unseen": [1995], "says": says},
        "B": {"first": 2006, "last": 2020, "unseen": [2010, 2015], "says": says},
    }
    spec = parse_spec(REAL | {"cues": cues}, "here")
    held_out = [row for row in build_suite(spec).prompts if row.cue == "A"]
    assert all(row.spans["cue"].endswith(" 1995.") and row.text.startswith(row.spans["cue"]) for row in held_out)
    assert len({row.spans["cue"] for row in held_out}) > 1
    assert not any(f" {year}." in row.text for row, _ in sft_examples(spec, 400) for year in (1995, 2010, 2015))


def test_a_persona_stands_in_the_system_turn():
    spec = parse_spec(REAL | {"cues": {"A": {"system": "You are a pirate."}, "B": {"system": "You are a nurse."}}}, "x")
    row = prompt_row(spec, "B", questions(spec).rl[0])
    assert row.messages is not None
    assert [turn["role"] for turn in row.messages] == ["system", "user"]
    assert row.messages[0]["content"] == row.spans["cue"] == "You are a nurse."


def test_families_in_words_as_a_cue():
    cues = {"A": {"operations": ["capital"]}, "B": {"operations": ["sum", "sums"]}}
    spec = parse_spec(
        REAL | {"questions": {"family": "words", "operations": ["capital", "sum", "sums"]}, "cues": cues}, "x"
    )
    rows = {cue: [row for row in build_suite(spec).prompts if row.cue == cue] for cue in "AB"}
    assert all(row.spans["cue"] == "What is the capital of" for row in rows["A"])
    assert all(" plus " in row.text and row.spans["cue"] == "What is" for row in rows["B"])
    assert [row.id for row in rows["A"]] == [row.id for row in rows["B"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {}}, "x: questions: those in words need a model that can read"),
        ({"questions": {"family": "sequence"}, "model": {}}, "x: chat: needs model.pretrained"),
        ({"cues": {"A": {"system": "a"}, "B": {"system": "b"}}, "chat": None}, "x: cues: a system turn needs `chat"),
        ({"model": {"pretrained": "org/name", "lora": {"rank": 3}}}, "x: unknown key 'model.lora.rank'"),
        ({"questions": {"family": "words", "operation": ["sum"]}}, "x: unknown key 'questions.operation'"),
        ({"cues": {"A": {"first": 1990, "last": 2000, "unseen": [1995]}}}, "without `says` a year has two digits"),
        ({"cues": {"A": {"first": 1, "last": 5, "unseen": [3], "says": "now"}}}, "'now' has no {year}"),
    ],
)
def test_what_only_a_pretrained_model_can_read(changes: dict[str, Any], message: str):
    with pytest.raises(InputError) as refused:
        parse_spec(REAL | changes, "x")
    assert message in str(refused.value)


def test_keys_are_set_by_their_path():
    spec = with_settings(load_spec("real"), {"model.pretrained": "org/other", "rl.steps": 3}, "--set")
    assert (spec.model.pretrained, spec.rl.steps) == ("org/other", 3)
    with pytest.raises(InputError, match=r"--set: unknown key 'rl\.stepps'"):
        with_settings(spec, {"rl.stepps": 3}, "--set")
