"""The engine says what full forwards say: on every kind of site, in any order, padded, and in parts."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from mixturelens.contrasts import cue_contrasts
from mixturelens.hooks.batches import Sides, sides
from mixturelens.hooks.engine import Engine, Metric
from mixturelens.hooks.lens import NAMES, Lens, Tokens, load_lens, tokens
from mixturelens.suite import load_suite
from mixturelens.types import PER_HEAD, InputError, RunError, Site

PAIRS = Path(__file__).parents[1] / "pairs"
SHAPES = ["llama", "gpt2", "gpt_neox", "qwen2"]
every_shape = pytest.mark.parametrize("shape", SHAPES)
EXACT = {"atol": 1e-5, "rtol": 1e-6}  # log-odds are as large as 20
PLACES = ("cue", "question", "scattered", 0, 3, 6, None)


@functools.cache
def setting(shape: str) -> tuple[Lens, Sides]:
    folder = PAIRS / shape
    lens = load_lens(folder / "S")
    return lens, sides(lens, cue_contrasts(load_suite(folder), lens.tokenizer, "a", ("A", "B")).first(5))


@functools.cache
def deep_lens() -> Lens:
    """Four layers with grouped queries, so that patches of many layers join one another."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=32,
    )  # fmt: skip
    return Lens(LlamaForCausalLM(config).eval(), setting("llama")[0].tokenizer)


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 16, (n,), generator=generator).tolist() for n in lengths]


def every_activation(lens: Lens) -> list[tuple[int, str]]:
    return [(layer, component) for layer in range(lens.layers) for component in NAMES if lens.has(component)]


def other_source(lens: Lens, batch: Tokens) -> dict:
    """Activations of unrelated prompts of the same lengths: they differ from the base at every token."""
    lengths = batch.real.sum(1).tolist()
    return lens.capture(tokens(random_rows(lengths, seed=9), width=batch.ids.shape[1]), every_activation(lens))[0]


def every_kind(lens: Lens, places=PLACES) -> list[Site]:
    found = []
    for layer, component in every_activation(lens):
        heads = [None, *range(lens.heads_of(component))] if component in PER_HEAD else [None]
        neurons = [None, 0, lens.d_mlp - 1] if component == "neurons" else [None]
        found += [
            Site(layer=layer, component=component, head=head, neuron=neuron, position=place)
            for head in heads
            for neuron in neurons
            for place in places
        ]
    return found


def put_by_hand(activation: torch.Tensor, base: Tokens, spans, site: Site, value: torch.Tensor) -> None:
    """The site replaced row by row and token by token."""
    for row in range(len(base)):
        skip = int((~base.real[row]).sum())
        everything = range(base.ids.shape[1] - skip)
        named = spans[row][site.position] if isinstance(site.position, str) else (site.position,)
        for column in (skip + i for i in (everything if site.position is None else named)):
            if site.component == "pattern":
                unit = slice(None) if site.head is None else site.head
                activation[row, unit, column] = value[row, unit, column]
            else:
                unit = (site.head if site.head is not None else site.neuron,)
                at = (row, column, *(() if unit == (None,) else unit))
                activation[at] = value[at]


def by_hand(lens: Lens, base: Tokens, spans, sites: list[Site], source: dict, metric: Metric) -> torch.Tensor:
    """Full forwards: one for each activation, on a copy of the batch for each of its sites."""
    size, rows = len(base), torch.arange(len(base))
    found: list[torch.Tensor] = [torch.empty(0)] * len(sites)
    for key in {(site.layer, site.component) for site in sites}:
        mine = [i for i, site in enumerate(sites) if (site.layer, site.component) == key]
        copies = Tokens(base.ids.repeat(len(mine), 1), base.real.repeat(len(mine), 1))

        def edit(activation: torch.Tensor, key=key, mine=mine) -> torch.Tensor:
            for copy, i in zip(activation.split(size), mine, strict=True):
                put_by_hand(copy, base, spans, sites[i], source[key])
            return activation

        with torch.no_grad():
            logits = lens.run(copies, [(lens.point(*key), edit)])[:, -1]
        for i, one in zip(mine, logits.split(size), strict=True):
            found[i] = metric(one, rows)
    return torch.stack(found)


@functools.cache
def compared(shape: str) -> tuple[list[Site], dict, torch.Tensor, list]:
    """Every kind of site at every kind of position, and what one forward each says."""
    lens, both = setting(shape)
    spans = [{**named, "scattered": (1, 4, 6)} for named in both.spans]
    sites, source = every_kind(lens), other_source(lens, both.corrupt)
    return sites, source, by_hand(lens, both.corrupt, spans, sites, source, both.metric), spans


@every_shape
def test_the_engine_is_one_forward_per_patch(shape: str):
    lens, both = setting(shape)
    sites, source, expected, spans = compared(shape)
    found = Engine(lens, both.corrupt, spans).sweep(sites, source, both.metric)
    torch.testing.assert_close(found, expected, **EXACT)
    base = both.metric(lens.run(both.corrupt)[:, -1])
    moved = {str(site) for site, values in zip(sites, expected, strict=True) if not torch.allclose(values, base)}
    assert {"L0.resid_pre@scattered", "L1.mlp_out@6", "L1.k.0@0", "L0.pattern.1@3", "L0.neurons@question"} <= moved


@every_shape
def test_in_any_order_and_in_any_parts(shape: str):
    lens, both = setting(shape)
    sites, source, expected, spans = compared(shape)
    order = torch.randperm(len(sites), generator=torch.Generator().manual_seed(1)).tolist()
    steps: list[tuple[int, int]] = []
    for memory, some in ((1, order[:24]), (1 << 18, order[:160])):  # one patch of one row at a time; a few
        found = Engine(lens, both.corrupt, spans, memory=memory).sweep(
            [sites[i] for i in some], source, both.metric, lambda done, total: steps.append((done, total))
        )
        torch.testing.assert_close(found, expected[some], **EXACT)
    assert steps[0] == (1, 24 * len(both.corrupt))
    assert steps[-1] == (160 * len(both.corrupt),) * 2


@every_shape
def test_padded_is_unpadded(shape: str):
    lens, _ = setting(shape)
    rows = random_rows([4, 9, 7])
    spans = [{"early": (0, 1), "late": (len(row) - 2,), "last": (len(row) - 1,)} for row in rows]
    metric = lambda logits, _: logits[:, 11] - logits[:, 15]  # noqa: E731
    sites = every_kind(lens, ("early", "late", "last", 1, None))
    batch = tokens(rows)
    source = other_source(lens, batch)
    found = Engine(lens, batch, spans).sweep(sites, source, metric)
    for row, ids in enumerate(rows):
        width, skip = len(ids), 9 - len(ids)
        alone = {
            key: value[row : row + 1, :, skip:, skip:] if key[1] == "pattern" else value[row : row + 1, skip:]
            for key, value in source.items()
        }
        unpadded = Engine(lens, tokens([ids]), [spans[row]]).sweep(sites, alone, metric)
        torch.testing.assert_close(found[:, row], unpadded[:, 0], **EXACT)
        assert width + skip == 9
    some = sites[::7]
    expected = by_hand(lens, batch, spans, some, source, metric)
    torch.testing.assert_close(found[::7], expected, **EXACT)


@every_shape
def test_all_of_a_cut_is_the_source_run_and_none_is_the_base(shape: str):
    lens, both = setting(shape)
    cuts = [Site(layer=0, component="resid_pre")]
    for layer in range(lens.layers):
        cuts += [Site(layer=layer, component="resid_post"), Site(layer=layer, component="resid_pre")]
        cuts += [Site(layer=layer, component="resid_mid")] if lens.has("resid_mid") else []
    source, goal = lens.capture(both.clean, every_activation(lens))
    own, base = lens.capture(both.corrupt, every_activation(lens))
    engine = Engine(lens, both.corrupt, both.spans)
    expected = both.metric(goal).expand(len(cuts), -1)
    torch.testing.assert_close(engine.sweep(cuts, source, both.metric), expected, **EXACT)
    sites = every_kind(lens, ("cue", 3, None))
    unchanged = both.metric(base).expand(len(sites), -1)
    torch.testing.assert_close(engine.sweep(sites, own, both.metric), unchanged, **EXACT)
    assert (both.metric(goal) - both.metric(base)).mean() > 3


@st.composite
def tasks(draw: st.DrawFn) -> tuple[list[int], list[Site], int, int]:
    """(lengths of prompts, sites, bytes of memory, seed), for the deep model."""
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    place = st.one_of(st.none(), st.integers(0, min(lengths) - 1), st.sampled_from(["first", "ends", "last"]))
    site = st.builds(
        lambda layer, component, unit, position: Site(
            layer=layer,
            component=component,
            head=None if unit is None or component not in PER_HEAD else unit % (2 if component in "kv" else 4),
            neuron=unit if component == "neurons" else None,
            position=position,
        ),
        st.integers(0, 3),
        st.sampled_from(list(NAMES)),
        st.one_of(st.none(), st.integers(0, 23)),
        place,
    )
    sites = draw(st.lists(site, min_size=1, max_size=8))
    return lengths, sites, draw(st.sampled_from([1, 1 << 17, 1 << 27])), draw(st.integers(0, 99))


@given(tasks())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_set_of_sites_of_any_batch(task):
    lengths, sites, memory, seed = task
    lens, batch = deep_lens(), tokens(random_rows(lengths, seed))
    spans = [{"first": (0,), "ends": tuple({0, n - 1}), "last": (n - 1,)} for n in lengths]
    metric = lambda logits, _: logits[:, 3] - logits[:, 11]  # noqa: E731
    source = other_source(lens, batch)
    found = Engine(lens, batch, spans, memory=memory).sweep(sites, source, metric)
    expected = by_hand(lens, batch, spans, sites, source, metric)
    torch.testing.assert_close(found, expected, **EXACT)


def test_rows_may_have_their_position_in_different_places():
    lens, both = setting("llama")
    spans = [{"odd": (row % 3, 5)} for row in range(len(both.corrupt))]
    source = other_source(lens, both.corrupt)
    sites = every_kind(lens, ("odd",))
    found = Engine(lens, both.corrupt, spans).sweep(sites, source, both.metric)
    torch.testing.assert_close(found, by_hand(lens, both.corrupt, spans, sites, source, both.metric), **EXACT)


def put_anywhere(lens: Lens) -> list[Site]:
    """Every kind of site that takes values: streams, outputs, neurons, single heads."""
    kinds = [key for key in every_activation(lens) if key[1] != "pattern"]
    return [
        Site(layer=layer, component=component, head=1 if component in PER_HEAD else None, position=place)
        for layer, component in kinds
        for place in ("cue", "scattered", 6)
    ]


@every_shape
def test_values_put_at_a_site_are_its_patch(shape: str):
    lens, both = setting(shape)
    spans = [{**named, "scattered": (1, 4, 6)} for named in both.spans]
    columns = {"cue": [0], "scattered": [1, 4, 6], 6: [6]}
    engine, source = Engine(lens, both.corrupt, spans), other_source(lens, both.corrupt)
    rows = torch.tensor([3, 0, 3, 4])  # a row may come back, with other values
    turned = torch.tensor([3, 0, 1, 4])
    for site in put_anywhere(lens):
        whole = source[site.layer, site.component]
        whole = whole[:, :, site.head] if site.head is not None else whole
        values = whole[:, columns[site.position]][turned]
        with torch.no_grad():
            found = engine.logits_with(site, values, rows)
        for run, (row, place) in enumerate(zip(rows.tolist(), turned.tolist(), strict=True)):
            moved = {(site.layer, site.component): source[site.layer, site.component][[place] * 5]}
            pick = lambda logits, _: logits[:, 11] - logits[:, 14]  # noqa: E731
            expected = engine.sweep([site], moved, pick)[0, row]
            torch.testing.assert_close(found[run, 11] - found[run, 14], expected, **EXACT)


@every_shape
def test_its_gradient_is_that_of_the_whole_model(shape: str):
    lens, both = setting(shape)
    spans = [{**named, "scattered": (1, 4, 6)} for named in both.spans]
    columns = {"cue": [0], "scattered": [1, 4, 6], 6: [6]}
    engine, source = Engine(lens, both.corrupt, spans), other_source(lens, both.corrupt)
    weighed = [weight.requires_grad for weight in lens.model.parameters()]
    rows = torch.arange(5)
    for site in put_anywhere(lens):
        unit = () if site.head is None else (site.head,)
        at = (slice(None), columns[site.position], *unit)
        values = source[site.layer, site.component][at].clone().requires_grad_(True)
        total = both.metric(engine.logits_with(site, values, rows)).sum()
        if not total.requires_grad:  # nothing behind the last layer reads what is not at the last token
            assert (site.layer, site.position) == (lens.layers - 1, "cue")
            continue
        total.backward()
        again = values.detach().clone().requires_grad_(True)

        def edit(activation: torch.Tensor, at=at, again=again) -> torch.Tensor:
            activation = activation.clone()
            activation[at] = again
            return activation

        if site.component in ("resid_mid", "resid_pre") and shape != "gpt_neox":
            # read twice, by the norm and by the sum: only in place are both changed
            edit = lambda activation, at=at, again=again: put(activation, at, again)  # noqa: E731
        both.metric(lens.run(both.corrupt, [(lens.point(site.layer, site.component), edit)])[:, -1]).sum().backward()
        assert again.grad is not None, site
        torch.testing.assert_close(
            values.grad, again.grad, atol=1e-4, rtol=1e-4, msg=lambda m, site=site: f"{site}: {m}"
        )
    assert [weight.requires_grad for weight in lens.model.parameters()] == weighed
    assert all(weight.grad is None or not weight.grad.isnan().any() for weight in lens.model.parameters())
    lens.model.zero_grad()


def put(activation: torch.Tensor, at: tuple, values: torch.Tensor) -> torch.Tensor:
    activation[at] = values
    return activation


def test_values_that_do_not_fit_are_refused():
    lens, both = setting("llama")
    engine, rows = Engine(lens, both.corrupt, both.spans), torch.arange(2)
    values = torch.zeros(2, 1, lens.d_model)
    for site, wrong, says in (
        (Site(layer=0, component="resid_pre", position="question"), values, "1 tokens given, where a row has 4"),
        (Site(layer=0, component="resid_pre", position="cue"), values[:1], "1 values for 2 rows"),
        (Site(layer=0, component="z", position="cue"), values, "values are put at the residual stream"),
        (Site(layer=0, component="pattern", head=0, position="cue"), values, "values are put at the residual stream"),
        (Site(layer=5, component="resid_pre", position="cue"), values, "blocks.5"),
    ):
        with pytest.raises(InputError, match=says):
            engine.logits_with(site, wrong, rows)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "says"),
    [
        (Site(layer=2, component="z"), r"blocks\.2\.attn\.hook_z"),
        (Site(layer=0, component="z", head=4), r"L0\.z\.4: there is no head 4; heads are 0 to 3"),
        (Site(layer=0, component="k", head=2), r"no head 2; heads are 0 to 1"),
        (Site(layer=1, component="neurons", neuron=48), r"L1\.neurons\.48: there is no neuron 48; .* 0 to 47"),
        (Site(layer=0, component="z", position="hint"), "row 0 has no span 'hint'; it has cue, .*last"),
        (Site(layer=0, component="z", position=7), "row 0: position 7 is outside its 7 tokens"),
        (Site(layer=0, component="z", position=-1), "row 0: position -1 is outside"),
        (Site(layer=0, component="z", position="nothing"), "row 0: span 'nothing' is empty"),
        (Site(layer=0, component="q"), r"L0\.q: the source holds no q of layer 0"),
    ],
    ids=str,
)
def test_a_place_that_does_not_exist_is_refused_by_name(site: Site, says: str):
    lens, both = setting("qwen2")
    engine = Engine(lens, both.corrupt, [{**named, "nothing": ()} for named in both.spans])
    source, _ = lens.capture(both.clean, [(0, "z"), (0, "k"), (1, "neurons")])
    with pytest.raises(InputError, match=says):
        engine.sweep([site], source, both.metric)


def test_spans_are_refused_where_none_are_given():
    lens, both = setting("llama")
    source, _ = lens.capture(both.clean, [(0, "z")])
    with pytest.raises(InputError, match="has no span 'cue'; it has none"):
        Engine(lens, both.corrupt).sweep([Site(layer=0, component="z", position="cue")], source, both.metric)


def test_parallel_blocks_have_no_middle():
    lens, both = setting("gpt_neox")
    assert not lens.has("resid_mid")
    with pytest.raises(InputError, match="hook_resid_mid"):
        Engine(lens, both.corrupt).sweep([Site(layer=0, component="resid_mid")], {}, both.metric)


@every_shape
def test_blocks_that_do_something_else_when_called_alone_are_refused(shape: str, monkeypatch):
    lens, both = setting(shape)
    final = type(lens.bridge.ln_final)
    whole = lens.forward

    def first_the_model(*args, **kwargs):
        output = whole(*args, **kwargs)
        # from here on, the engine calls the parts
        monkeypatch.setattr(final, "forward", lambda self, *a, plain=final.forward, **k: 1.2 * plain(self, *a, **k))
        return output

    monkeypatch.setattr(lens, "forward", first_the_model)
    with pytest.raises(RunError, match="called alone, give other logits than the model"):
        Engine(lens, both.corrupt)


def test_blocks_with_arguments_unknown_to_the_engine_are_refused(monkeypatch):
    lens, both = setting("llama")
    whole = lens.forward
    monkeypatch.setattr(lens, "forward", lambda *a, **k: whole(*a, strange=torch.ones(1), **k))
    with pytest.raises(RunError, match="'strange', which cannot be cut"):
        Engine(lens, both.corrupt)
