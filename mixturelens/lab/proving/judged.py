"""What methods found, judged by what was planted: by a cut that was chosen on other organisms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from mixturelens.lab.proving.localise import BROKEN, INTACT, RANDOM, Found, Kind
from mixturelens.lab.proving.planted import Planted
from mixturelens.stats import PROPORTION, mean_interval, resample_counts
from mixturelens.types import Frozen, InputError, Interval

DRAWS = 100
"""Random scores that chance is the mean of."""


class Localised(Frozen):
    """What was found, beside what was planted."""

    organism: str
    contrast: Kind
    method: str
    auroc: float
    """Of planted nodes against all others; ties count half."""
    top: float
    """Whether the best head (of a change: the best component) is planted; of those that tie for it, the share that is.
    Heads alone: the last MLP is in every cue circuit, so that whoever names it is right."""
    iou: float
    """Of the nodes that score at least the cut and those planted: shared over either."""
    decoys: float | None
    """Share of decoys that score below the cut and below every planted node; null where there are none."""
    both: bool | None
    """Whether all redundant readers score at least the cut; null where there is one."""
    seconds: float


class MethodScore(Frozen):
    """One method over the organisms that did not choose its cut: means, with intervals over organisms."""

    method: str
    contrast: Kind
    cut: float | None
    """Null for random scores, which pass as often as nodes are planted."""
    organisms: int
    auroc: Interval
    top: Interval
    iou: Interval
    decoys: Interval
    both: Interval
    """Share of the organisms with redundant readers in which all of them are found."""
    seconds: float


def planted_at(planted: Planted, contrast: Kind) -> frozenset[str]:
    """The nodes that carry a contrast, or the component that training changed."""
    return frozenset({"cue": planted.reader, "hint": planted.selector, "change": (planted.changed,)}[contrast])


def judge(found: Found, planted: Planted, cut: float) -> Localised:
    """Hold scores beside what was planted. A node counts as found from `cut` on (`best_cut` of other organisms).

    Raises InputError if a planted node is not among the scored ones, or all of them are planted.
    """
    from sklearn.metrics import roc_auc_score

    truth, scores = planted_at(planted, found.contrast), found.scores
    if not truth < scores.keys():
        raise InputError(f"{found.organism}: {', '.join(sorted(truth))} must be some of the scored {', '.join(scores)}")
    heads = {name: score for name, score in scores.items() if found.contrast == "change" or ".h" in name}
    best = [name for name, score in heads.items() if score == max(heads.values())]
    lowest = min(cut, *(scores[name] for name in truth))
    readers, selector = planted.heads
    decoys = [decoy for head, decoy in zip((*readers, selector), planted.decoys, strict=True) if head in truth]
    return Localised(
        organism=found.organism,
        contrast=found.contrast,
        method=found.method,
        auroc=float(roc_auc_score([name in truth for name in scores], list(scores.values()))),
        top=sum(name in truth for name in best) / len(best),
        iou=_iou(found, truth, cut),
        decoys=sum(scores[name] < lowest for name in decoys) / len(decoys) if decoys else None,
        both=all(scores[name] >= cut for name in readers) if planted.redundant and set(readers) < truth else None,
        seconds=found.seconds,
    )


def _iou(found: Found, truth: Collection[str], cut: float) -> float:
    chosen = {name for name, score in found.scores.items() if score >= cut}
    return len(chosen & set(truth)) / len(chosen | set(truth))


def best_cut(founds: Sequence[Found], planteds: Sequence[Planted]) -> float:
    """The cut of greatest mean IoU over these organisms, in the middle of the widest gap between scores that has it.

    Chosen on some organisms, it is for others. Raises InputError without organisms.
    """
    if not founds:
        raise InputError("a cut is chosen on organisms: give at least one")
    truths = [planted_at(planted, found.contrast) for found, planted in zip(founds, planteds, strict=True)]
    edges = np.unique([0.0, *(score for found in founds for score in found.scores.values())])
    if len(edges) == 1:
        return 0.0
    cuts = (edges[1:] + edges[:-1]) / 2
    means = [np.mean([_iou(found, truth, cut) for found, truth in zip(founds, truths, strict=True)]) for cut in cuts]
    best = np.isclose(means, max(means))
    return float(cuts[best][np.diff(edges)[best].argmax()])


def chance(found: Found, planted: Planted, seed: int = 0) -> Localised:
    """The mean of DRAWS judgements of random scores of the same nodes, cut where as many pass as are planted."""
    rng = np.random.default_rng(seed)
    cut = 1 - len(planted_at(planted, found.contrast)) / len(found.scores)
    draws = rng.random((DRAWS, len(found.scores))).tolist()
    drawn = [
        judge(found.model_copy(update={"scores": dict(zip(found.scores, draw, strict=True))}), planted, cut)
        for draw in draws
    ]
    numbers = {name: [getattr(each, name) for each in drawn] for name in ("auroc", "top", "iou", "decoys")}
    means = {name: None if None in values else float(np.mean(values)) for name, values in numbers.items()}
    return drawn[0].model_copy(update={**means, "both": None, "method": RANDOM, "seconds": 0.0})


def score(founds: Sequence[Found], planteds: Mapping[str, Planted], opened: Collection[str]) -> tuple[MethodScore, ...]:
    """Every method, and chance: its cut chosen on the organisms named by `opened`, and judged on all others.

    What is broken on purpose is cut as what it was made from. `planteds` are by the organism's name. Raises InputError
    where a method saw organisms of one half alone.
    """
    kinds = list(dict.fromkeys((each.contrast, each.method) for each in founds))
    scores: list[MethodScore] = []
    for kind in dict.fromkeys(contrast for contrast, _ in kinds):
        closed: list[Found] = []
        for method in (method for contrast, method in kinds if contrast == kind):
            like = INTACT if method in BROKEN else method
            chosen = [f for f in founds if (f.contrast, f.method) == (kind, like) and f.organism in opened]
            closed = [f for f in founds if (f.contrast, f.method) == (kind, method) and f.organism not in opened]
            cut = best_cut(chosen, [planteds[f.organism] for f in chosen])
            scores.append(_score([judge(f, planteds[f.organism], cut) for f in closed], cut))
        scores.append(_score([chance(f, planteds[f.organism], number) for number, f in enumerate(closed)], None))
    return tuple(scores)


def _score(judged: Sequence[Localised], cut: float | None) -> MethodScore:
    if not judged:
        raise InputError("a method is judged on organisms that did not choose its cut: give at least one")
    counts = resample_counts(len(judged), seed=0)

    def mean(name: str) -> Interval:
        values = [getattr(each, name) for each in judged]
        return mean_interval(
            np.array([np.nan if value is None else float(value) for value in values]), counts, bounds=PROPORTION
        )

    return MethodScore(
        method=judged[0].method,
        contrast=judged[0].contrast,
        cut=cut,
        organisms=len(judged),
        auroc=mean("auroc"),
        top=mean("top"),
        iou=mean("iou"),
        decoys=mean("decoys"),
        both=mean("both"),
        seconds=round(float(np.mean([each.seconds for each in judged])), 3),
    )
