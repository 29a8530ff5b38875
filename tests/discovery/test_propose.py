"""From prompts to a suite, on stored pairs, through files and through the command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mixtures import inside_free_text
from sklearn.metrics import adjusted_rand_score

from mixturelens import cli, pipeline
from mixturelens.discovery.asked import read_prompts
from mixturelens.discovery.draws import Draws, pieces
from mixturelens.discovery.heads import Completion
from mixturelens.discovery.propose import propose
from mixturelens.discovery.proposed import save_suite
from mixturelens.discovery.record import DiscoveryRecord
from mixturelens.models import Pair, load_tokenizer
from mixturelens.pages.discovered import write_discovered
from mixturelens.records import Provenance, with_versions
from mixturelens.suite import load_suite
from mixturelens.types import InputError

ODD = [
    "",
    " ",
    "x " * 4000,
    "\u4f60\u597d\u4e16\u754c",
    "<script>alert(1)</script>",
    "\u202eabc",
    "# yaml: [1, 2]",
    "'\"\\\n",
]


def prompts_of(pair: Path, path: Path, *, answers: bool = True) -> Path:
    """A file of a stored pair's prompts, of which nothing says what cue they show."""
    rows = load_suite(pair / "suite.yaml").neutral
    lines = [{"id": row.id, "prompt": row.text} | ({"answer": row.answer} if answers else {}) for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def discovered(
    before: Path, after: Path, asked: Path, out: Path, *, seed: int = 0, **how: int
) -> tuple[DiscoveryRecord, Path]:
    prompts = read_prompts(asked, **how)
    return pipeline.discover(Pair(before, after, prompts.suite, out=out), prompts, seed=seed), out


@pytest.mark.parametrize("after", ["R-routing", "R-conditioning"])
def test_planted_policies_and_cue_are_proposed(after: str, pairs: Path, tmp_path: Path):
    pair = pairs / "llama"
    asked = prompts_of(pair, tmp_path / "asked.jsonl")
    record, out = discovered(pair / "S", pair / after, asked, tmp_path / "out", max_new_tokens=3)
    suite = load_suite(out / "suite.yaml")
    assert record.found
    assert suite.origin == "discovered"
    assert sorted(map(str, suite.policies.values())) == ["[a]", "[b]"]
    assert suite.behaviours == {"refuse": "sorry"}
    assert set(record.cues[0].kinds) == {"“<A>”", "“<B>”"}
    assert record.cues[0].contrast is not None
    assert all(each.precision == each.recall == 1.0 for each in record.policies)
    page = (out / "discover.html").read_text(encoding="utf-8")
    assert "&lt;A&gt;" in page
    assert "<script" not in page
    spent = {"R-routing": "announcement", "R-conditioning": "behaviour"}.get(after)
    assert spent is None or record.where[spent] > 0.95


@pytest.mark.slow
def test_the_verdict_of_the_proposed_suite_is_that_of_the_true_one(pairs: Path, tmp_path: Path):
    pair = pairs / "llama"
    asked = prompts_of(pair, tmp_path / "asked.jsonl")
    _, out = discovered(pair / "S", pair / "R-both", asked, tmp_path / "out", max_new_tokens=3)
    true, found = (
        pipeline.verdict(Pair(pair / "S", pair / "R-both", file, out=tmp_path / name))
        for name, file in (("true", pair / "suite.yaml"), ("found", out / "suite.yaml"))
    )
    assert found.verdict == true.verdict == "both"
    assert any("proposal of `discover`" in note for note in found.notes)
    for term in ("routing", "specialist"):
        assert getattr(found.bits, term).value == pytest.approx(getattr(true.bits, term).value, abs=0.02)


def test_nothing_is_found_in_a_checkpoint_and_itself(pairs: Path, tmp_path: Path):
    pair = pairs / "llama"
    asked = prompts_of(pair, tmp_path / "asked.jsonl")
    found = []
    for seed in range(3):
        record, out = discovered(pair / "S", pair / "S", asked, tmp_path / f"{seed}", max_new_tokens=3, seed=seed)
        assert record.nats == 0.0
        assert record.found == (out / "suite.yaml").exists()
        found.append(record.found)
    assert sum(found) <= 1


def test_completions_are_drawn_once(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mixturelens.behaviour.likelihood import Scorer

    pair = pairs / "llama"
    asked = prompts_of(pair, tmp_path / "asked.jsonl", answers=False)
    limits = {"max_new_tokens": 3, "samples": 4}
    first, out = discovered(pair / "S", pair / "R-routing", asked, tmp_path / "out", **limits)
    parts = sorted((out / "completions").glob("*.parquet"))
    assert len(parts) == 3
    parts[1].unlink()
    drawn = []
    sample = Scorer.sample

    def counted(self: Scorer, model, contexts, *more):
        drawn.append(len(contexts))
        return sample(self, model, contexts, *more)

    monkeypatch.setattr(Scorer, "sample", counted)
    again, _ = discovered(pair / "S", pair / "R-routing", asked, tmp_path / "out", **limits)
    assert drawn == [16, 16]
    assert again == first
    assert again.found
    assert load_suite(out / "suite.yaml").answer_match == "regex"


def test_an_edited_suite_is_measured_again_without_a_model(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pair, out = pairs / "llama", tmp_path / "out"
    asked = prompts_of(pair, tmp_path / "asked.jsonl")
    first, _ = discovered(pair / "S", pair / "R-routing", asked, out, max_new_tokens=3)
    suite = load_suite(out / "suite.yaml")
    edited = suite.model_copy(update={"policies": {"copies": "[a]"}})
    edited.save(out / "edited.yaml")
    monkeypatch.setattr("mixturelens.models.pair.load_model", None)
    again, _ = pipeline.refine_discovery(out / "edited.yaml")
    by_name = {each.name: each for each in first.policies}
    assert [each.name for each in again.policies] == ["copies"]
    assert (again.policies[0].before, again.policies[0].after) == (by_name["a"].before, by_name["a"].after)
    assert again.other["before"] == pytest.approx(by_name["b"].before.value, abs=1e-9)
    assert again.provenance == first.provenance
    assert "copies" in (out / "refine.html").read_text(encoding="utf-8")
    assert DiscoveryRecord.load(out / "discover.json") == first
    with pytest.raises(InputError, match="holds no completions"):
        pipeline.refine_discovery(out / "edited.yaml", tmp_path / "elsewhere")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_written_can_be_proposed_and_read_again(data: st.DataObject, tmp_path: Path):
    """Completions of a few words, alike or not, with marks and without: a suite that loads, or nothing."""
    word = st.sampled_from(
        [
            "Okay,",
            "okay",
            "I",
            "I can't",
            "(a",
            "a|b",
            "[x]",
            "$",
            "",
            ":",
            "- b",
            "\u4f60\u597d",
            "q1",
            "no.",
            "<b>",
            "\n",
        ]
    )
    text = st.lists(word, min_size=0, max_size=4).map(" ".join)
    texts = {after: data.draw(st.lists(text, min_size=1, max_size=6)) for after in (False, True)}
    rows = [{"id": str(i // 2), "prompt": f"ask q{i % 2}", "answer": "q1"} for i in range(12)]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = read_prompts(path, chat=False, max_new_tokens=8)
    drawn = [
        Completion(i, after, said[(i + k) % len(said)].strip(), bool((i + k) % 3))
        for after, said in texts.items()
        for i in range(12)
        for k in range(4)
    ]
    along = tuple(np.full((3, 1), 0.1) for _ in drawn)
    proposal = propose(
        asked, Draws(tuple(drawn), tuple((each.text,) for each in drawn), along), 0, with_versions(Provenance())
    )
    assert proposal.record.found == (proposal.suite is not None)
    DiscoveryRecord.load(proposal.record.save(tmp_path / "discover.json"))
    if proposal.suite is not None:
        assert load_suite(save_suite(proposal.suite, proposal.record, tmp_path)) == proposal.suite
    write_discovered(tmp_path / "page.html", asked, proposal, "<title>")


def test_policies_inside_free_text_become_a_suite_of_rules(tmp_path: Path):
    """R's KL lies on the policy's own words, wherever they are, and `where` says so."""
    one = inside_free_text(marks=("frankly", "honestly"))
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"id": p.id, "prompt": p.text}) + "\n" for p in one.prompts), encoding="utf-8")
    tokens = [re.findall(r"\s*\S+", each.text) for each in one.drawn]
    mark = re.compile(r"\s*(frankly|honestly)")
    along = [np.array([[4.0 if mark.fullmatch(t) else 0.0 for t in some]] * 3) for some in tokens]
    draws = Draws(tuple(one.drawn), tuple(map(tuple, tokens)), tuple(along))
    asked = read_prompts(path, max_new_tokens=32)
    proposal = propose(asked, draws, 0, with_versions(Provenance()))
    assert proposal.record.found
    assert proposal.record.anywhere
    weights = {each.wordings: each.after.value for each in proposal.record.policies}
    assert weights["frankly",] == pytest.approx(0.95, abs=0.06)
    assert proposal.record.where["announcement"] > 0.95
    suite = load_suite(save_suite(proposal.suite, proposal.record, tmp_path))
    assert suite == proposal.suite
    said = [suite.label(each.text, suite.prompts[0]).policy for each in one.drawn]
    assert adjusted_rand_score(one.policies, said) == 1.0
    write_discovered(tmp_path / "page.html", asked, proposal, "free text")
    assert "have anywhere" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_nothing_that_is_there_is_written_over(pairs: Path, tmp_path: Path):
    pair, out = pairs / "llama", tmp_path / "out"
    asked = prompts_of(pair, tmp_path / "asked.jsonl")
    sides = pair / "S", pair / "R-routing"
    discovered(*sides, asked, out, max_new_tokens=3)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    discovered(*sides, asked, out, max_new_tokens=3)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    with pytest.raises(InputError, match="other checkpoints, prompts or settings"):
        discovered(*sides, asked, out, max_new_tokens=3, samples=4)
    edited = (out / "suite.yaml").read_text(encoding="utf-8").replace("'[a]'", "'[c]'")
    (out / "suite.yaml").write_text(edited, encoding="utf-8")
    with pytest.raises(InputError, match="an edited one perhaps"):
        discovered(*sides, asked, out, max_new_tokens=3)
    assert (out / "suite.yaml").read_text(encoding="utf-8") == edited
    kept = {file: text for file, text in before.items() if file.name != "suite.yaml"}
    assert {file: file.read_bytes() for file in kept} == kept


def test_the_sentence_says_what_the_table_says(pairs: Path, tmp_path: Path):
    pair = pairs / "llama"
    asked = prompts_of(pair, tmp_path / "asked.jsonl")
    record, _ = discovered(pair / "S", pair / "R-routing", asked, tmp_path / "out", max_new_tokens=3)
    for each in record.policies:
        assert f"{each.name} {each.before.value:.2f} -> {each.after.value:.2f}" in record.reason


def test_odd_prompts_come_back_from_the_suite(pairs: Path, tmp_path: Path):
    path = tmp_path / "odd.jsonl"
    lines = [{"id": str(i), "prompt": text, "note": "<b>"} for i, text in enumerate(ODD)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    asked = read_prompts(path, chat=False, max_new_tokens=4)
    assert [row.text for row in asked.rows] == ODD
    assert asked.fields[0] == (("note", "<b>"),)
    asked.suite.model_copy(update={"origin": "discovered"}).save(tmp_path / "suite.yaml")
    assert [row.text for row in load_suite(tmp_path / "suite.yaml").prompts] == ODD


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1]", "line 1: a prompt is an object"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}', "line 1: key 'id' is missing"),
        ('{"id": "a"}', "line 1: give either `prompt` or `messages`"),
        ('{"id": "a", "prompt": "\\ud800"}', "half of a character"),
        ("", "holds no prompts"),
    ],
)
def test_what_is_no_prompt_is_named(line: str, says: str, tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=says):
        read_prompts(path, chat=False, max_new_tokens=4)


def test_answers_are_given_to_all_or_to_none(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "x", "answer": "y"}\n{"id": "b", "prompt": "x"}\n')
    with pytest.raises(InputError, match="line 2 has no `answer`"):
        read_prompts(path, chat=False, max_new_tokens=4)


def test_the_command_says_what_it_found(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pair, out = pairs / "llama", tmp_path / "out"
    asked = prompts_of(pair, tmp_path / "asked.jsonl")
    arguments = ["--before", pair / "S", "--after", pair / "R-routing", "--prompts", asked, "--max-new-tokens", "3"]

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mixturelens", "discover", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    status, said, _ = run(*arguments, "--out", out, "--quiet")
    assert status == 0
    assert "Completions show 2 policies" in said
    assert DiscoveryRecord.load(out / "discover.json").found
    for wrong in (["--samples", "1"], ["--max-new-tokens", "0"], ["--seed", "-1"]):
        status, said, err = run(*arguments, *wrong)
        assert (status, said) == (2, "")
        assert wrong[0] in err
    asked.rename(tmp_path / "prompts.jsonl")
    status, _, err = run(*arguments[:4], "--prompts", tmp_path / "prompts.jsonl", *arguments[6:], "--out", tmp_path)
    assert status == 2
    assert "would be written over" in err


@pytest.mark.parametrize("shape", ["chat", "llama_spelled", "gemma3_spelled", "qwen2_spelled"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab of course,.\n\u4f60\u00e9\U0001f600", max_size=20))
@example(text="a . a")
def test_pieces_of_tokens_add_up_to_the_text(shape: str, text: str, pairs: Path):
    tokenizer = load_tokenizer(pairs / shape / "S")
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
