"""Sites and interventions are values: printed as documented, read back, and refused where they mean nothing."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mixturelens.types import PER_HEAD, Frozen, Intervention, Site

SITES = {
    "L0.z.3@policy": Site(layer=0, component="z", head=3, position="policy"),
    "L2.resid_pre": Site(layer=2, component="resid_pre"),
    "L1.mlp_out@5": Site(layer=1, component="mlp_out", position=5),
    "L1.neurons.17@cue": Site(layer=1, component="neurons", neuron=17, position="cue"),
    "L0.pattern.0@0": Site(layer=0, component="pattern", head=0, position=0),
    "L3.k@last": Site(layer=3, component="k", position="last"),
}
HEAD = SITES["L0.z.3@policy"]
INTERVENTIONS = {
    "L0.z.3@policy <- a fixed vector": Intervention(site=HEAD, do="set", vector=(0.1, -2.5e-7)),
    "L0.z.3@policy <- + 0.5 x a vector": Intervention(site=HEAD, do="add", vector=(1.0, 2.0), amount=0.5),
    "L0.z.3@policy <- zero": Intervention(site=HEAD, do="scale", amount=0),
    "L0.z.3@policy <- x 2": Intervention(site=HEAD, do="scale", amount=2.0),
    "L0.z.3@policy <- without a direction": Intervention(site=HEAD, do="project", vector=(0.0, 1.0)),
    "L0.z.3@policy <- without a concept": Intervention(
        site=HEAD, do="erase", vector=(0.5, 0.0), read=(2.0, 1.0), offset=-0.25
    ),
    "L1.mlp_out@5 <- a unit at -0.333": Intervention(
        site=SITES["L1.mlp_out@5"], do="clamp", vector=(0.5, 0.0), read=(0.0, 1.0), offset=0.1, amount=-1 / 3
    ),
    "L0.z.3@policy <- a unit at 2": Intervention(
        site=HEAD, do="clamp", vector=(0.0, 0.0), read=(2.0, 1.0), threshold=1e-3, amount=2.0
    ),
    "L0.z.3@policy <- that of cue A": Intervention(site=HEAD, do="replace", source="A"),
    "L2.resid_pre <- the mean over cues": Intervention(site=SITES["L2.resid_pre"], do="mean"),
}


@pytest.mark.parametrize(("printed", "value"), [*SITES.items(), *INTERVENTIONS.items()], ids=lambda x: str(x))
def test_printed_and_read_back(printed: str, value: Frozen):
    assert str(value) == printed
    again = type(value).model_validate_json(value.model_dump_json())
    assert again == value
    assert hash(again) == hash(value)
    assert type(value).model_validate(value.model_dump(mode="json")) == value


def test_a_clamp_keeps_its_threshold_and_need_not_write_along_what_it_reads():
    given = {"site": HEAD, "do": "clamp", "vector": (0.0, 3.0), "read": (1.0, 0.0), "amount": 0.0}
    linear, sparse = Intervention(**given), Intervention(**given, threshold=0.0)
    assert (linear.threshold, sparse.threshold) == (None, 0.0)
    assert linear != sparse
    for each in (linear, sparse):
        assert Intervention.model_validate_json(each.model_dump_json()).threshold == each.threshold


def test_a_position_keeps_its_kind():
    named, index = (Site(layer=0, component="z", position=position) for position in ("5", 5))
    assert Site.model_validate_json(named.model_dump_json()).position == "5"
    assert Site.model_validate_json(index.model_dump_json()).position == 5
    assert named != index


def test_values_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        HEAD.layer = 1
    assert PER_HEAD == ("z", "q", "k", "v", "pattern")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layer": -1, "component": "z"}, "layer\n.*greater than or equal to 0"),
        ({"layer": 0, "component": "heads"}, "component\n.*'resid_pre'"),
        ({"layer": 0, "component": "mlp_out", "head": 0}, "head: mlp_out has no heads .those of z, q, k, v, pattern"),
        ({"layer": 0, "component": "z", "neuron": 0}, "neuron: z has no neurons"),
        ({"layer": 0, "component": "z", "head": -1}, "head\n"),
        ({"layer": 0, "component": "z", "token": 3}, "token\n.*not permitted"),
    ],
    ids=["layer", "component", "head of what has none", "neuron of what has none", "negative head", "unknown key"],
)
def test_a_site_that_means_nothing_is_refused(fields: dict, says: str):
    with pytest.raises(ValidationError, match=says):
        Site.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"do": "set"}, "vector: set needs one"),
        ({"do": "add"}, "vector: add needs one"),
        ({"do": "scale", "vector": (1.0,)}, "vector: scale takes none"),
        ({"do": "replace", "source": "A", "vector": (1.0,)}, "vector: replace takes none"),
        ({"do": "replace"}, "source: replace needs the cue to read"),
        ({"do": "mean", "source": "A"}, "source: mean takes none"),
        ({"do": "project", "vector": (0.0, 0.0)}, "vector: project needs a direction, and this one is zero"),
        ({"do": "zero"}, "'scale'"),
        ({"do": "erase", "read": (1.0,)}, "vector: erase needs one"),
        ({"do": "erase", "vector": (1.0,)}, "read: erase needs one"),
        ({"do": "project", "vector": (1.0,), "read": (1.0,)}, "read: project takes none"),
        ({"do": "add", "vector": (1.0,), "offset": 1.0}, "offset: add takes none"),
        ({"do": "erase", "vector": (1.0, 2.0), "read": (1.0,)}, "read: has 1 numbers, and the vector 2"),
        (
            {"do": "erase", "vector": (1.0, 2.0), "read": (1.0, 1.0)},
            "read: finds 3 in the vector, where it must find 1",
        ),
        ({"do": "clamp", "read": (1.0,)}, "vector: clamp needs one"),
        ({"do": "clamp", "vector": (1.0,)}, "read: clamp needs one"),
        ({"do": "clamp", "vector": (1.0,), "read": (1.0, 2.0)}, "read: has 2 numbers, and the vector 1"),
        ({"do": "clamp", "vector": (1.0,), "read": (1.0,), "source": "A"}, "source: clamp takes none"),
        ({"do": "erase", "vector": (1.0,), "read": (1.0,), "threshold": 0.0}, "threshold: erase takes none"),
        ({"do": "add", "vector": (1.0,), "threshold": 1.0}, "threshold: add takes none"),
    ],
    ids=str,
)
def test_an_intervention_that_lacks_something_is_refused(fields: dict, says: str):
    with pytest.raises(ValidationError, match=says):
        Intervention(site=HEAD, **fields)
