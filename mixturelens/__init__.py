"""mixturelens: did post-training change the router or the specialists?

    import mixturelens as ml

    pair = ml.Pair("S", "R", "suite.yaml")  # folders, hub ids or LoRA adapters
    print(ml.verdict(pair).reason)
    ml.patch(pair)  # where the router is
    ml.repair(pair)  # and what undoes the change
    ml.report(pair, "report.html")

Each instrument returns a record, keeps it in `pair.records`, and reads it from there when it is asked again. Nothing is
imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixturelens.behaviour.record import BehaviourRecord
    from mixturelens.discovery.asked import read_prompts
    from mixturelens.discovery.record import DiscoveryRecord
    from mixturelens.features.record import FeatureRecord
    from mixturelens.grafting.record import GraftRecord
    from mixturelens.models.pair import Budget, Pair
    from mixturelens.pages.circuit import circuit_view
    from mixturelens.patching.record import PatchingRecord
    from mixturelens.pipeline import (
        card,
        circuit,
        compare,
        decompose,
        discover,
        graft,
        measure,
        patch,
        probe,
        refine_discovery,
        repair,
        report,
        verdict,
    )
    from mixturelens.probing.record import ProbingRecord
    from mixturelens.routing.circuit import CircuitRecord
    from mixturelens.routing.repair import RepairRecord
    from mixturelens.routing.verdict import VerdictRecord
    from mixturelens.suite import Suite, load_suite
    from mixturelens.types import InputError, Interval, RunError

_FOUND_IN = {
    "behaviour.record": ("BehaviourRecord",),
    "discovery.asked": ("read_prompts",),
    "discovery.record": ("DiscoveryRecord",),
    "features.record": ("FeatureRecord",),
    "grafting.record": ("GraftRecord",),
    "models.pair": ("Budget", "Pair"),
    "pages.circuit": ("circuit_view",),
    "patching.record": ("PatchingRecord",),
    "pipeline": (
        "card",
        "circuit",
        "compare",
        "decompose",
        "discover",
        "graft",
        "measure",
        "patch",
        "probe",
        "refine_discovery",
        "repair",
        "report",
        "verdict",
    ),
    "probing.record": ("ProbingRecord",),
    "routing.circuit": ("CircuitRecord",),
    "routing.repair": ("RepairRecord",),
    "routing.verdict": ("VerdictRecord",),
    "suite": ("Suite", "load_suite"),
    "types": ("InputError", "Interval", "RunError"),
}
_MODULE_OF = {name: module for module, names in _FOUND_IN.items() for name in names}

__all__ = [
    "BehaviourRecord",
    "Budget",
    "CircuitRecord",
    "DiscoveryRecord",
    "FeatureRecord",
    "GraftRecord",
    "InputError",
    "Interval",
    "Pair",
    "PatchingRecord",
    "ProbingRecord",
    "RepairRecord",
    "RunError",
    "Suite",
    "VerdictRecord",
    "card",
    "circuit",
    "circuit_view",
    "compare",
    "decompose",
    "discover",
    "graft",
    "load_suite",
    "measure",
    "patch",
    "probe",
    "read_prompts",
    "refine_discovery",
    "repair",
    "report",
    "verdict",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
