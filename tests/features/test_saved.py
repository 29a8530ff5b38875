"""SAEs in SAELens' format: every architecture and normalisation as SAELens computes it, and what cannot be read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scenes import pair
from torch import Tensor

from mixturelens.features.clamps import clamps_of
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effects import make_scene, unit_effects
from mixturelens.features.saved import CONFIG, SCALER, WEIGHTS, load_sae, read_sae
from mixturelens.hooks.edits import Rewrite
from mixturelens.hooks.intervened import Intervened
from mixturelens.types import InputError, Intervention, Site

D, WIDTH, K = 24, 60, 7
NORMS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
]


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / D**0.5 for name, shape in shapes.items()}


def rows(number: int = 200) -> Tensor:
    return 3 * torch.randn(number, D, generator=torch.Generator().manual_seed(1)) + 0.5


@torch.no_grad()
def fill(sae: Any) -> Any:
    """Weights of every kind, so that no bias, threshold, gate or norm is where it would not matter."""
    state = sae.state_dict()
    for name, value in drawn({name: tuple(value.shape) for name, value in sae.named_parameters()}).items():
        state[name] = value.abs() if name == "threshold" else value
    if "topk_threshold" in state:
        state["topk_threshold"] = torch.tensor(0.4, dtype=torch.double)
    sae.load_state_dict(state)
    return sae


def test_every_architecture_and_normalisation_is_read_as_saelens_computes_it(tmp_path: Path):
    import sae_lens
    from sae_lens import SAE

    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "standard": ("StandardSAE", {}),
        "jumprelu": ("JumpReLUSAE", {}),
        "gated": ("GatedSAE", {}),
        "topk": ("TopKSAE", {"k": K}),
        "topk by norm": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "trained batchtopk": ("BatchTopKTrainingSAE", {"k": K}),
        "trained topk": ("TopKTrainingSAE", {"k": K, "rescale_acts_by_decoder_norm": False}),
    }
    x = rows()
    for (name, (kind, options)), norm, applied in itertools.product(kinds.items(), NORMS, (True, False)):
        what = f"{name}, {norm}, {applied}"
        config = getattr(sae_lens, f"{kind}Config")(
            d_in=D, d_sae=WIDTH, normalize_activations=norm, apply_b_dec_to_input=applied, **options
        )
        made = fill(getattr(sae_lens, kind)(config))
        folder = tmp_path / what.replace(" ", "-")
        (made.save_inference_model if name.startswith("trained") else made.save_model)(folder)
        theirs: Any = SAE.load_from_disk(folder)
        ours = load_sae(folder)
        assert len(ours) == WIDTH
        with torch.no_grad():
            expected = theirs.encode(x)
            assert 0 < float((expected != 0).float().mean()) < 1, what
            found = ours.encode(x)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=what)
            torch.testing.assert_close(ours.decode(found, x), theirs.decode(expected), atol=1e-5, rtol=1e-5, msg=what)
            some = torch.tensor([WIDTH - 1, 3, 3])
            torch.testing.assert_close(ours.part(some).encode(x), expected[:, some], atol=1e-5, rtol=1e-5, msg=what)
        if name == "trained batchtopk":  # as a trainer keeps it, before it becomes a JumpReLU SAE
            made.save_model(tmp_path / "plain")
            torch.testing.assert_close(load_sae(tmp_path / "plain").encode(x), expected, atol=1e-5, rtol=1e-5)


def test_a_factor_that_lies_beside_a_checkpoint_is_folded_as_saelens_folds_it(tmp_path: Path):
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, StandardSAE, StandardSAEConfig

    x, factor = rows(), 0.3
    options: dict[str, Any] = {"d_in": D, "d_sae": WIDTH, "normalize_activations": "expected_average_only_in"}
    for name, sae in (
        ("standard", fill(StandardSAE(StandardSAEConfig(**options)))),
        ("batchtopk", fill(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=K, **options)))),
    ):
        sae.save_model(tmp_path / name)
        assert "no factor lies beside it" in read_sae(tmp_path / name).notes[0]
        (tmp_path / name / SCALER).write_text(json.dumps({"scaling_factor": factor, "has_whitening": False}))
        found = read_sae(tmp_path / name)
        assert not found.notes
        sae.fold_activation_norm_scaling_factor(factor)
        folded = tmp_path / f"{name}-folded"
        (sae.save_inference_model if name == "batchtopk" else sae.save_model)(folded)
        theirs: Any = SAE.load_from_disk(folded)
        with torch.no_grad():
            expected = theirs.encode(x)
            torch.testing.assert_close(found.dictionary.encode(x), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.dictionary.decode(expected), theirs.decode(expected), atol=1e-5, rtol=1e-5)


def test_heads_outputs_are_read_side_by_side(tmp_path: Path):
    from sae_lens import SAE, StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    at = SAEMetadata(hook_name="blocks.1.attn.hook_z", model_name="m")
    fill(StandardSAE(StandardSAEConfig(d_in=D, d_sae=WIDTH, reshape_activations="hook_z", metadata=at))).save_model(
        tmp_path
    )
    theirs: Any = SAE.load_from_disk(tmp_path)
    saved = read_sae(tmp_path)
    x = rows().view(-1, 4, D // 4)
    with torch.no_grad():
        f = theirs.encode(x)
        torch.testing.assert_close(saved.dictionary.encode(x.flatten(1)), f, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(saved.dictionary.decode(f), theirs.decode(f).flatten(1), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="SAEs of heads' outputs can be read"):
        _ = saved.at


# --- by hand, without sae_lens ----------------------------------------------------------------------------------------


def written(folder: Path, config: dict[str, Any] | None = None, without: str = "", **weights: Tensor) -> Path:
    """A standard SAE, and whatever else is said of it."""
    folder.mkdir()
    shapes = {"W_enc": (D, WIDTH), "b_enc": (WIDTH,), "W_dec": (WIDTH, D), "b_dec": (D,)}
    given = {**drawn(shapes), **weights}
    given.pop(without, None)
    save_file(given, folder / WEIGHTS)
    metadata = {"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2-small"}
    base = {"architecture": "standard", "d_in": D, "d_sae": WIDTH, "metadata": metadata}
    (folder / CONFIG).write_text(json.dumps({**base, **(config or {})}))
    return folder


@pytest.mark.parametrize(
    ("config", "at"),
    [
        ({}, (1, "resid_post")),
        ({"metadata": {}, "hook_name": "blocks.12.hook_resid_pre"}, (12, "resid_pre")),
        ({"metadata": {}, "hook_point": "blocks.0.hook_mlp_out"}, (0, "mlp_out")),
        ({"metadata": {"hook_name": "blocks.3.hook_out"}}, (3, "resid_post")),
        ({"metadata": {"hook_name": "blocks.3.attn.hook_out"}}, (3, "attn_out")),
        ({"metadata": {"hook_name": "blocks.3.mlp.hook_post"}}, (3, "neurons")),
    ],
)
def test_where_it_is_at_home(tmp_path: Path, config: dict[str, Any], at: tuple[int, str]):
    assert read_sae(written(tmp_path / "sae", config)).at == at


def test_a_config_of_old_says_topk_by_its_activation_function(tmp_path: Path):
    old = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "metadata": None}
    found = load_sae(written(tmp_path / "sae", old))
    assert bool(((found.encode(rows()) > 0).sum(1) == 3).all())


def test_what_cannot_be_read_is_one_line_with_its_file(tmp_path: Path):
    nan = torch.full((D,), torch.nan)
    for number, (config, weights, says) in enumerate(
        [
            ({"architecture": "transcoder"}, {}, r"cfg\.json: architecture is 'transcoder'; standard, topk"),
            ({"architecture": "matryoshka_batchtopk"}, {}, "architecture is 'matryoshka_batchtopk'"),
            ({"architecture": "crosscoder"}, {}, "architecture is 'crosscoder'"),
            ({"architecture": "gated"}, {}, r"sae_weights\.safetensors: b_gate is absent"),
            ({"architecture": "jumprelu"}, {}, "threshold is absent"),
            ({"architecture": "topk"}, {}, "k is None, where the number of features that fire is needed, up to 60"),
            ({"normalize_activations": "covariance_whitening"}, {}, "normalize_activations is 'covariance_whitening'"),
            ({"reshape_activations": "all"}, {}, "reshape_activations is 'all'"),
            ({"hook_point_head_index": 3}, {}, "single head"),
            ({"d_in": D + 1}, {}, r"W_enc is \[24, 60\], where cfg\.json says \[25, 60\]"),
            ({"d_sae": None}, {}, "d_in and d_sae are 24 and None"),
            ({}, {"b_dec": nan}, "b_dec holds numbers that are not finite"),
            ({}, {"scaling_factor": torch.full((WIDTH,), 2.0)}, "scaling_factor of finetuning"),
        ]
    ):
        with pytest.raises(InputError, match=says):
            load_sae(written(tmp_path / str(number), config, **weights))
    with pytest.raises(InputError, match=r"sae_weights\.safetensors: W_dec is absent"):
        load_sae(written(tmp_path / "without", without="W_dec"))
    load_sae(written(tmp_path / "ones", scaling_factor=torch.ones(WIDTH)))
    nowhere = read_sae(written(tmp_path / "nowhere", {"metadata": {}}))
    with pytest.raises(InputError, match="names no hook"):
        _ = nowhere.at
    other = read_sae(written(tmp_path / "other", {"metadata": {"hook_name": "blocks.1.ln2.hook_normalized"}}))
    with pytest.raises(InputError, match=r"a residual stream, an output or the neurons of a block are needed"):
        _ = other.at
    for name, content, says in ((WEIGHTS, b"nonsense", "not a safetensors file"), (CONFIG, b"{", "not JSON")):
        (tmp_path / "other" / name).write_bytes(content)
        with pytest.raises(InputError, match=says):
            load_sae(tmp_path / "other")
    (tmp_path / "other" / CONFIG).unlink()
    with pytest.raises(InputError, match=r"cfg\.json: no such file; an SAE is a folder with"):
        load_sae(tmp_path / "other")


# --- clamps -----------------------------------------------------------------------------------------------------------


def competing(d: int, kind: str) -> Dictionary:
    """Features that compete, or read behind a norm, or plainly: random ones of a site of d numbers."""
    generator = torch.Generator().manual_seed(0)
    read, write = (torch.randn(12, d, generator=generator) / d**0.5 for _ in range(2))
    options = {"topk": {"top": 3}, "layer": {"norm": "layer"}, "length": {"norm": "length"}, "plain": {}}[kind]
    return Dictionary(read, 0.1 * torch.ones(12), torch.zeros(12), write, torch.zeros(d), **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "topk", "layer", "length"])
def test_a_clamp_is_a_forward_hook_by_hand(kind: str):
    """x + scale(x) (amount - f(x)) w at the tokens behind the prompt, f as the whole dictionary says."""
    ground, _ = pair()
    lens, contrasts = ground.lens, ground.contrasts.first(5)
    site = Site(layer=1, component="resid_pre", position="policy")
    scene = make_scene(lens, contrasts, site)
    dictionary = competing(lens.d_model, kind)
    to = torch.linspace(0.5, 2, 12)
    fires = (dictionary.encode(scene.corrupt.values) != 0).any(1).any(0)
    which = [int(fires.nonzero()[0]), int((~fires).nonzero()[0]) if not fires.all() else 11]
    do = clamps_of(dictionary, which, site, contrasts, to)
    assert all(isinstance(each, Intervention if kind == "plain" else Rewrite) for each in do)

    def by_hand(module: Any, given: Any, output: Any = None) -> Any:
        hidden = given[0] if isinstance(given, tuple) else given
        x = hidden[:, -1].clone()
        f = dictionary.encode(x)[:, which]
        scale = {"layer": x.std(1, keepdim=True), "length": x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5}.get(
            kind, 1
        )
        changed = hidden.clone()
        changed[:, -1] = x + scale * ((to[which] - f) @ dictionary.write[which])
        return (changed, *given[1:])

    ids = scene.corrupt.engine.base.ids
    handle = lens.model.get_submodule("model.layers.1").register_forward_pre_hook(by_hand)
    try:
        expected = scene.corrupt.metric(lens.model(ids, use_cache=False).logits[:, -1])
    finally:
        handle.remove()
    found = scene.corrupt.metric(Intervened(lens, do, ground.known)(ids).logits[:, -1])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert float((found - scene.corrupt.own).abs().max()) > 1e-3
    alone = [clamps_of(dictionary, [each], site, contrasts, to) for each in which]
    for number, each in enumerate(alone):
        effect = unit_effects(scene, dictionary, "clamp", to)[which[number]]
        moved = scene.corrupt.metric(Intervened(lens, each, ground.known)(ids).logits[:, -1]) - scene.corrupt.own
        torch.testing.assert_close(moved.double(), torch.from_numpy(effect), atol=2e-5, rtol=1e-4)


def test_all_weights_are_read_in_single_precision(tmp_path: Path):
    folder = written(tmp_path / "sae")
    half = {name: value.bfloat16() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(half, folder / WEIGHTS)
    assert load_sae(folder).read.dtype == torch.float32
