"""The bridge shows what the plain model computes, and every hook fires or is refused by name."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from mixturelens.hooks.lens import NAMES, Lens, load_lens, tokens
from mixturelens.hooks.weights import lens_components, neuron_weights, output_weights
from mixturelens.models import load_model, load_tokenizer
from mixturelens.types import InputError, RunError, Site

PAIRS = Path(__file__).parents[1] / "pairs"
every_shape = pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2"])
EXACT = {"atol": 1e-5, "rtol": 0.0}
ROWS = [[3, 5, 11, 8, 10, 12, 13], [4, 6, 7, 7, 9, 12, 14], [3, 6, 9, 9, 8, 12, 13]]
SHORTER = [[3, 5, 11, 8, 10, 12, 13], [4, 6, 7], [9, 12]]


@functools.cache
def lens_of(shape: str) -> Lens:
    return load_lens(PAIRS / shape / "S")


@functools.cache
def plain_model(shape: str):
    """Without the bridge, which moves into the model that it is given."""
    return load_model(PAIRS / shape / "S")


def hooks_left(lens: Lens) -> list[str]:
    return [name for name, point in lens.bridge.hook_dict.items() if point.fwd_hooks or point._forward_hooks]


@every_shape
def test_logits_are_those_of_the_plain_model(shape: str):
    lens = lens_of(shape)
    batch = tokens(ROWS)
    with torch.no_grad():
        expected = plain_model(shape)(input_ids=batch.ids).logits
        torch.testing.assert_close(lens.run(batch, last_only=False), expected, **EXACT)
        torch.testing.assert_close(lens.run(batch), expected[:, -1:], **EXACT)


@every_shape
def test_padded_is_unpadded(shape: str):
    lens = lens_of(shape)
    batch = tokens(SHORTER)
    assert batch.padded
    assert not batch.part(slice(0, 1)).padded
    components = [(layer, component) for layer in range(2) for component in NAMES if lens.has(component)]
    found, logits = lens.capture(batch, components)
    for row, ids in enumerate(SHORTER):
        alone, expected = lens.capture(tokens([ids]), components)
        torch.testing.assert_close(logits[row : row + 1], expected, **EXACT)
        skip = 7 - len(ids)
        for (layer, component), value in alone.items():
            here = found[layer, component][row]
            here = here[:, skip:, skip:] if component == "pattern" else here[skip:]
            torch.testing.assert_close(here, value[0], **EXACT)
        with torch.no_grad():
            torch.testing.assert_close(
                logits[row], plain_model(shape)(input_ids=torch.tensor([ids])).logits[0, -1], **EXACT
            )


def test_tokens_are_padded_to_a_width():
    batch = tokens([[5, 6], [8]], width=4)
    assert batch.ids.tolist() == [[0, 0, 5, 6], [0, 0, 0, 8]]
    assert batch.position_ids.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert len(batch.part(torch.tensor([1, 1, 0]))) == 3


@every_shape
def test_components_are_what_they_are_called(shape: str):
    """Against hooks on the plain model's own modules, and sums that must hold."""
    lens, model = lens_of(shape), plain_model(shape)
    layers = model.transformer.h if shape == "gpt2" else model.gpt_neox.layers if shape == "gpt_neox" else None
    layers = model.model.layers if layers is None else layers
    attention, project, down = {
        "gpt2": ("attn", "c_proj", "c_proj"),
        "gpt_neox": ("attention", "dense", "dense_4h_to_h"),
    }.get(shape, ("self_attn", "o_proj", "down_proj"))
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for layer, block in enumerate(layers):
        watched = [
            (block, "resid_pre", 0), (getattr(block, attention), "attn_out", 1), (block.mlp, "mlp_out", 1),
            (getattr(getattr(block, attention), project), "z", 0), (getattr(block.mlp, down), "neurons", 0),
            (block, "resid_post", 1),
        ]  # fmt: skip
        for module, name, side in watched:

            def store(_, args, kwargs, output, key=(layer, name), side=side):
                value = (output if side else args[0]) if side or args else kwargs["hidden_states"]
                seen[key] = value[0] if isinstance(value, tuple) else value

            handles.append(module.register_forward_hook(store, with_kwargs=True))
    batch = tokens(ROWS)
    with torch.no_grad():
        model(input_ids=batch.ids)
    for handle in handles:
        handle.remove()
    found, _ = lens.capture(
        batch, [(layer, component) for layer in range(2) for component in NAMES if lens.has(component)]
    )
    assert len(seen) == 12
    for (layer, component), value in seen.items():
        torch.testing.assert_close(found[layer, component].reshape(value.shape), value, **EXACT)
    for layer in range(2):
        here = {component: value for (at, component), value in found.items() if at == layer}
        torch.testing.assert_close(here["pattern"].sum(-1), torch.ones(3, 4, 7), **EXACT)
        assert (here["pattern"].triu(1) == 0).all()
        values = here["v"].repeat_interleave(4 // lens.kv_heads, 2)
        torch.testing.assert_close(torch.einsum("rhqk,rkhd->rqhd", here["pattern"], values), here["z"], **EXACT)
        middle = here["resid_pre"] + here["attn_out"]
        if lens.has("resid_mid"):
            torch.testing.assert_close(here["resid_mid"], middle, **EXACT)
        torch.testing.assert_close(middle + here["mlp_out"], here["resid_post"], **EXACT)
        written = torch.einsum("rphd,hdm->rpm", here["z"], output_weights(lens, layer))
        torch.testing.assert_close(
            written - written[:1, :1], here["attn_out"] - here["attn_out"][:1, :1], **EXACT
        )  # up to a bias


@every_shape
def test_what_neurons_write_is_the_output_of_the_mlp(shape: str):
    lens, model = lens_of(shape), plain_model(shape)
    names = {"gpt2": "transformer.h.{}.mlp.c_proj", "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h"}
    modules = dict(model.named_modules())
    found, _ = lens.capture(tokens(ROWS), [(layer, name) for layer in range(2) for name in ("neurons", "mlp_out")])
    for layer in range(2):
        module = modules[names.get(shape, "model.layers.{}.mlp.down_proj").format(layer)]
        weights = neuron_weights(lens, layer)
        assert weights.shape == (lens.d_mlp, lens.d_model)
        assert not weights.requires_grad
        bias = 0 if module.bias is None else module.bias.detach()
        written = torch.einsum("rpn,nm->rpm", found[layer, "neurons"], weights) + bias
        torch.testing.assert_close(written, found[layer, "mlp_out"], **EXACT)
        # a view: what is written into it is in the model
        assert weights.untyped_storage().data_ptr() in {p.untyped_storage().data_ptr() for p in lens.model.parameters()}


@every_shape
def test_an_edit_changes_the_run_as_a_hook_on_the_plain_model_does(shape: str):
    lens, model = lens_of(shape), plain_model(shape)
    module = dict(model.named_modules())[
        {"gpt2": "transformer.h.0.attn.c_proj", "gpt_neox": "gpt_neox.layers.0.attention.dense"}.get(
            shape, "model.layers.0.self_attn.o_proj"
        )
    ]

    def without_a_head(_, args):
        z = args[0].clone()
        z[:, 3:5, 8:16] = 0
        return (z,)

    def edit(z: torch.Tensor) -> torch.Tensor:
        z[:, 3:5, 1] = 0
        return z

    batch = tokens(ROWS)
    handle = module.register_forward_pre_hook(without_a_head)
    with torch.no_grad():
        expected = model(input_ids=batch.ids).logits[:, -1]
        handle.remove()
        torch.testing.assert_close(lens.run(batch, [(lens.point(0, "z"), edit)])[:, -1], expected, **EXACT)
        assert (model(input_ids=batch.ids).logits[:, -1] - expected).abs().max() > 0.01


@every_shape
def test_what_is_captured_can_meet_autograd(shape: str):
    lens = lens_of(shape)
    found, logits = lens.capture(tokens(ROWS), [(0, "resid_post"), (0, "resid_post"), (1, "z")])
    assert set(found) == {(0, "resid_post"), (1, "z")}
    assert logits.shape == (3, 16)
    delta = torch.zeros_like(found[0, "resid_post"]).requires_grad_()

    def edit(activation: torch.Tensor) -> torch.Tensor:
        return found[0, "resid_post"] + delta

    lens.run(tokens(ROWS), [(lens.point(0, "resid_post"), edit)]).sum().backward()
    assert delta.grad is not None
    assert delta.grad.isfinite().all()
    assert delta.grad.abs().sum() > 0


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_a_hook_that_never_fires_is_named():
    lens = lens_of("llama")
    with (
        pytest.raises(RunError, match=r"'blocks\.1\..*' did not fire"),
        lens.hooked([(lens.point(1, "mlp_out"), lambda _: None)]),
    ):
        lens.bridge.blocks[0](hidden_states=torch.zeros(1, 2, 32), **_position(lens))
    assert not hooks_left(lens)


def _position(lens: Lens) -> dict:
    zeros = torch.zeros(1, 2, lens.d_head)
    return {"position_embeddings": (zeros + 1, zeros), "attention_mask": None}


def test_hooks_are_removed_after_an_exception():
    lens = lens_of("llama")
    point = lens.point(0, "z")
    expected = lens.capture(tokens(ROWS), [])[1]

    def fails(_: torch.Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lens.run(tokens(ROWS), [(point, lambda z: z * 0), (lens.point(1, "q"), fails)])
    assert not hooks_left(lens)
    assert torch.equal(lens.capture(tokens(ROWS), [])[1], expected)


def test_hooks_of_others_stay():
    lens = lens_of("gpt2")
    point, seen = lens.point(0, "z"), []
    with lens.hooked([(point, lambda _: seen.append("outer"))]):
        lens.capture(tokens(ROWS), [(0, "z")])
        with pytest.raises(InputError), lens.hooked([(point, lambda _: None)]):
            raise InputError
        lens.capture(tokens(ROWS), [])
    assert seen == ["outer", "outer"]
    assert not hooks_left(lens)


def test_edits_of_one_point_follow_one_another():
    lens = lens_of("llama")
    point = lens.point(0, "resid_post")
    with torch.no_grad():
        once = lens.run(tokens(ROWS), [(point, lambda x: x * 3.0)])
        twice = lens.run(tokens(ROWS), [(point, lambda x: x * 2.0), (point, lambda x: x * 1.5)])
    torch.testing.assert_close(twice, once, **EXACT)


@pytest.mark.parametrize("gone", ["blocks.0.attn.hook_z", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_pattern"])
def test_a_hook_point_that_the_bridge_lost_is_named(gone: str, monkeypatch):
    """As after an update of transformer-lens: an error, never a zero."""
    lens = load_lens(PAIRS / "llama" / "S")
    bridge = type(lens.bridge)
    complete = bridge.hook_dict.fget
    monkeypatch.setattr(
        bridge, "hook_dict", property(lambda self: {n: p for n, p in complete(self).items() if n != gone})
    )
    layer, component = int(gone[7]), next(c for c, name in NAMES.items() if gone.endswith(name))
    if layer == 0:
        assert not lens.has(component)
    for ask in (
        lambda: lens.point(layer, component),
        lambda: lens.check(Site(layer=layer, component=component)),
        lambda: lens.capture(tokens(ROWS), [(layer, component)]),
    ):
        with pytest.raises(InputError, match=gone.replace(".", r"\.")):
            ask()


@pytest.mark.parametrize(
    ("site", "says"),
    [
        (Site(layer=5, component="mlp_out"), r"'blocks\.5\.hook_mlp_out' \(2 layers\)"),
        (Site(layer=0, component="pattern", head=4), r"L0\.pattern\.4: there is no head 4; heads are 0 to 3"),
        (Site(layer=0, component="v", head=2), r"L0\.v\.2: there is no head 2; heads are 0 to 1"),
        (Site(layer=0, component="neurons", neuron=99), r"there is no neuron 99; neurons are 0 to 47"),
    ],
    ids=str,
)
def test_a_site_that_does_not_exist_is_named(site: Site, says: str):
    with pytest.raises(InputError, match=says):
        lens_of("qwen2").check(site)


def test_heads_by_component():
    lens = lens_of("qwen2")
    assert [lens.heads_of(c) for c in ("q", "z", "pattern", "k", "v", "mlp_out")] == [4, 4, 4, 2, 2, 1]
    assert (lens.layers, lens.d_model, lens.d_head, lens.d_mlp) == (2, 32, 8, 48)


def test_a_model_without_a_bridge_is_refused(monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    def unknown(*_, **__):
        raise ValueError("Unsupported architecture: Strange\nand a long list")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", unknown)
    with pytest.raises(InputError, match=r"no bridge for this model \(Unsupported architecture: Strange\)"):
        load_lens(PAIRS / "llama" / "S")


@every_shape
def test_components_are_all_parameters_once(shape: str):
    lens, model = lens_of(shape), plain_model(shape)
    found = lens_components(lens)
    names = [name for members in found.values() for name in members]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    blocks = [f"L{layer}.{part}" for layer in range(2) for part in ("attn", "mlp", "norms")]
    first = ["embed", "pos_embed"] if shape == "gpt2" else ["embed"]
    assert list(found) == [*first, *blocks, "final_norm", "unembed"]
    for component, members in found.items():
        if component.startswith("L"):
            layer, part = component[1:].split(".")
            assert all(f".{layer}." in name for name in members)
            told = {"attn": "att", "mlp": "mlp", "norms": "norm" if shape != "gpt2" else "ln_"}[part]
            assert all(told in name for name in members)
    assert len(found["unembed"]) == len(found["embed"]) == 1


def test_a_tied_embedding_is_one_component():
    found = lens_components(load_lens(PAIRS / "chat" / "S"))
    assert "unembed" not in found
    assert found["embed"] == ("model.embed_tokens.weight",)


def test_a_parameter_that_the_bridge_does_not_know_is_other():
    model = load_model(PAIRS / "llama" / "S")
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    lens = Lens(model, load_tokenizer(PAIRS / "llama" / "S"))
    assert lens_components(lens)["other"] == ("extra",)
