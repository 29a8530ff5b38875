"""Edges: masked runs are exact, attribution is their gradient, and a network made by hand gives numbers on paper."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from mixturelens.contrasts import cue_contrasts
from mixturelens.hooks.batches import Sides, sides
from mixturelens.hooks.lens import Lens, load_lens, tokens
from mixturelens.hooks.metrics import log_odds
from mixturelens.models import load_tokenizer
from mixturelens.patching import attribution
from mixturelens.patching import graph as graphs
from mixturelens.patching.attribution import (
    Circuits,
    EdgeScores,
    eap,
    eap_ig,
    eap_ig_of,
    exact,
    faithfulness,
    patch_paths,
)
from mixturelens.patching.graph import Graph, edge_graph, masked, masked_logits, written
from mixturelens.stats import resample_counts
from mixturelens.suite import load_suite
from mixturelens.types import InputError, RunError

SHAPES = ["llama", "gpt2", "gpt_neox", "qwen2"]
PAIRS = Path(__file__).parents[1] / "pairs"
REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"


@functools.cache
def organism(name: str) -> tuple[Graph, Sides]:
    """The S of a stored pair; or a checkpoint of the reference organism, on 40 of its questions."""
    suite, folder = (PAIRS / name, PAIRS / name / "S") if name in SHAPES else (REFERENCE, REFERENCE / name)
    lens = load_lens(folder)
    on = sides(lens, cue_contrasts(load_suite(suite), lens.tokenizer, "a", ("A", "B")).first(40))
    return edge_graph(lens, on), on


def metrics(graph: Graph, on: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ordinary runs of the clean and of the corrupt prompts."""
    with torch.no_grad():
        clean, corrupt = (on.metric(graph.lens.run(batch)[:, -1]) for batch in (on.clean, on.corrupt))
    return clean, corrupt


def at(graph: Graph, edge: str) -> tuple[int, int]:
    writer, reader = edge.split(" -> ")
    return graph.writers.index(writer), graph.readers.index(reader)


def named(graph: Graph, scores: torch.Tensor) -> dict[str, float]:
    """Scores of the edges that have one (norms leave gradients of 1e-9 where there should be none)."""
    found = (scores.abs() > 1e-6).nonzero().tolist()
    return {f"{graph.writers[u]} -> {graph.readers[v]}": pytest.approx(float(scores[u, v])) for u, v in found}


def spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([z.argsort().argsort().double() for z in (x, y)]))[0, 1])


# ---------------------------------------------------------------- the graph and its masked runs


def test_writers_and_readers_are_named_and_counted():
    graph, _ = organism("qwen2")
    assert graph.writers[:6] == ("input", "L0.h0", "L0.h1", "L0.h2", "L0.h3", "L0.mlp")
    assert graph.readers[:9] == (
        *(f"L0.h{i}.q" for i in range(4)),
        "L0.kv0.k",
        "L0.kv1.k",
        "L0.kv0.v",
        "L0.kv1.v",
        "L0.mlp",
    )
    assert graph.readers[-1] == "logits"
    # 8 channels of attention read 1 writer, then 6; MLPs read 5, then 10; the logits read all 11
    assert len(graph) == 8 * (1 + 6) + 5 + 10 + 11
    # in parallel blocks an MLP does not read the heads beside it
    assert len(organism("llama")[0]) - len(organism("gpt_neox")[0]) == 2 * 4
    parallel = organism("gpt_neox")[0]
    assert not parallel.exists[at(parallel, "L1.h0 -> L1.mlp")]
    assert parallel.exists[at(parallel, "L0.h0 -> L1.mlp")]


@pytest.mark.parametrize("shape", SHAPES)
def test_all_edges_are_the_clean_run_and_none_the_corrupt_run(shape: str):
    graph, on = organism(shape)
    corrupt = written(graph, on.corrupt)
    shape_of_mask = (1, on.clean.ids.shape[1], *graph.exists.shape)  # with an axis for positions
    with torch.no_grad():
        for mask, batch in ((torch.ones(shape_of_mask), on.clean), (torch.zeros(shape_of_mask), on.corrupt)):
            found = masked_logits(graph, on.clean, corrupt, mask)
            torch.testing.assert_close(found, graph.lens.run(batch)[:, -1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_flags_and_hooks_are_gone_after_a_run(shape: str):
    graph, on = organism(shape)
    masked(graph, on, [torch.ones(graph.exists.shape)])
    assert not graph.lens.bridge.cfg.use_split_qkv_input
    assert not graph.lens.bridge.cfg.use_hook_mlp_in
    assert not any(point.fwd_hooks for point in graph.lens.bridge.hook_dict.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_eap_is_the_gradient_of_the_masked_run(shape: str):
    graph, on = organism(shape)
    scores = eap(graph, on)
    mask = torch.ones(len(on), on.clean.ids.shape[1], *graph.exists.shape, requires_grad=True)
    metric = on.metric(masked_logits(graph, on.clean, written(graph, on.corrupt), mask))
    (gradient,) = torch.autograd.grad(metric.sum(), mask)
    for found, wanted in ((scores.per_question, gradient.sum(1)), (scores.per_position, gradient.mean(0))):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert not scores.per_question[:, ~graph.exists].any()


def test_the_masked_run_is_what_its_gradient_says_where_edges_are_half_patched():
    # by finite differences, so that nothing here knows how the gradient was taken: upstream edges are live
    graph, on = organism("qwen2")
    on = on.part(slice(4))
    corrupt = written(graph, on.corrupt)
    mask = torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    metric = on.metric(masked_logits(graph, on.clean, corrupt, mask)).sum()
    (gradient,) = torch.autograd.grad(metric, mask)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        up, down = (
            on.metric(masked_logits(graph, on.clean, corrupt, mask + step * direction)).double().sum()
            for step in (1e-2, -1e-2)
        )
    assert float(up - down) / 2e-2 == pytest.approx(float(gradient.norm()), rel=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_and_chunks_change_nothing(shape: str, monkeypatch):
    graph, on = organism(shape)
    on = on.part(slice(8))
    ids = [batch.ids.tolist() for batch in (on.clean, on.corrupt)]
    # every other question loses a word of its question, on both sides
    clean, corrupt = ([row if i % 2 else [*row[:3], *row[4:]] for i, row in enumerate(side)] for side in ids)
    mixed = Sides(tokens(clean, width=9), tokens(corrupt, width=9), on.metric)
    mask = torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(0))
    together = [eap(graph, mixed), eap_ig(graph, mixed, 2)], masked(graph, mixed, [mask])
    monkeypatch.setattr(graphs, "CHUNK", 3 * 9 * len(graph.readers) * graph.lens.d_model)
    chunked = [eap(graph, mixed), eap_ig(graph, mixed, 2)], masked(graph, mixed, [mask])
    for which, whole in enumerate(together[0]):
        scale = float(whole.per_question.abs().max())
        torch.testing.assert_close(chunked[0][which].per_question, whole.per_question, atol=1e-5 * scale, rtol=0)
        torch.testing.assert_close(chunked[0][which].per_position, whole.per_position, atol=1e-5 * scale, rtol=0)
        assert not whole.per_position[:2].any()
    torch.testing.assert_close(chunked[1], together[1], atol=1e-4, rtol=1e-5)
    for parity in (0, 1):  # rows of one length, without padding
        rows = range(parity, len(on), 2)
        metric = log_odds(
            *([[int(t) for t in side[i].nonzero()] for i in rows] for side in (on.metric.target, on.metric.foil)), 16
        )
        alone = Sides(tokens([clean[i] for i in rows]), tokens([corrupt[i] for i in rows]), metric)
        assert not alone.clean.padded
        for which, whole in enumerate(together[0]):
            scale = float(whole.per_question.abs().max())
            found = (eap(graph, alone), eap_ig(graph, alone, 2))[which].per_question
            torch.testing.assert_close(found, whole.per_question[parity::2], atol=1e-5 * scale, rtol=0)
        torch.testing.assert_close(masked(graph, alone, [mask]), together[1][:, parity::2], atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------- numbers on paper


@functools.cache
def on_paper() -> tuple[Graph, Sides]:
    """A Llama without norms (epsilon 2^40 and weight 2^20: they divide by one) and with uniform attention.

    The cue, 3 (clean) or 1 (corrupt), is dimension 0 of token 0; token 1 is empty. What is written at token 1:

        L0.h0    dim 1: the cue        (at token 0: twice the cue)
        L0.h1    dim 2: -2 x the cue
        L0.mlp   dim 3: (dim 1)^2      (relu(x) x)
        L1.h0    dim 4: 2 x the mean of dim 1 over both tokens
        logits   M = dim 2 + 2 dim 3 + 3 dim 4
    """
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=1, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        hidden_act="relu", rms_norm_eps=2.0**40, max_position_embeddings=8, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    state = {name: torch.full_like(p, 2.0**20 if "norm" in name else 0.0) for name, p in model.state_dict().items()}
    state["model.embed_tokens.weight"][3, 0], state["model.embed_tokens.weight"][4, 0] = 3.0, 1.0
    first, second = (f"model.layers.{layer}." for layer in range(2))
    state[first + "self_attn.v_proj.weight"][0, 0] = 1.0  # head 0 is value rows 0 to 3, head 1 is 4 to 7
    state[first + "self_attn.o_proj.weight"][1, 0] = 2.0
    state[first + "self_attn.v_proj.weight"][4, 0] = 1.0
    state[first + "self_attn.o_proj.weight"][2, 4] = -4.0
    for name in ("gate_proj", "up_proj"):
        state[f"{first}mlp.{name}.weight"][0, 1] = 1.0
    state[first + "mlp.down_proj.weight"][3, 0] = 1.0
    state[second + "self_attn.v_proj.weight"][0, 1] = 1.0
    state[second + "self_attn.o_proj.weight"][4, 0] = 2.0
    state["lm_head.weight"][7, 2:5] = torch.tensor([1.0, 2.0, 3.0])
    model.load_state_dict(state)
    model.config.architectures = ["LlamaForCausalLM"]
    lens = Lens(model, load_tokenizer(PAIRS / "llama" / "S"))
    on = Sides(tokens([[3, 5]]), tokens([[4, 5]]), log_odds([[7]], [[8]], 16))
    return edge_graph(lens, on), on


STRAIGHT = {  # paths without the square: gradients are the same everywhere
    "input -> L0.h1.v": -4,
    "L0.h1 -> logits": -4,
    "L0.h0 -> L1.h0.v": 18,  # (4 at token 0 and 2 at token 1) x 3
    "L1.h0 -> logits": 18,
    "L0.mlp -> logits": 16,  # 2 (9 - 1)
}


def test_on_paper_the_whole():
    graph, on = on_paper()
    clean, corrupt = metrics(graph, on)
    assert clean.tolist() == [-6 + 2 * 9 + 3 * 9]
    assert corrupt.tolist() == [-2 + 2 * 1 + 3 * 3]


def test_on_paper_eap_takes_the_slope_of_the_clean_run():
    # the square's slope is 2 x 3 there: 2 (2 x 3) 2 = 24 through the MLP
    graph, on = on_paper()
    assert named(graph, eap(graph, on).mean) == {**STRAIGHT, "L0.h0 -> L0.mlp": 24, "input -> L0.h0.v": 24 + 18}


@pytest.mark.parametrize("steps", [1, 4])
def test_on_paper_integrated_gradients_and_exact_patches_take_the_square(steps: int):
    # the slope's mean from 1 to 3 is 2 x 2, which midpoints find in any number of steps: 2 (9 - 1) = 16
    graph, on = on_paper()
    wanted = {**STRAIGHT, "L0.h0 -> L0.mlp": 16, "input -> L0.h0.v": 16 + 18}
    assert named(graph, eap_ig(graph, on, steps).mean) == wanted
    assert named(graph, exact(graph, on)[0]) == wanted


def test_on_paper_positions():
    graph, on = on_paper()
    scores = eap(graph, on)
    edge = at(graph, "L0.h0 -> L1.h0.v")
    assert scores.per_position[(slice(None), *edge)].tolist() == pytest.approx([12, 6])
    masks = torch.ones(2, 2, *graph.exists.shape)
    masks[(range(2), range(2), *edge)] = 0  # mask i patches the edge at token i alone
    assert masked(graph, on, list(masks))[:, 0].tolist() == pytest.approx([39 - 12, 39 - 6])


def test_on_paper_circuits_and_their_curve():
    graph, on = on_paper()

    def kept(*edges: str) -> float:
        mask = torch.zeros(graph.exists.shape)
        for edge in edges:
            mask[at(graph, edge)] = 1
        return float(masked(graph, on, [mask])[0, 0])

    assert kept("input -> L0.h0.v", "L0.h0 -> L0.mlp", "L0.mlp -> logits") == pytest.approx(9 + 16)
    assert kept("input -> L0.h0.v", "L0.h0 -> L0.mlp") == pytest.approx(9)  # cut behind the MLP
    assert kept("input -> L0.h1.v", "L0.h1 -> logits") == pytest.approx(9 - 4)
    # by |score|: input -> h0 (34); two edges of 18; two of 16; the two of -4, whose path works against the metric
    scores, total = eap_ig(graph, on, 1).mean, len(graph)
    sizes = (1, 3, 5, 7)
    curve = faithfulness(graph, on, scores, resample_counts(1, 0), Circuits([size / total for size in sizes], seeds=()))
    assert curve.edges == (0, *sizes, total)
    wanted = np.array([0, 0, 18 / 30, 34 / 30, 1, 1])
    np.testing.assert_allclose([f.value for f in curve.ranked.kept], wanted, atol=1e-6)
    across = np.array(curve.edges) / total
    assert curve.ranked.cpr.value == pytest.approx(np.trapezoid(wanted, across))
    assert curve.ranked.cmd.value == pytest.approx(np.trapezoid(np.abs(1 - wanted), across))


# ---------------------------------------------------------------- trained organisms


@pytest.mark.parametrize("shape", SHAPES)
def test_integrated_gradients_converge_and_add_up(shape: str):
    # largest change of any edge's mean when steps are doubled from 4, 8 and 16, of metrics that differ by some 23 nats:
    # llama 4.5 0.14 0.04, gpt2 2.5 0.10 0.003, gpt_neox 1.0 0.16 0.01, qwen2 1.9 0.24 0.0007
    graph, on = organism(shape)
    clean, corrupt = metrics(graph, on)
    scores = [eap_ig(graph, on, steps) for steps in (4, 8, 16, 32)]
    changes = [float((b.mean - a.mean).abs().max()) for a, b in itertools.pairwise(scores)]
    print(f"\n{shape}: largest change at each doubling from 4 steps", [round(change, 4) for change in changes])
    assert changes[0] > changes[1] > changes[2]
    assert changes[2] < 0.06
    # complete: the input's edges carry everything, question by question
    torch.testing.assert_close(scores[-1].per_question[:, 0].sum(-1), clean - corrupt, atol=0.02, rtol=0)


@pytest.mark.slow
def test_questions_that_do_not_close_are_given_more_steps(monkeypatch: pytest.MonkeyPatch):
    graph, on = organism("checkpoints/rl-A")
    clean, corrupt = metrics(graph, on)
    change = clean - corrupt

    def missed(scores: EdgeScores) -> torch.Tensor:
        found = (scores.per_question[:, 0].sum(-1) - change).abs() / change.abs()
        torch.testing.assert_close(scores.missed, found, atol=1e-4, rtol=1e-3)
        return found

    points = []
    slopes = attribution._gradients
    monkeypatch.setattr(attribution, "_gradients", lambda graph, on, x: points.append(len(on)) or slopes(graph, on, x))
    refined = eap_ig(graph, on)
    assert missed(refined).max() < 0.02
    assert points[:32] == [len(on)] * 32  # those that close already are left alone
    assert 0 < max(points[32:]) < len(on)
    monkeypatch.setattr(attribution, "MOST", 32)
    plain = eap_ig(graph, on)
    assert missed(plain).max() > 0.1
    closed = missed(plain) <= 0.02
    torch.testing.assert_close(plain.per_question[closed], refined.per_question[closed])
    # where fewer steps are asked for, all questions have as many
    assert missed(eap_ig(graph, on, 8)).median() > 0.02
    assert missed(eap(graph, on)).max() > 0.1


@pytest.mark.parametrize("name", ["llama", pytest.param("checkpoints/sft", marks=pytest.mark.slow)])
def test_attribution_ranks_edges_as_exact_patches_do(name: str):
    graph, on = organism(name)
    patched = exact(graph, on).mean(0)
    for scores, method in ((eap(graph, on).mean, "EAP"), (eap_ig(graph, on).mean, "EAP-IG")):
        signed = spearman(scores[graph.exists], patched[graph.exists])
        strength = spearman(scores.abs()[graph.exists], patched.abs()[graph.exists])
        print(f"\n{name}: Spearman of {method} with {len(graph)} exact patches {signed:.2f}, of sizes {strength:.2f}")
        assert signed > 0.5
        assert strength > 0.65


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoints/sft", "checkpoints/rl-A"])
def test_a_tenth_of_the_edges_does_it_and_a_random_tenth_does_not(name: str):
    graph, on = organism(name)
    counts = resample_counts(len(on), 0)
    curve = faithfulness(graph, on, eap_ig(graph, on).mean, counts)
    print(f"\n{name}: {dict(zip(curve.edges, [f.value for f in curve.ranked.kept], strict=True))}")
    tenth = curve.edges.index(round(0.1 * len(graph)))
    assert curve.ranked.kept[tenth].above(0.8)
    assert curve.ranked.cpr.above(0.9)
    assert curve.ranked.cmd.below(0.1)
    for control in curve.random:
        assert control.kept[tenth].below(0.1)
        assert control.cpr.below(0.5)
        assert control.cmd.above(0.5)
    assert [of.kept[0].value for of in (curve.ranked, *curve.random)] == [0] * 6
    assert [of.kept[-1].value for of in (curve.ranked, *curve.random)] == [1] * 6


def test_prompts_that_do_not_differ_have_no_faithfulness():
    graph, on = organism("llama")
    same = Sides(on.clean, on.clean, on.metric)
    curve = faithfulness(
        graph, same, torch.rand(graph.exists.shape), resample_counts(len(on), 0), Circuits([0.5], seeds=())
    )
    assert not curve.ranked.cpr.measured
    assert not any(kept.measured for kept in curve.ranked.kept)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("missing", ["blocks.0.attn.hook_q_input", "blocks.1.hook_mlp_in", "ln_final.hook_in"])
def test_a_hook_point_that_is_not_there_is_named(missing: str, monkeypatch):
    _, on = organism("llama")
    lens = load_lens(PAIRS / "llama" / "S")  # one that has not looked anything up yet
    hooks = {name: point for name, point in lens.bridge.hook_dict.items() if name != missing}
    monkeypatch.setattr(type(lens.bridge), "hook_dict", property(lambda bridge: hooks))
    with pytest.raises(InputError, match=missing):
        edge_graph(lens, on)


@pytest.mark.parametrize(
    ("flag", "silent"), [("set_use_split_qkv_input", "hook_q_input"), ("set_use_hook_mlp_in", "hook_mlp_in")]
)
def test_a_hook_that_does_not_fire_is_named(flag: str, silent: str, monkeypatch):
    graph, on = organism("llama")
    monkeypatch.setattr(type(graph.lens.bridge), flag, lambda bridge, value: None)
    for attempt in (lambda: edge_graph(graph.lens, on), lambda: eap(graph, on), lambda: exact(graph, on)):
        with pytest.raises(RunError, match=rf"{silent}' did not fire"):
            attempt()


def test_a_stream_that_is_no_sum_is_refused(monkeypatch):
    config = GraniteConfig(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        residual_multiplier=0.5, max_position_embeddings=32, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        architectures=["GraniteForCausalLM"],
    )  # fmt: skip
    _, on = organism("llama")
    torch.manual_seed(0)
    scaled = Lens(GraniteForCausalLM(config).eval(), load_tokenizer(PAIRS / "llama" / "S"))
    assert len(edge_graph(scaled, on)) == 4 * 3 * (1 + 6) + 5 + 10 + 11
    for block in scaled.bridge.blocks:  # as if nobody knew that what heads write is halved
        monkeypatch.delattr(block, "residual_contribution_scale")
    with pytest.raises(RunError, match=r"Granite.*L0\.mlp reads is not the sum of its edges"):
        edge_graph(scaled, on)


def test_a_graph_without_an_edge_that_is_there_is_refused(monkeypatch):
    # in this model the MLPs do read the heads beside them; masked runs at 0 and at 1 would not tell
    graph, on = organism("llama")
    monkeypatch.setattr(graph.lens, "has", lambda component: False)
    with pytest.raises(RunError, match=r"L0\.mlp reads is not the sum of its edges"):
        edge_graph(graph.lens, on)


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_single_edges_are_those_of_all(shape: str) -> None:
    graph, on = organism(shape)
    scores = eap_ig(graph, on, steps=2)
    assert scores.whole is not None
    torch.testing.assert_close(scores.whole.sum(1), scores.per_question)
    torch.testing.assert_close(scores.whole.mean(0), scores.per_position)
    edges = torch.tensor([[0, 0, 0], [5, 1, len(graph.readers) - 1]])
    torch.testing.assert_close(eap_ig_of(graph, on, edges, steps=2), scores.whole[:, *edges.unbind(1)])


def test_a_path_is_its_edges_patched_together() -> None:
    graph, on = organism("llama")
    one = exact(graph, on)
    found = patch_paths(graph, on, [("L0.h1", ["L1.mlp"]), ("L0.h1", ["L1.mlp", "logits"]), ("input", graph.readers)])
    writer, reader = graph.writers.index("L0.h1"), graph.readers.index("L1.mlp")
    torch.testing.assert_close(found[:, 0], one[:, writer, reader], atol=1e-5, rtol=1e-5)
    mask = torch.ones(graph.exists.shape)
    mask[writer, [reader, graph.readers.index("logits")]] = 0
    both = masked(graph, on, [torch.ones_like(mask), mask])
    torch.testing.assert_close(found[:, 1], both[0] - both[1], atol=1e-5, rtol=1e-5)
    # without anything from the input, nothing is left of the clean prompt
    ends = masked(graph, on, [torch.ones_like(mask), torch.zeros_like(mask)])
    torch.testing.assert_close(found[:, 2], ends[0] - ends[1], atol=1e-4, rtol=1e-4)
    wrong = ((("L7.h0", ["logits"]), "L7.h0"), (("input", ["L0.q"]), "L0.q"), (("L1.mlp", ["L0.mlp"]), "L0.mlp"))
    for path, culprit in wrong:
        with pytest.raises(InputError, match=culprit):
            patch_paths(graph, on, [path])
