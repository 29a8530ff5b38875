"""Every architecture, tiny and random: the lens is the model, the engine exact, edits arrive, edges sum; or why not.

The table in docs/scaling.md is made here: `python tests/hooks/test_architectures.py` writes it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mixturelens.hooks.batches import Sides
from mixturelens.hooks.columns import Columns
from mixturelens.hooks.engine import Engine
from mixturelens.hooks.lens import NAMES, Lens, Tokens, tokens
from mixturelens.hooks.metrics import log_odds
from mixturelens.hooks.weights import head_writes, lens_components, projection
from mixturelens.models import load_tokenizer
from mixturelens.patching.graph import edge_graph, written
from mixturelens.patching.sweep import all_sites, left_out
from mixturelens.types import PER_HEAD, Component, InputError, RunError, Site

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"
LLAMA = ROOT / "tests" / "pairs" / "llama" / "S"
EXACT = {"atol": 1e-4, "rtol": 1e-4}
BATCH = tokens([[3, 5, 11, 8, 10, 12, 13, 6], [6, 7, 7, 9, 12, 14, 2]])  # the second one is padded
SPANS: list[dict[str, tuple[int, ...]]] = [{"scattered": (1, 4)}, {"scattered": (0, 5)}]

# --- the zoo ----------------------------------------------------------------------------------------------------------

VOCABULARY = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
TINY = {
    **VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
OLD = {"initializer_range": 0.2, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}
FALCON = {"initializer_range": 0.2, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SLIDING = {"sliding_window": 4}  # shorter than the prompts
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING}

ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TINY),
    "Llama 3 (scaled rotations)": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**TINY, "rope_parameters": {**ROPE, "original_max_position_embeddings": 16}},
    ),
    "Mistral (sliding window)": ("MistralForCausalLM", "MistralConfig", {**TINY, **SLIDING}),
    "Qwen 2": ("Qwen2ForCausalLM", "Qwen2Config", TINY),
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", {**TINY, "head_dim": 16}),
    "SmolLM 3": ("SmolLM3ForCausalLM", "SmolLM3Config", TINY),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**TINY, "head_dim": 16, "num_key_value_heads": 1}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**TINY, **GEMMA}),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**TINY, **GEMMA, "num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "OLMo": ("OlmoForCausalLM", "OlmoConfig", TINY),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", TINY),
    "OLMo 3": (
        "Olmo3ForCausalLM",
        "Olmo3Config",
        {**TINY, **SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {**TINY, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "Phi": ("PhiForCausalLM", "PhiConfig", {**TINY, "num_key_value_heads": None, "partial_rotary_factor": 0.5}),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", TINY),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", TINY),
    "StarCoder 2": ("Starcoder2ForCausalLM", "Starcoder2Config", TINY),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {**VOCABULARY, **OLD}),
    "GPT-NeoX": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**{k: v for k, v in TINY.items() if k != "num_key_value_heads"}, "rotary_pct": 0.5},
    ),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {**VOCABULARY, **OLD, "rotary_dim": 4}),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **VOCABULARY, "initializer_range": 0.2, "max_position_embeddings": 64, "hidden_size": 32, "num_layers": 2,
            "num_heads": 4, "intermediate_size": 48, "window_size": 4, "attention_types": [[["global", "local"], 1]],
        },
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **VOCABULARY, "init_std": 0.2, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64,
        },
    ),
    "BLOOM": (
        "BloomForCausalLM",
        "BloomConfig",
        {**VOCABULARY, "initializer_range": 0.2, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "Falcon": ("FalconForCausalLM", "FalconConfig", {**VOCABULARY, **FALCON}),
    "Falcon (ALiBi)": (
        "FalconForCausalLM",
        "FalconConfig",
        {**VOCABULARY, **FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    ),
    "Cohere": ("CohereForCausalLM", "CohereConfig", TINY),
}  # fmt: skip
REFUSED = ("Falcon (ALiBi)", "Cohere")
SEEN = [name for name in ZOO if name not in REFUSED]
every_architecture = pytest.mark.parametrize("name", SEEN)


def plain(name: str) -> Any:
    """The model as transformers makes it, with norms and biases that are not all one and zero."""
    model, config, settings = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**settings, architectures=[model])).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return made


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer(LLAMA)


@functools.cache
def lens_on(name: str) -> Lens:
    return Lens(plain(name), tokenizer())


@functools.cache
def plain_model(name: str) -> Any:
    return plain(name)


def given(batch: Tokens) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.ids, "attention_mask": batch.real.long(), "position_ids": batch.position_ids}


def plain_logits(name: str, batch: Tokens = BATCH) -> torch.Tensor:
    asked = given(batch)
    if name in ("OPT", "BLOOM", "Falcon (ALiBi)"):  # which count positions by themselves
        del asked["position_ids"]
    with torch.no_grad():
        return plain_model(name)(**asked).logits


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    name: str
    engine: str
    circuit: str
    not_patched: str

    def __str__(self) -> str:
        return f"| {self.name} | {self.engine} | {self.circuit} | {self.not_patched} |"


@functools.cache
def row(name: str) -> Row:
    """What the package itself says of an architecture."""
    try:
        lens = lens_on(name)
    except InputError as error:
        why = re.sub(r".*spread \((.*)\); this version.*", r"\1", str(error))
        return Row(name, "refused", "refused", f"it is another model under transformer-lens: {why}")
    kind = type(lens.model).__name__
    said = [f"`{component}`: {why}" for component in NAMES if (why := lens.why_not(component))]
    try:
        Engine(lens, BATCH, SPANS)
        engine = "exact"
    except RunError as error:
        engine = f"full forwards: {error}"
    try:
        edge_graph(lens, contrast())
        circuit = "yes"
    except (InputError, RunError) as error:
        circuit = f"no: {error}"
    return Row(
        name, engine, circuit, "; ".join(said).replace(f"the bridge of {kind}", "the bridge").replace(f" of {kind}", "")
    )


def table() -> str:
    head = ["| architecture | patch engine | circuit | what cannot be patched |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(str(row(name)) for name in ZOO)])


START, END = "<!-- architectures: written by tests/hooks/test_architectures.py -->\n", "\n<!-- /architectures -->"


@pytest.mark.slow
def test_the_table_of_the_docs_is_the_one_that_is_made_here():
    written_down = PAGE.read_text().split(START)[1].split(END)[0]
    assert written_down == table(), "write it anew: python tests/hooks/test_architectures.py"


def test_there_are_enough_of_them():
    assert len(SEEN) >= 16
    assert all(row(name).engine == "exact" and row(name).circuit == "yes" for name in SEEN)
    dead = {name for name in SEEN if "`pattern`" in row(name).not_patched}
    assert dead == {"GPT-J", "GPT-Neo", "OPT"}  # their attention is Hugging Face's own
    assert all(row(name).engine == "refused" for name in REFUSED)


# --- the lens is the model, and edits are those of plain hooks --------------------------------------------------------


@every_architecture
def test_logits_are_those_of_the_plain_model(name: str):
    lens = lens_on(name)
    with torch.no_grad():
        found = lens.run(BATCH, last_only=False)
    expected = plain_logits(name)
    for number, real in enumerate(BATCH.real):
        torch.testing.assert_close(found[number, real], expected[number, real], **EXACT)


def module_of(name: str, weight: torch.Tensor) -> Any:
    """The plain model's module that owns a weight of the lens' model."""
    return plain_model(name).get_submodule(lens_on(name).parameter_names[id(weight)].rpartition(".")[0])


def plainly(name: str, module: Any, edit: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Logits of the plain model with the first input of a module changed in place."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            first = args[0].clone()
            edit(first.view(*BATCH.ids.shape, -1))  # OPT's MLP has rows and positions in one axis
            return (first, *args[1:]), kwargs
        first = kwargs["hidden_states"].clone()
        edit(first)
        return args, {**kwargs, "hidden_states": first}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return plain_logits(name)[:, -1]
    finally:
        handle.remove()


UNITS: tuple[tuple[Component, int | None, int | None], ...] = (
    ("z", 2, None), ("neurons", None, 3), ("neurons", None, None),
)  # fmt: skip
PLAINLY = [
    Site(layer=layer, component=component, head=head, neuron=neuron, position="scattered")
    for layer in (0, 1)
    for component, head, neuron in UNITS
] + [Site(layer=layer, component="resid_pre", position=at) for layer in (0, 1) for at in ("scattered", 6)]


@every_architecture
def test_the_engine_is_a_hook_set_by_hand_on_the_plain_model(name: str):
    lens = lens_on(name)
    source = other_source(lens)
    columns = Columns(BATCH, SPANS)
    blocks = next(m for m in plain_model(name).modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    found = Engine(lens, BATCH, SPANS).sweep(PLAINLY, source, whole_logits())
    for number, site in enumerate(PLAINLY):
        if site.component == "z":
            module = module_of(name, lens.bridge.blocks[site.layer].attn.o.original_component.weight)
            unit = slice(2 * lens.d_head, 3 * lens.d_head)
        elif site.component == "neurons":
            module = module_of(name, lens.bridge.blocks[site.layer].mlp.out.original_component.weight)
            unit = slice(None) if site.neuron is None else slice(3, 4)
        else:
            module, unit = blocks[site.layer], slice(None)
        mask, value = columns.mask(site.position), source[site.layer, site.component].flatten(2)

        def edit(x: torch.Tensor, mask: Any = mask, value: Any = value, unit: Any = unit) -> None:
            at = mask.nonzero(as_tuple=True)
            x[(*at, unit)] = value[(*at, unit)]

        expected = whole_logits()(plainly(name, module, edit), torch.arange(2))
        torch.testing.assert_close(found[number], expected, **EXACT, msg=lambda said, site=site: f"{site}: {said}")


def whole_logits() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One number that hears every logit."""
    weights = torch.linspace(-1.0, 1.0, 16)
    return lambda logits, _: logits @ weights


def other_source(lens: Lens) -> dict[tuple[int, Component], torch.Tensor]:
    other = tokens([[9, 14, 4, 3, 13, 5, 2, 12], [2, 13, 3, 4, 9, 5, 11]])
    every: list[tuple[int, Component]] = [(layer, c) for layer in (0, 1) for c in NAMES if lens.has(c)]
    return lens.capture(other, every)[0]


@every_architecture
def test_the_engine_is_full_forwards_and_every_site_moves_or_is_named(name: str):
    lens = lens_on(name)
    source, columns, metric = other_source(lens), Columns(BATCH, SPANS), whole_logits()
    with torch.no_grad():
        base = metric(lens.run(BATCH)[:, -1], torch.arange(2))
    sites = [
        Site(layer=layer, component=component, head=head, position=at)
        for layer in (0, 1)
        for component in NAMES
        for head in ((None, 0) if component in PER_HEAD else (None,))
        for at in ("scattered", None)
        if lens.why_not(component) is None
    ]
    expected = []
    for site in sites:
        mask = columns.mask(site.position)

        def edit(x: torch.Tensor, site: Site = site, mask: Any = mask) -> torch.Tensor:
            value = source[site.layer, site.component]
            for row, column in mask.nonzero().tolist():
                at = (row, column) if site.component != "pattern" else (row, slice(None), column)
                if site.head is not None:
                    at = (row, column, site.head) if site.component != "pattern" else (row, site.head, column)
                x[at] = value[at]
            return x

        with torch.no_grad():
            expected.append(metric(lens.run(BATCH, [(lens.point(site.layer, site.component), edit)])[:, -1], base))
    found = Engine(lens, BATCH, SPANS).sweep(sites, source, metric)
    torch.testing.assert_close(found, torch.stack(expected), **EXACT)
    moved = {site.component for site, one in zip(sites, found, strict=True) if float((one - base).abs().max()) > 1e-4}
    assert moved | {component for component in NAMES if lens.why_not(component)} == set(NAMES)
    for component in set(NAMES) - moved:
        with pytest.raises(InputError, match=r"cannot be patched|no hook point"):
            lens.check(Site(layer=0, component=component))
        assert component not in {site.component for site in all_sites(lens, (0,))}


@every_architecture
def test_groups_of_outputs_are_replaced_together(name: str):
    lens, metric = lens_on(name), whole_logits()
    source, mask = other_source(lens), Columns(BATCH, SPANS).mask("scattered")
    group = [Site(layer=at, component="z", head=at, position="scattered") for at in (0, 1)]

    def edit(x: torch.Tensor, layer: int) -> torch.Tensor:
        x[mask, layer] = source[layer, "z"][mask, layer]
        return x

    with torch.no_grad():
        edits = [(lens.point(at, "z"), functools.partial(edit, layer=at)) for at in (0, 1)]
        expected = metric(lens.run(BATCH, edits)[:, -1], torch.arange(2))
    found = Engine(lens, BATCH, SPANS).sweep_groups([group, group[1:]], source, metric)
    torch.testing.assert_close(found[0], expected, **EXACT)
    torch.testing.assert_close(found[1], Engine(lens, BATCH, SPANS).sweep(group[1:], source, metric)[0], **EXACT)


# --- circuits ---------------------------------------------------------------------------------------------------------


@functools.cache
def contrast() -> Sides:
    clean = tokens([[3, 5, 11, 8, 10, 12, 13, 6], [4, 6, 7, 7, 9, 12, 14, 2]])
    corrupt = tokens([[4, 5, 10, 8, 11, 12, 13, 6], [3, 6, 7, 9, 9, 12, 14, 2]])
    return Sides(clean, corrupt, log_odds([[7], [7]], [[8], [8]], 16), ({}, {}), (0, 0))


@every_architecture
def test_the_stream_is_the_sum_of_what_is_written(name: str):
    """Up to biases, which are nobody's, and the same in every prompt."""
    lens, on = lens_on(name), contrast()
    graph = edge_graph(lens, on)  # checks masked runs, too
    key = (lens.layers - 1, "resid_post")
    streams = [lens.capture(batch, [key])[0][key] for batch in (on.clean, on.corrupt)]
    terms = [written(graph, batch) for batch in (on.clean, on.corrupt)]
    assert terms[0].shape[2] == 1 + lens.layers * (lens.heads + 1)
    torch.testing.assert_close(terms[0].sum(2) - terms[1].sum(2), streams[0] - streams[1], **EXACT)


@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3", "OLMo 2", "Granite"])
def test_what_heads_write_sums_to_what_attention_adds(name: str):
    lens = lens_on(name)
    found = lens.capture(BATCH, [(1, "z"), (1, "attn_out")])[0]
    shares = head_writes(lens, 1, found[1, "z"])
    torch.testing.assert_close(shares.sum(2), found[1, "attn_out"], **EXACT)
    without = lens.bridge.blocks[1].attn.o.original_component.weight  # the same direction as what was written, per head
    plainly_written = torch.einsum("rphe,hed->rphd", found[1, "z"], without.detach().T.unflatten(0, (lens.heads, -1)))
    gain = shares[0, 3] / plainly_written[0, 3]
    torch.testing.assert_close(gain, gain[:1].expand_as(gain), atol=1e-3, rtol=1e-3)  # one for all heads of a token


# --- weights ----------------------------------------------------------------------------------------------------------


@every_architecture
def test_parameters_have_a_component_and_weight_edits_arrive(name: str):
    """An edit of one head's keys in the plain model, fused or not, is what the lens shows of it."""
    lens, model = lens_on(name), plain_model(name)
    components = lens_components(lens)
    assert sorted(n for names in components.values() for n in names) == sorted(n for n, _ in model.named_parameters())
    for which in ("q", "k", "v"):
        where, index, weights = projection(lens, 1, which)
        parameter = model.get_parameter(where)
        assert where in components["L1.attn"]
        torch.testing.assert_close(parameter.detach().reshape(-1)[index], weights)
        kept, new = (
            parameter.detach().clone(),
            torch.randn(weights[0].shape, generator=torch.Generator().manual_seed(3)),
        )
        with torch.no_grad():
            parameter.view(-1)[index[0].flatten()] = new.flatten()
            expected = plain_logits(name)[:, -1]
            parameter.copy_(kept)
        bias = getattr(getattr(lens.bridge.blocks[1].attn, which).original_component, "bias", None)
        inputs: list[torch.Tensor] = []

        def edit(x: torch.Tensor, new: Any = new, bias: Any = bias, inputs: Any = inputs) -> torch.Tensor:
            x[:, :, 0] = inputs[0] @ new.T + (0 if bias is None else bias.detach()[: len(new)])
            return x

        read = (lens.named_point(f"blocks.1.attn.{which}.hook_in"), inputs.append)
        with torch.no_grad():
            found = lens.run(BATCH, [read, (lens.point(1, which), edit)])[:, -1]
        torch.testing.assert_close(found, expected, **EXACT)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"), [("Falcon (ALiBi)", "adds ALiBi to a mask"), ("Cohere", "positions or attention")]
)
def test_a_model_that_is_another_one_under_the_bridge_is_refused(name: str, why: str):
    with pytest.raises(InputError, match=rf"is another model: its logits are off by .*{why}") as error:
        lens_on(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("component", ["q", "pattern", "mlp_out", "resid_mid", "neurons"])
def test_a_hook_that_ignores_its_edit_is_found(component: Component, monkeypatch: pytest.MonkeyPatch):
    lens = Lens(plain("Llama"), tokenizer())
    for layer in range(lens.layers):
        point = lens.point(layer, component)
        monkeypatch.setattr(type(point), "__call__", _deaf(type(point).__call__, point))
    assert lens.why_not("z" if component != "z" else "v") is None
    with pytest.raises(InputError, match=rf"L1\.{component} cannot be patched: .* does not reach the logits"):
        lens.check(Site(layer=1, component=component))
    expected = component in ("q", "pattern", "mlp_out")  # what sweeps would have asked for
    assert any(line.startswith(f"{component}: ") for line in left_out(lens)) == expected
    assert component not in {site.component for site in all_sites(lens, (0, 1))}


def _deaf(plain_call: Callable[..., Any], deaf: Any) -> Callable[..., Any]:
    """A hook point that shows a copy, and goes on with what there was."""

    def call(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self is deaf:
            plain_call(self, x.clone(), *args, **kwargs)
            return x
        return plain_call(self, x, *args, **kwargs)

    return call


def test_a_hook_that_shows_something_else_is_named():
    config = transformers.MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)
    config.architectures = ["MixtralForCausalLM"]
    lens = Lens(transformers.MixtralForCausalLM(config).eval(), tokenizer())
    with pytest.raises(InputError, match=r"L0\.neurons\.3 cannot be patched: .* shows something else there"):
        lens.check(Site(layer=0, component="neurons", neuron=3))


@pytest.mark.parametrize("name", ["Llama", "OLMo 2", "Gemma 3", "GPT-NeoX"])
def test_half_precision_is_the_model_up_to_rounding(name: str):
    lens = Lens(plain(name).to(torch.bfloat16), tokenizer())
    said = [component for component in NAMES if lens.why_not(component)]
    assert said == [component for component in NAMES if lens_on(name).why_not(component)]


if __name__ == "__main__":
    around = re.split(f"{re.escape(START)}.*?{re.escape(END)}", PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(f"{START}{table()}{END}".join(around))
