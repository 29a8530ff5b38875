"""The laboratory: it grows organisms whose truth is known, and holds the instruments against them; core never does."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixturelens.lab.callback import RoutingCallback

__all__ = ["RoutingCallback"]


def __getattr__(name: str) -> Any:
    if name != "RoutingCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mixturelens.lab.callback import RoutingCallback

    return RoutingCallback
