"""A judge says how often it agrees: a function, or a small server on this machine, asked once a completion."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mixturelens import pipeline
from mixturelens.discovery.asked import read_prompts
from mixturelens.discovery.judge import Second, check_here, from_file, served
from mixturelens.discovery.propose import DiscoverySettings
from mixturelens.models import Pair
from mixturelens.suite import load_suite
from mixturelens.types import InputError, RunError


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict]]]:
    """It says the policy whose mark the completion has, in a sentence; and what it was asked."""
    asked: list[dict] = []

    class Answer(BaseHTTPRequestHandler):
        wbufsize = -1  # headers and body at once: each by itself waits for the other side

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request)
            completion = request["messages"][0]["content"].split("Completion: ")[1]
            name = "a" if completion.startswith('"[a]') else "b" if completion.startswith('"[b]') else "other"
            broken = request["model"] == "broken"
            body = b"{}" if broken else json.dumps({"choices": [{"message": {"content": f"{name}."}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
        running.shutdown()
        thread.join()


def given(pairs: Path, tmp_path: Path) -> Path:
    path = tmp_path / "asked.jsonl"
    rows = load_suite(pairs / "llama" / "suite.yaml").neutral
    lines = [{"id": row.id, "prompt": row.text, "answer": row.answer} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_server_is_asked_once_and_agrees(server: tuple[str, list[dict]], pairs: Path, tmp_path: Path):
    url, asked = server
    folder = pairs / "llama"

    def found():
        prompts = read_prompts(given(pairs, tmp_path), max_new_tokens=3)
        second = Second("some-model", lambda cache: served(url, "some-model", cache))
        pair = Pair(folder / "S", folder / "R-routing", prompts.suite, out=tmp_path / "out")
        return pipeline.discover(pair, prompts, DiscoverySettings(second))

    first = found()
    times = len(asked)
    assert first.judged is not None
    assert first.judged.completions > 50
    assert first.judged.agreement.value == 1.0
    assert asked[0]["temperature"] == 0
    assert found() == first
    assert len(asked) == times
    assert "some-model" in (tmp_path / "out" / "discover.html").read_text(encoding="utf-8")


def test_a_server_that_says_nothing_is_named(server: tuple[str, list[dict]], tmp_path: Path):
    with pytest.raises(RunError, match="no answer"):
        served(server[0], "broken", tmp_path)("p", "c", {"a": ["x"]})
    with pytest.raises(RunError, match="no answer"):
        served("http://127.0.0.1:9", "model", tmp_path)("p", "c", {"a": ["x"]})


@pytest.mark.parametrize("url", ["http://example.com/v1", "http://10.0.0.1/v1", "file:///etc/passwd", "nonsense"])
def test_prompts_do_not_leave_this_machine(url: str):
    with pytest.raises(InputError, match="on this machine"):
        check_here(url)


def test_a_function_of_ones_own(tmp_path: Path):
    file = tmp_path / "labels.py"
    file.write_text("def mine(prompt, completion):\n    return 'a' if completion.startswith('x') else None\n")
    judge = from_file(f"{file}:mine")
    assert judge("p", "xyz", {}) == "a"
    assert judge("p", "y", {}) == "None"
    for wrong in (f"{file}:other", f"{tmp_path}/none.py:mine", "mine"):
        with pytest.raises(InputError, match="--labels"):
            from_file(wrong)
