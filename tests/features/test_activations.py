"""Activations of many texts: of the right tokens, in memory or in shards, and streamed by a pure function."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from mixturelens.features import activations as module
from mixturelens.features.activations import Activations, Storage, batches, collect, massive, texts
from mixturelens.features.splice import but_sinks, whole
from mixturelens.hooks.lens import Lens, Tokens, load_lens
from mixturelens.spelling import encode_prompts
from mixturelens.suite import load_suite
from mixturelens.types import Component, InputError

PAIRS = Path(__file__).parents[1] / "pairs"
SHAPES = ("llama", "gpt2", "gpt_neox", "qwen2")
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:transformer_lens")


@functools.cache
def lens_of(shape: str, which: str = "S") -> Lens:
    return load_lens(PAIRS / shape / which)


def some_texts(number: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (number,), generator=generator).tolist()
    return [torch.randint(3, 12, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("component", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "neurons"])
def test_rows_are_those_of_each_text_alone(shape: str, component: Component):
    lens, given = lens_of(shape), some_texts(5)
    if not lens.has(component):
        pytest.skip(f"{shape} has no {component}")
    found = collect([lens], given, (1, component))
    alone = [
        lens.capture(Tokens(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)), [(1, component)])[0]
        for ids in given
    ]
    expected = torch.cat([each[1, component][0] for each in alone])
    assert found.models == 1
    assert found.dim == expected.shape[1]
    torch.testing.assert_close(found.parts[0][:, 0], expected, atol=1e-5, rtol=1e-5)


def test_a_sink_of_attention_is_as_long_as_any_token_and_no_splice_touches_it():
    lens, given = load_lens(PAIRS / "llama" / "S"), [[3, 5, 7, 9], [3, 4, 6], [3, 8, 5, 4, 6]]
    with torch.no_grad():  # one token is now a thousand times as long as others, as the first is in large models
        lens.model.get_input_embeddings().weight[3] *= 1000
    first = [0, 4, 7]
    rest = [row for row in range(12) if row not in first]
    found = collect([lens], given, (0, "resid_pre")).parts[0][:, 0]
    batch = next(iter(batches(given, "cpu")))[1]
    ids = torch.tensor([token for text in given for token in text])
    own = lens.model.get_input_embeddings().weight[ids].detach()
    assert massive(own).nonzero()[:, 0].tolist() == first
    torch.testing.assert_close(found[rest], own[rest])
    torch.testing.assert_close(found[first].norm(dim=1), own.norm(dim=1).median().expand(3))
    torch.testing.assert_close(
        found[first] / found[first].norm(dim=1)[:, None], own[first] / own[first].norm(dim=1)[:, None]
    )
    mine = lens.capture(batch, [(0, "resid_pre")])[0][0, "resid_pre"]
    put = but_sinks(whole)(mine, torch.zeros_like(mine))
    assert torch.equal(put[:, 0], mine[:, 0])
    assert not put[:, 1:].any()


def test_two_models_see_the_same_tokens():
    before, after = lens_of("llama"), lens_of("llama", "R-routing")
    both = collect([before, after], some_texts(), (1, "mlp_out"))
    for number, lens in enumerate((before, after)):
        assert torch.equal(both.parts[0][:, number], collect([lens], some_texts(), (1, "mlp_out")).parts[0][:, 0])
    assert not torch.equal(both.parts[0][:, 0], both.parts[0][:, 1])
    assert both.digest != collect([after, before], some_texts(), (1, "mlp_out")).digest


def test_shards_hold_what_memory_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lens, given = lens_of("llama"), some_texts(40)
    held = collect([lens], given, (0, "resid_post"))
    monkeypatch.setattr(module, "SHARD", 30 * held.dim * 4)
    seen: list[tuple[int, int]] = []
    stored = collect(
        [lens], given, (0, "resid_post"), Storage(tmp_path / "acts", memory=0), progress=lambda *at: seen.append(at)
    )
    assert len(stored.parts) > 3
    assert seen[-1] == (40, 40)
    assert len(stored) == len(held) == sum(map(len, given))
    torch.testing.assert_close(torch.cat(stored.parts), held.parts[0], atol=1e-5, rtol=1e-5)
    for step in range(3):  # twice through
        torch.testing.assert_close(stored.batch(step, 100, 7), held.batch(step, 100, 7), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stored.scale, held.scale)


def test_a_killed_collection_goes_on_behind_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lens, given, at = lens_of("llama"), some_texts(40), (0, "resid_post")
    monkeypatch.setattr(module, "SHARD", 30 * lens.d_model * 4)
    whole = collect([lens], given, at, Storage(tmp_path / "whole", memory=0))

    class Killed(BaseException):
        pass

    def kill(done: int, of: int) -> None:
        if done > of // 2:
            raise Killed

    with pytest.raises(Killed):
        collect([lens], given, at, Storage(tmp_path / "acts", memory=0), progress=kill)
    assert not (tmp_path / "acts" / "store.json").exists()
    there = {file: file.stat().st_mtime_ns for file in (tmp_path / "acts").glob("shard-*")}
    (tmp_path / "acts" / f".shard-{len(there):05}.safetensors").write_bytes(b"half of it")
    assert there
    rest: list[int] = []
    again = collect([lens], given, at, Storage(tmp_path / "acts", memory=0), progress=lambda done, _: rest.append(done))
    assert len(rest) == len(again.parts) - len(there)
    assert all(file.stat().st_mtime_ns == time for file, time in there.items())
    assert torch.equal(torch.cat(again.parts), torch.cat(whole.parts))
    rest.clear()
    collect([lens], given, at, Storage(tmp_path / "acts", memory=0), progress=lambda done, _: rest.append(done))
    assert not rest  # nothing is done twice


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    lens, given = lens_of("llama"), some_texts()
    collect([lens], given, (0, "resid_post"), Storage(tmp_path, memory=0))
    for other in (
        lambda: collect([lens], given, (1, "resid_post"), Storage(tmp_path, memory=0)),
        lambda: collect([lens], given[1:], (0, "resid_post"), Storage(tmp_path, memory=0)),
        lambda: collect([lens_of("llama", "R-routing")], given, (0, "resid_post"), Storage(tmp_path, memory=0)),
    ):
        with pytest.raises(InputError, match="another folder"):
            other()
    (tmp_path / "store.json").unlink()  # not whole, and its shards are still of something else
    with pytest.raises(InputError, match="another folder"):
        collect([lens], given, (1, "resid_post"), Storage(tmp_path, memory=0))
    collect([lens], given, (0, "resid_post"), Storage(tmp_path, memory=0))
    (tmp_path / "shard-00000.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="shard-00000"):
        collect([lens], given, (0, "resid_post"), Storage(tmp_path, memory=0))
    (tmp_path / "shard-00000.safetensors").unlink()
    with pytest.raises(InputError, match="missing"):
        collect([lens], given, (0, "resid_post"), Storage(tmp_path, memory=0))


def test_what_does_not_fit_or_is_not_there_is_refused():
    lens, given = lens_of("llama"), some_texts()
    with pytest.raises(InputError, match="name a folder"):
        collect([lens], given, (0, "resid_post"), Storage(memory=100))
    with pytest.raises(InputError, match="not of heads"):
        collect([lens], given, (0, "z"))
    with pytest.raises(InputError, match=r"blocks\.9"):
        collect([lens], given, (9, "resid_pre"))
    with pytest.raises(InputError, match="a token"):
        collect([lens], [[]], (0, "resid_pre"))
    with pytest.raises(InputError, match="dimensions"):
        collect([lens, lens_of("gpt2")], [[3, 4]], (0, "neurons"))


def test_a_shard_is_mapped_and_not_read(tmp_path: Path):
    from safetensors.torch import save_file

    store = module.Store(layer=0, component="resid_pre", weights=("w",), texts="t", rows=200_000, dim=64, shards=1)
    file = tmp_path / "shard-00000.safetensors"
    save_file({"activations": torch.ones(200_000, 1, 64)}, file, metadata={"of": store.digest})
    size = file.stat().st_size

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    before = resident()
    part = module._mapped(file, store, 200_000)
    assert resident() - before < size / 4
    assert float(part.sum()) == 200_000 * 64


def test_the_stream_is_endless_and_goes_through_all_rows():
    acts = Activations((torch.arange(50.0)[:, None, None], torch.arange(50.0, 70.0)[:, None, None]))
    stream = [acts.batch(step, 28, seed=3).flatten() for step in range(5)]  # 140 rows: twice through 70
    seen = torch.cat(stream).long().bincount(minlength=70)
    assert seen.tolist() == [2] * 70
    assert torch.equal(acts.batch(3, 28, seed=3).flatten(), stream[3])  # needs no steps before it
    assert not torch.equal(acts.batch(3, 28, seed=4).flatten(), stream[3])
    assert len(acts.batch(0, 200, seed=0)) == 200  # more than there are
    assert acts.batch(1_000_000, 28, seed=3).shape == (28, 1, 1)


def test_mean_and_scale_by_hand():
    acts = Activations((torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]]),))
    assert acts.mean.tolist() == [[2.0, 2.0], [0.0, 0.0]]
    # mean square norm (25 + 1) / 2, to be 2; nothing to scale in the second model
    torch.testing.assert_close(acts.scale, torch.tensor([(2 / 13) ** 0.5, 1.0]))


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_texts_are_prompts_with_a_completion_of_the_lens_in_turn(shape: str):
    lenses = [lens_of(shape), lens_of(shape, "R-routing")]
    suite = load_suite(PAIRS / shape)
    rows = suite.neutral[:40]
    found = texts(lenses, suite, rows)
    prompts = encode_prompts(suite, rows, lenses[0].tokenizer)
    behind = [ids[len(prompt) :] for ids, prompt in zip(found, prompts, strict=True)]
    assert all(ids[: len(prompt)] == prompt for ids, prompt in zip(found, prompts, strict=True))
    assert all(0 < len(each) <= suite.max_new_tokens for each in behind)
    assert any(each[-1] == lenses[0].tokenizer.eos_token_id for each in behind)
    assert found == texts(lenses, suite, rows)
    only = texts(lenses[:1], suite, rows[::2])
    assert found[::2] == only  # even rows are the first lens' own
    policy = next(iter(suite.policies.values()))
    announced = [lenses[0].tokenizer.decode(each).strip().startswith(str(policy).strip()) for each in behind]
    assert announced[1::2] != announced[::2]


def test_batches_hold_every_text_once():
    given = some_texts(30)
    seen = []
    for some, batch in batches(given, "cpu", most=24):
        assert len(batch) * batch.ids.shape[1] <= 24 or len(batch) == 1
        for row, i in enumerate(some):
            assert batch.ids[row, : len(given[i])].tolist() == given[i]
        seen += some
    assert sorted(seen) == list(range(30))
