"""What several tests of units look at: the planted organism, and a stored pair with the ground that repairs have."""

from __future__ import annotations

import functools
from pathlib import Path

import planted
import torch

from mixturelens.behaviour.harmed import Harm
from mixturelens.behaviour.repair_questions import Ground, Scale, make_ground, scale_of
from mixturelens.contrasts import Contrasts, cue_contrasts
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effects import make_scene
from mixturelens.features.vectors import directions
from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.models import load_model
from mixturelens.suite import load_suite
from mixturelens.types import Interval, Site

PAIRS = Path(__file__).parents[1] / "pairs"
REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"
POLICY = Site(layer=1, component="resid_pre", position="policy")


@functools.cache
def organism() -> tuple[Lens, Contrasts]:
    lens = Lens(planted.make_model(), planted.make_tokenizer())
    return lens, cue_contrasts(planted.make_suite(80), lens.tokenizer, "a", ("A", "B"), "refuse")


@functools.cache
def pair() -> tuple[Ground, Scale]:
    folder = PAIRS / "llama"
    suite = load_suite(folder)
    change = Interval(value=-0.5, low=-0.6, high=-0.4)
    harm = Harm(trained_cue="A", harmed_cue="B", change=change, policy="a", shows="refuse", other="b")
    ground = make_ground(load_lens(folder / "R-routing"), suite, harm, seed=0)
    return ground, scale_of(ground, load_model(folder / "S"))


def linear(vectors: torch.Tensor) -> Dictionary:
    """Units that read what they write, from 0."""
    number = len(vectors)
    return Dictionary(vectors, torch.zeros(number), torch.full((number,), -torch.inf), vectors)


def some_features(contrasts: Contrasts, lens: Lens, site: Site = POLICY) -> Dictionary:
    """One feature along the difference of means that fires on the clean side alone, and random ones."""
    scene = make_scene(lens, contrasts, site)
    along = directions(scene)[0].part(torch.tensor([0]))
    x = torch.cat([scene.clean.values, scene.corrupt.values]).flatten(0, 1)
    middle = float((x @ along.read[0]).mean())
    others = torch.randn(9, x.shape[1], generator=torch.Generator().manual_seed(0)) / x.shape[1] ** 0.5
    offset = torch.tensor([0.0] * 9 + [middle])
    return Dictionary(
        torch.cat([others, along.read]), offset, torch.tensor([0.1] * 9 + [0.0]), torch.cat([others, 2 * along.write])
    )
