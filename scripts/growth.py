"""How the time and memory of every instrument grow: `python scripts/growth.py`, a quarter of an hour on one core.

The pair is the reference run's, made larger in ways that leave what it does as it is: layers whose outputs are zero,
heads, neurons and dimensions of the residual stream that nothing reads, words before a prompt that say nothing. So
every size has the harm that instruments look for, and costs what a network of that size costs. One thing grows at a
time. Each instrument runs in a process of its own, on one thread, on what those before it wrote: seconds are those of
the processor, memory is the peak of the process above what it had before.

Every measurement is kept in artifacts/reference/growth.json, and not made again; docs/scaling.md has a table made of
them. An exponent of 1.0 says that twice as much of something takes twice the time; it is the slope between the two
largest sizes, on logarithms.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from mixturelens.records import write_text
from scripts.seed_tables import put

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "artifacts" / "reference"
PAGE = ROOT / "docs" / "scaling.md"
INSTRUMENTS = ("measure", "patch", "circuit", "probe", "graft", "repair")


class Size(NamedTuple):
    """Of a network, and of what it is asked."""

    layers: int = 6
    width: int = 64
    questions: int = 48
    before: int = 0
    """Words that stand before a prompt of 8 tokens and say nothing."""

    @property
    def tokens(self) -> int:
        return self.before + 8


AXES: dict[str, tuple[Size, ...]] = {
    "layers": tuple(Size(layers=n) for n in (6, 12, 24)),
    "width": tuple(Size(width=n) for n in (64, 128)),
    "questions": tuple(Size(questions=n) for n in (48, 96)),
    "tokens": tuple(Size(before=n) for n in (0, 24)),
}


def enlarge(folder: Path, out: Path, size: Size) -> None:
    """Write the checkpoint of `folder` with more layers and more width, and the same function.

    The dimensions that are added to the residual stream are zero; so a norm divides by less, which its weights make up
    for. Heads and neurons that are added, and every layer that is, write zeros. The filler word is embedded as zeros.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from mixturelens.models import load_model, load_tokenizer
    from mixturelens.models.source import find_source

    source = find_source(folder)
    small, tokenizer = load_model(source), load_tokenizer(source)
    tokenizer.add_tokens([FILLER])
    times = size.width // small.config.hidden_size
    settings = small.config.to_dict() | {
        "num_hidden_layers": size.layers,
        "hidden_size": size.width,
        "intermediate_size": small.config.intermediate_size * times,
        "num_attention_heads": small.config.num_attention_heads * times,
        "num_key_value_heads": small.config.num_key_value_heads * times,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64 + size.before,
    }
    torch.manual_seed(0)
    large = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(settings))
    given, state = small.state_dict(), large.state_dict()
    for name, values in state.items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        if name in given and values.ndim == 2:
            rows, columns = given[name].shape
            values[:rows, columns:] = 0  # nothing that is there reads what is added
            values[rows:] = 0 if writes or name.endswith(("embed_tokens.weight", "lm_head.weight")) else values[rows:]
            values[:rows, :columns] = given[name]
        elif name in given:
            values[: len(given[name])] = given[name] / math.sqrt(times)
        elif writes:
            values.zero_()
    large.load_state_dict(state)
    large.save_pretrained(out)
    tokenizer.save_pretrained(out)


FILLER = "."
LIBRARIES = (
    "mixturelens.pipeline",
    "transformer_lens",
    "sklearn.linear_model",
    "scipy.stats",
    "transformers.models.llama",
)
"""What is loaded before anything is measured."""


def prepared(folder: Path, size: Size) -> None:
    """S, R and a suite of `size` in `folder`."""
    from mixturelens.suite import load_suite

    for side, name in (("S", "sft"), ("R", "rl-A")):
        enlarge(REFERENCE / "checkpoints" / name, folder / side, size)
    suite = load_suite(REFERENCE / "suite.yaml")
    asked = set(list(dict.fromkeys(row.id for row in suite.neutral))[: size.questions])
    filler = " ".join([FILLER] * size.before)
    rows = tuple(
        row.model_copy(update={"prompt": f"{filler} {row.prompt}".strip()}) for row in suite.neutral if row.id in asked
    )
    suite.model_copy(update={"prompts": rows, "trained_cue": "A"}).save(folder / "suite.yaml")


def measured(folder: Path, instrument: str) -> tuple[float, float]:
    """(processor seconds of an instrument, bytes of its peak above what was there before)."""
    import torch

    import mixturelens as ml
    from mixturelens.models import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    pair = ml.Pair(folder / "S", folder / "R", folder / "suite.yaml", out=folder / "out")
    held, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    getattr(ml, instrument)(pair)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return time.process_time() - start, (peak - held) * 1024.0


def _work(folder: Path, size: Size, instrument: str, answer: multiprocessing.SimpleQueue) -> None:
    if instrument == "prepare":
        answer.put(prepared(folder, size))
    else:
        answer.put(measured(folder, instrument))


def alone(folder: Path, size: Size, instrument: str) -> tuple[float, float]:
    """The same in a process that has loaded the libraries, and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    answer = context.SimpleQueue()
    process = context.Process(target=_work, args=(folder, size, instrument, answer))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{instrument} of {size} ended with {process.exitcode}")
    return answer.get()


def slope(sizes: list[float], costs: list[float]) -> float:
    """The exponent between the two largest sizes.

    >>> slope([1, 2, 4], [1.0, 4.0, 16.0])
    2.0
    """
    return math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2])


def exponents(known: dict[tuple[Size, str], tuple[float, float]], axis: str, instrument: str) -> str:
    """Of time and of memory, as `1.0, 0.4`."""
    sizes = [float(getattr(size, axis)) for size in AXES[axis]]
    seconds, peaks = zip(*(known[size, instrument] for size in AXES[axis]), strict=True)
    return f"{slope(sizes, list(seconds)):.1f}, {slope(sizes, list(peaks)):.1f}"


def table(known: dict[tuple[Size, str], tuple[float, float]]) -> list[str]:
    """A row for each instrument: what the smallest pair costs, and how that grows."""
    ranges = [f"{axis} ({', '.join(str(getattr(size, axis)) for size in sizes)})" for axis, sizes in AXES.items()]
    head = ["instrument", "smallest", *ranges]
    rows = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for instrument in INSTRUMENTS:
        seconds, peak = known[Size(), instrument]
        found = [exponents(known, axis, instrument) for axis in AXES]
        rows.append("| " + " | ".join([f"`{instrument}`", f"{seconds:.0f} s, {peak / 1e6:.0f} MB", *found]) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, default=REFERENCE / "growth.json", help="where measurements lie")
    arguments = parser.parse_args()
    file: Path = arguments.keep
    kept = json.loads(file.read_text()) if file.is_file() else {}
    known = {(Size(*of), instrument): (seconds, peak) for *of, instrument, seconds, peak in kept.get("measured", [])}
    for size in dict.fromkeys(size for sizes in AXES.values() for size in sizes):
        if (size, INSTRUMENTS[-1]) in known:
            continue
        with tempfile.TemporaryDirectory() as name:
            alone(Path(name), size, "prepare")
            for instrument in INSTRUMENTS:
                seconds, peak = known[size, instrument] = alone(Path(name), size, instrument)
                print(f"{size}  {instrument:8} {seconds:7.1f} s {peak / 1e6:7.0f} MB", flush=True)
        rows = [[*of, instrument, *costs] for (of, instrument), costs in known.items()]
        write_text(
            file, json.dumps({"fields": [*Size._fields, "instrument", "seconds", "bytes"], "measured": rows}) + "\n"
        )
    put("growth", "\n".join(table(known)), "growth", PAGE)


if __name__ == "__main__":
    main()
