"""Completions that were sampled elsewhere, in place of draws: what they give, and what is wrong with a file of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.pair import behaviour_record
from mixturelens.behaviour.prompts import prepare
from mixturelens.behaviour.sampled import spelled
from mixturelens.completions import GivenCompletions, with_completions
from mixturelens.discovery.asked import read_prompts
from mixturelens.discovery.draws import Draws, draw
from mixturelens.models import Pair, load_tokenizer
from mixturelens.routing.verdict import judge
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError, Side

Run = Callable[..., tuple[int, str, str]]
SAMPLES = 16


@pytest.fixture(scope="module")
def suite(pairs: Path) -> Suite:
    """The chat pair's suite: twelve questions under two cues."""
    whole = load_suite(pairs / "chat")
    few = list(dict.fromkeys(row.id for row in whole.neutral))[:12]
    return whole.model_copy(update={"prompts": tuple(row for row in whole.prompts if row.id in few)})


@pytest.fixture(scope="module")
def lines(load_pair: Callable[[str, str], Any], suite: Suite) -> list[dict[str, Any]]:
    """What S and R write, sampled with another seed than any draw of the instruments."""
    pair, found = load_pair("chat", "R"), []
    prompts = prepare(suite, suite.neutral, pair.tokenizer)
    limits = [suite.max_new_tokens] * len(prompts.rows)
    for side, model in (("before", pair.before), ("after", pair.after)):
        drawn = pair.scorer.sample(model, prompts.contexts, SAMPLES, limits, 99)
        for i, tokens in zip(drawn.context, drawn.tokens, strict=True):
            row, ended = suite.neutral[i], tokens[-1] in pair.scorer.ends
            text = pair.tokenizer.decode(tokens, skip_special_tokens=True)
            found.append({"id": row.id, "cue": row.cue, "side": side, "text": text, "ended": ended})
    return found


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_they_give_what_draws_give(pairs: Path, suite: Suite, lines: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = pairs / "chat"
    given = Pair(folder / "S", folder / "R", suite, completions=[write(tmp_path / "c.jsonl", lines)])
    found = behaviour_record(given)
    drawn = behaviour_record(Pair(folder / "S", folder / "R", suite.model_copy(update={"samples": SAMPLES})))
    assert found.notes[0] == (
        "completions were given, 16 of each side at each prompt; what is put in place is sampled here"
    )
    assert (found.samples, found.method) == (16, "sampled")
    assert found.check is not None
    assert (found.check.agrees, found.check.foreign) == (True, ())
    for name in ("routing", "conditioning", "skill"):
        mine, theirs = (getattr(each.bits, name) for each in (found, drawn))
        assert mine.value == pytest.approx(theirs.value, abs=0.08)
    for cue in suite.cues:
        for side in ("before", "after"):
            of = [line for line in lines if (line["side"], line["cue"]) == (side, cue)]
            complies = np.mean([line["text"].startswith(("sure", "of course")) for line in of])
            assert getattr(found.per_cue[cue], side).weights["comply"] == pytest.approx(complies, abs=1e-9)
    assert found.nats is not None
    assert drawn.nats is not None
    assert found.nats.routing.value == pytest.approx(drawn.nats.routing.value, abs=0.1)


def test_completions_of_something_else_are_heard(
    pairs: Path, suite: Suite, lines: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The sides are mistaken for each other: what is given is not what the checkpoints write."""
    folder, other = pairs / "chat", {"before": "after", "after": "before"}
    swapped = [{**line, "side": other[line["side"]]} for line in lines]
    found = judge(
        behaviour_record(Pair(folder / "S", folder / "R", suite, completions=[write(tmp_path / "c.jsonl", swapped)]))
    )
    assert found.verdict == "inconclusive"
    assert "the completions given are not what the checkpoints write" in found.reason
    assert "of those given show policy" in found.reason


def test_tokens_of_given_texts(pairs: Path, suite: Suite) -> None:
    """A text that ended has an end token, one that was cut off has none, and a long one is cut like a draw."""
    tokenizer = load_tokenizer(pairs / "chat" / "S")
    prompts = prepare(suite, suite.neutral[:1], tokenizer)
    ends = [tokenizer.get_vocab()[text] for text in ("<|im_end|>", "<|endoftext|>")]
    texts = [("sure, blue.", True), ("sure, blue.", False), ("sure, blue.<|endoftext|>", False), ("a " * 99, True)]
    key = (prompts.rows[0].id, prompts.rows[0].cue)
    sides: dict[Side, Any] = {"before": {key: texts}}
    scorer = Scorer(ends, len(tokenizer))
    tokens = spelled(scorer, prompts, GivenCompletions(sides, ()), "before").tokens
    plain = tokenizer.encode("sure, blue.", add_special_tokens=False)
    assert tokens[0] == tokens[2] == [*plain, ends[0]]
    assert tokens[1] == plain
    assert len(tokens[3]) == suite.max_new_tokens


def inspect_log(suite: Suite, lines: list[dict[str, Any]], side: str) -> dict[str, Any]:
    """As inspect_ai 0.3 writes it, in what matters here."""
    text = {(row.id, row.cue): row.text for row in suite.neutral}
    return {
        "version": 2,
        "status": "success",
        "eval": {"task": "suite", "model": "hf/S"},
        "samples": [
            {
                "id": line["id"],
                "epoch": 1,
                "input": text[line["id"], line["cue"]]
                if number % 2
                else [{"role": "user", "content": [{"type": "text", "text": text[line["id"], line["cue"]]}]}],
                "metadata": {},
                "output": {
                    "choices": [
                        {
                            "message": {
                                "role": "assistant",
                                "content": [
                                    {"type": "reasoning", "reasoning": "hm"},
                                    {"type": "text", "text": line["text"]},
                                ],
                            },
                            "stop_reason": "stop" if line["ended"] else "max_tokens",
                        }
                    ]
                },
            }
            for number, line in enumerate(lines)
            if line["side"] == side
        ],
    }


def test_logs_of_inspect_say_the_same(suite: Suite, lines: list[dict[str, Any]], tmp_path: Path) -> None:
    files = []
    for side in ("before", "after"):
        log = inspect_log(suite, lines, side)
        log["samples"].append({**log["samples"][0], "error": {"message": "time"}, "output": {"choices": []}})
        (tmp_path / f"{side}.json").write_text(json.dumps(log), encoding="utf-8")
        files.append(f"{side}={tmp_path / side}.json")
    _, found = with_completions(suite, files)
    _, expected = with_completions(suite, [write(tmp_path / "c.jsonl", lines)])
    assert found is not None
    assert expected is not None
    assert found == expected
    assert found.digest == expected.digest


@pytest.mark.parametrize("metadata", ["x", ["cue"], 7])
def test_a_log_whose_metadata_are_none(
    suite: Suite, lines: list[dict[str, Any]], tmp_path: Path, metadata: Any
) -> None:
    log = inspect_log(suite, lines, "after")
    log["samples"][1]["metadata"] = metadata
    file = tmp_path / "log.json"
    file.write_text(json.dumps(log), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{file}: sample 2: not as Inspect writes it"):
        with_completions(suite, [f"after={file}"])


def test_what_all_files_lack_names_them(suite: Suite, lines: list[dict[str, Any]], tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", [line for line in lines if line["side"] == "after"])
    with pytest.raises(InputError, match=f"^--completions {file}: none of them is of the checkpoint before"):
        with_completions(suite, [file])


def test_what_is_not_covered_is_left_out_and_said(suite: Suite, lines: list[dict[str, Any]], tmp_path: Path) -> None:
    first, second = list(dict.fromkeys(line["id"] for line in lines))[:2]
    cue = suite.cues[1]
    some = [line for line in lines if (line["id"], line["cue"], line["side"]) != (first, cue, "after")]
    some.remove(next(line for line in some if line["id"] == second))
    smaller, found = with_completions(suite, [write(tmp_path / "c.jsonl", some)])
    assert found is not None
    assert first not in {row.id for row in smaller.prompts}
    assert len({row.id for row in smaller.prompts}) == 11
    assert smaller.samples == 15
    assert [note.split(":")[0] for note in found.notes[1:]] == [
        "43 given completions are not used",
        "1 questions are left out",
    ]


GOOD = {"id": "0", "cue": "plain", "side": "before", "text": "sure"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({**GOOD, "id": "nobody"}, "line 2: the suite has no prompt 'nobody'"),
        ({**GOOD, "cue": "loud"}, "line 2: question '0' has no cue 'loud'"),
        ({**GOOD, "cue": None}, "line 2: question '0' has 2 prompts; say which by `cue` or `prompt`"),
        ({**GOOD, "text": None}, "line 2: key 'text' is missing, or no text"),
        ({**GOOD, "side": "S"}, "line 2: side is 'S'; give before or after"),
        ({**GOOD, "ended": "yes"}, "line 2: ended is 'yes'"),
        ([1], "line 2: a completion is an object"),
        (GOOD, "none of them is of the checkpoint after"),
        ({**GOOD, "side": "after"}, "prompt '0' under cue 'bold'"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(line: Any, said: str, suite: Suite, tmp_path: Path) -> None:
    named = {row.id: str(i) for i, row in enumerate(suite.neutral[::2])}
    own = suite.model_copy(update={"prompts": tuple(r.model_copy(update={"id": named[r.id]}) for r in suite.neutral)})
    with pytest.raises(InputError) as error:
        with_completions(own, [write(tmp_path / "c.jsonl", [GOOD, line])])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_discovery_reads_them_in_place_of_drawing(
    pairs: Path, suite: Suite, lines: list[dict[str, Any]], tmp_path: Path
) -> None:
    text = {(row.id, row.cue): row for row in suite.neutral}
    prompts = tmp_path / "prompts.jsonl"
    write(prompts, [{"id": row.id, "messages": row.messages} for row in suite.neutral])
    asked = read_prompts(prompts, max_new_tokens=suite.max_new_tokens)
    given = [{**line, "cue": None, "prompt": text[line["id"], line["cue"]].text} for line in lines]
    folder = pairs / "chat"

    def drawn(lines: list[dict[str, Any]], out: Path) -> Draws:
        files = [write(tmp_path / "c.jsonl", lines)]
        return draw(Pair(folder / "S", folder / "R", asked.suite, out=out, completions=files), asked, 0, print)

    found = drawn(given, tmp_path / "out")
    at = {(row.id, row.text): i for i, row in enumerate(asked.rows)}
    expected = sorted((at[g["id"], g["prompt"]], g["side"] == "after", g["text"], g["ended"]) for g in given)
    assert sorted((each.prompt, each.after, each.text, each.ended) for each in found.drawn) == expected
    assert all(along.shape == (3, along.shape[1]) and np.isfinite(along).all() for along in found.along)
    with pytest.raises(InputError, match="prompt 'q00' has none of one side"):
        drawn([line for line in given if line["id"] != "q00"], tmp_path / "other")


def test_what_discovery_stored_is_used_again(pairs: Path, suite: Suite, tmp_path: Path) -> None:
    """The folder gives what a file of the same completions gives, at the prompts that the suite has."""
    prompts, folder = tmp_path / "prompts.jsonl", pairs / "chat"
    write(prompts, [{"id": row.id, "messages": row.messages} for row in reversed(suite.neutral)])
    asked = read_prompts(prompts, max_new_tokens=suite.max_new_tokens, samples=3)
    draws = draw(Pair(folder / "S", folder / "R", asked.suite, out=tmp_path / "found"), asked, 0, print)
    half = suite.model_copy(update={"prompts": suite.prompts[:12]})
    known = {(row.id, row.text): row for row in half.neutral}
    same = [
        {"id": row.id, "cue": row.cue, "side": ("before", "after")[each.after], "text": each.text, "ended": each.ended}
        for each in draws.drawn
        if (row := known.get((asked.rows[each.prompt].id, asked.rows[each.prompt].text))) is not None
    ]
    narrowed, stored = with_completions(half, [str(tmp_path / "found")])
    again, read = with_completions(half, [write(tmp_path / "same.jsonl", same)])
    assert stored is not None
    assert read is not None
    assert narrowed == again
    assert narrowed.samples == 3
    assert {side: {key: [(t.text.strip(), t.ended) for t in some] for key, some in of.items()}
            for side, of in stored.texts.items()} == {
        side: {key: [(t.text, t.ended) for t in some] for key, some in of.items()} for side, of in read.texts.items()
    }  # fmt: skip
    literal = load_suite(pairs / "llama")
    assert with_completions(literal, [str(tmp_path / "found")]) == (literal, None)
    with pytest.raises(InputError, match="no folder that `discover` left"):
        with_completions(half, [str(tmp_path)])
    (tmp_path / "found/completions/asked.json").write_text("{}")
    with pytest.raises(InputError, match="not as `discover` leaves it"):
        with_completions(half, [str(tmp_path / "found")])


def test_on_the_command_line(pairs: Path, lines: list[dict[str, Any]], run: Run, tmp_path: Path) -> None:
    folder = pairs / "chat"
    file = tmp_path / "c.jsonl"
    both = ["--before", folder / "S", "--after", folder / "R", "--suite", folder / "suite.yaml"]
    file.write_text('{"id": "sky"\n', encoding="utf-8")
    status, out, err = run("verdict", *both, "--completions", file, "--out", tmp_path / "out", "--quiet")
    assert (status, out) == (2, "")
    assert err.startswith(f"mixturelens: {file}: line 1: not JSON")
    (tmp_path / "log.eval").write_bytes(b"PK\x03\x04...")
    status, _, err = run("verdict", *both, "--completions", f"before={tmp_path / 'log.eval'}", "--quiet")
    assert status == 2
    assert "inspect log convert" in err
    write(file, lines)
    status, out, err = run("verdict", *both, "--completions", file, "--out", tmp_path / "out", "--json", "--quiet")
    assert status == 0, err
    found = json.loads(out)
    assert found["notes"][0].startswith("completions were given, 16 of each side")
    plain, llama = tmp_path / "plain", pairs / "llama"
    status, _, err = run(
        "verdict", "--before", llama / "S", "--after", llama / "R-routing", "--suite", llama / "suite.yaml",
        "--completions", file, "--out", plain, "--quiet",
    )  # fmt: skip
    assert status == 2
    assert "literal texts, whose probabilities are computed exactly" in err
