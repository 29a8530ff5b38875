"""What commands share: their options, and how a device, a seed or a budget is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixturelens.types import InputError

if TYPE_CHECKING:
    from mixturelens.models import Budget

app = typer.Typer(
    name="mixturelens",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    from importlib.metadata import version

    if asked:
        print(f"mixturelens {version('mixturelens')}")
        raise typer.Exit


@app.callback()
def _mixturelens(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Did post-training change the router, or the specialists?"""


Run = Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of a run made by `mixturelens train`.")]
Before = Annotated[
    str | None,
    typer.Option(metavar="SRC", help="Checkpoint before post-training (S): a folder, a hub id, or a LoRA adapter."),
]
After = Annotated[str | None, typer.Option(metavar="SRC", help="Checkpoint after post-training (R), likewise.")]
Base = Annotated[
    str | None, typer.Option(metavar="SRC", help="What adapters are applied on, where their configs do not say.")
]
Dtype = Annotated[str | None, typer.Option(help="float32 (default), bfloat16 or float16.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto, balanced or sequential: spread a model over devices (behaviour and verdict).")
]
SuiteFile = Annotated[Path | None, typer.Option("--suite", metavar="FILE", help="Behaviour suite of the pair.")]
TrainedCue = Annotated[str | None, typer.Option(help="Cue that was trained on, where the suite does not say.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Where results go; default: under artifacts/.")]
Completions = Annotated[
    list[str] | None,
    typer.Option(
        "--completions",
        metavar="[SIDE=]FILE",
        help="Completions sampled elsewhere (JSON lines or an Inspect log), in place of sampling; may be repeated.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU when there is one.")]
Seed = Annotated[int, typer.Option(help="Seed of samples and bootstrap.")]
Minutes = Annotated[float | None, typer.Option(help="Time that an instrument may take: with less it looks at less.")]
Memory = Annotated[float | None, typer.Option(metavar="GB", help="Memory that an instrument may take, likewise.")]
Exhaustive = Annotated[bool, typer.Option("--exhaustive", help="Look everywhere, however long it takes.")]
Saes = Annotated[
    list[Path] | None,
    typer.Option(
        "--sae", metavar="FOLDER", help="Pretrained SAE in SAELens' format, instead of ours; may be repeated."
    ),
]
Export = Annotated[
    list[Path] | None,
    typer.Option(
        "--export",
        metavar="FILE",
        help="Write it as .svg, .pdf, .png, .html, or as .json for circuit-tracer and Neuronpedia; may be repeated.",
    ),
]
Contrast = Annotated[
    str | None, typer.Option("--contrast", metavar="KIND", help="cue or hint; default: the first that there is.")
]
Shown = Annotated[int, typer.Option("--edges", help="Edges of each side in a picture, the strongest first.")]
GraphSide = Annotated[str, typer.Option("--side", help="before or after: the checkpoint of a .json.")]
Against = Annotated[
    Path | None, typer.Argument(metavar="[OTHER]", help="A second output folder: compare what was measured in both.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the record, and nothing else, on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]


def device_of(wanted: str | None) -> str:
    """The device that was asked for; where none was, the GPU if there is one, else the CPU.

    Raises InputError for a device that cannot be used.
    """
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=wanted).is_meta:
            raise InputError("--device meta: nothing is computed there; give cpu or cuda")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {wanted}: {str(error).splitlines()[0]}") from None
    return wanted


def budget_of(minutes: float | None, memory: float | None) -> Budget:
    """What --minutes and --memory (GB) allow; None is no limit. Raises InputError for a number that is not above 0."""
    from mixturelens.models import Budget

    for flag, given in (("--minutes", minutes), ("--memory", memory)):
        if given is not None and not 0 < given < float("inf"):
            raise InputError(f"{flag} {given:g}: give a number above 0")
    return Budget(minutes=minutes, memory=memory)


def seed_of(wanted: int) -> int:
    """The seed, where it is one that NumPy takes (0 to 2**32 - 1); raises InputError for any other."""
    if not 0 <= wanted < 2**32:
        raise InputError(f"--seed {wanted}: a seed is a number from 0 to 4294967295")
    return wanted
