"""What each method says of planted addresses: a score for every head and MLP.

Scores see the checkpoints, the suite and the spec, and nothing of what was planted; `judged.judge` sees both.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import FiniteFloat
from torch import Tensor

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.prompts import prepare
from mixturelens.contrasts import Contrasts, cue_contrasts, hint_contrasts
from mixturelens.features.activations import Activations
from mixturelens.features.effects import make_scene, unit_effects
from mixturelens.features.effort import Training
from mixturelens.features.sae import Origin, load_sae, train_sae
from mixturelens.grafting.components import weights_of
from mixturelens.grafting.effects import Judge
from mixturelens.grafting.graft import WorkingModel
from mixturelens.grafting.pair import some_questions
from mixturelens.grafting.path import attribute
from mixturelens.grafting.usual import make_cells
from mixturelens.hooks.batches import sides
from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.hooks.weights import components_of
from mixturelens.lab.organism import Spec, load_spec, safe_name
from mixturelens.models import end_tokens, load_model, load_tokenizer
from mixturelens.patching.attribution import EdgeScores, eap, eap_ig
from mixturelens.patching.graph import edge_graph
from mixturelens.patching.sweep import APART, Direction, patch
from mixturelens.probing.solve import fit_logistic
from mixturelens.probing.subspace import BATCH, STEPS, Interchange, Pairs, learn
from mixturelens.routing.circuit import routing_circuit
from mixturelens.suite import Suite, load_suite
from mixturelens.types import ANSWER, Component, Frozen, InputError, Site

Kind = Literal["cue", "hint", "change"]
"""What a method looks for: who carries the cue, who carries the hint, whose weights training changed."""

DIGITS = 6
"""Of a score: what is below is rounding of 32-bit activations, and would order nodes that do nothing."""
SAE_STEPS, SAE_BATCH, SAE_K = 200, 256, 4
"""Of an SAE of one node, 2 d wide: small, because there is one for every node."""


class Found(Frozen):
    """What one method says of every candidate node in one organism."""

    organism: str
    contrast: Kind
    method: str
    scores: dict[str, FiniteFloat]
    """|score| of every head and MLP (`L0.h3`, `L1.mlp`), or of every component of a pair (`L0.attn`)."""
    seconds: float
    """Of wall clock, all nodes together."""


# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A contrast in one model, and the nodes among which every method looks for those that carry it."""

    lens: Lens
    contrasts: Contrasts
    seed: int = 0

    @property
    def kind(self) -> Kind:
        """Whether it is the cue or the hint whose carriers are looked for."""
        return "hint" if self.contrasts.kind == "hint" else "cue"

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The output of every head and MLP where the metric is read, by the names that writers have in a graph."""
        position = "last" if self.kind == "hint" else "policy"
        found = {}
        for layer in range(self.lens.layers):
            for head in range(self.lens.heads):
                found[f"L{layer}.h{head}"] = Site(layer=layer, component="z", head=head, position=position)
            found[f"L{layer}.mlp"] = Site(layer=layer, component="mlp_out", position=position)
        return found

    @cached_property
    def whole(self) -> float:
        """Nats by which the two sides differ, mean over questions. Raises InputError for less than APART."""
        both = sides(self.lens, self.contrasts)
        clean, corrupt = (both.metric(self.lens.capture(batch, [])[1]) for batch in (both.clean, both.corrupt))
        found = float((clean - corrupt).mean())
        if not found >= APART:
            raise InputError(f"the sides of the {self.contrasts.kind} contrast differ by {found:.2f} nats: too little")
        return found

    @cached_property
    def outputs(self) -> dict[str, Float[Tensor, "side row pos d"]]:
        """What every node gives: on the clean side, then on the corrupt one."""
        both = sides(self.lens, self.contrasts)
        keys: list[tuple[int, Component]] = [(site.layer, site.component) for site in self.sites.values()]
        found = [self.lens.capture(batch, keys)[0] for batch in (both.clean, both.corrupt)]
        stacked = {key: torch.stack([side[key] for side in found]) for key in keys}
        return {
            node: stacked[key] if site.head is None else stacked[key][..., site.head, :]
            for (node, site), key in zip(self.sites.items(), keys, strict=True)
        }

    def half(self, which: Literal[0, 1]) -> Case:
        """The same case on half of the questions: one half chooses, the other judges."""
        return replace(self, contrasts=self.contrasts.half(which))


def cases(folder: Path, seed: int = 0) -> tuple[Case, ...]:
    """The cue contrast of an organism's S and, where it has hints, its hint contrast.

    The policy put in place is the first that answers under one cue and not under another. Raises InputError if there is
    none, and as contrasts do.
    """
    spec, suite = load_spec(folder / "spec.json"), load_suite(folder)
    lens = load_lens(folder / "checkpoints" / "sft")
    policy, clean, corrupt = _conditional(spec)
    shows = spec.policies[policy].table[corrupt]
    found = [cue_contrasts(suite, lens.tokenizer, policy, (clean, corrupt), shows)]
    if spec.hints is not None:
        other = next(name for name in spec.policies if name != policy)
        found.append(hint_contrasts(suite, lens.tokenizer, clean, policy, other))
    return tuple(Case(lens, contrasts, seed) for contrasts in found)


def _conditional(spec: Spec) -> tuple[str, str, str]:
    for name, policy in spec.policies.items():
        answers = [cue for cue, does in policy.table.items() if does == ANSWER]
        rest = [cue for cue in policy.table if cue not in answers]
        if answers and rest:
            return name, answers[0], rest[0]
    raise InputError(f"{spec.name}: no policy answers under one cue and not under another, so no node reads the cue")


# --- methods ----------------------------------------------------------------------------------------------------------


def _probe(case: Case) -> dict[str, float]:
    """How well a linear probe reads the side off a node: 2 AUROC - 1 on the questions that it was not fitted on."""
    from sklearn.metrics import roc_auc_score

    fit, judge = (case.contrasts.rows_of(which) for which in (0, 1))

    def score(node: str) -> float:
        values = case.outputs[node][:, :, -1]
        probe = fit_logistic(values[:, fit].flatten(0, 1)[None], _labels(fit)[None])
        found = probe.scores(values[:, judge].flatten(0, 1)[None])[0, 0, :, 0]
        return max(0.0, 2 * float(roc_auc_score(_labels(judge), found)) - 1)

    return {node: score(node) for node in case.sites}


def _labels(rows: Sequence[int]) -> Int[Tensor, " row"]:
    return torch.tensor([1, 0]).repeat_interleave(len(rows))


def _patching(case: Case, direction: Direction = "denoise", off: int = 0, shuffled: bool = False) -> dict[str, float]:
    """Share of the contrast that a node moves when it is patched, exactly.

    `off` layers away from where it says, or with the sides of a random half of the questions exchanged: both broken on
    purpose, so that the score has something to catch.
    """
    contrasts = case.contrasts
    if shuffled:
        exchanged = set(np.random.default_rng(case.seed).permutation(len(contrasts.rows))[::2].tolist())
        rows = [
            replace(row, clean=row.corrupt, corrupt=row.clean) if i in exchanged else row
            for i, row in enumerate(contrasts.rows)
        ]
        contrasts = replace(contrasts, rows=tuple(rows))
    layers = case.lens.layers
    sites = [site.model_copy(update={"layer": (site.layer + off) % layers}) for site in case.sites.values()]
    found = patch(case.lens, contrasts, sites, direction=direction)
    moved = (found.patched - found.base).mean(1) / case.whole
    return dict(zip(case.sites, moved.tolist(), strict=True))


def _edges(case: Case, scored: Callable[..., EdgeScores]) -> dict[str, float]:
    """Sum of the scores of a node's outgoing edges: what patching the node is estimated to do."""
    on = sides(case.lens, case.contrasts)
    graph = edge_graph(case.lens, on)
    total = scored(graph, on).mean.sum(1) / case.whole
    return {name: float(total[graph.writers.index(name)]) for name in case.sites}


def _circuit(case: Case) -> dict[str, float]:
    """The nodes of the routing circuit, nominated by slopes and judged by exact patching: what a node moves, into the
    corrupt run or into the clean one, whichever is more; 0 where it is not surely used."""
    nodes = {node.name: node for node in routing_circuit(case.lens, case.contrasts, "before").nodes}
    moved = dict.fromkeys(nodes, 0.0)
    for name, node in nodes.items():
        if node.used:
            moved[name] = max((x.value for x in (node.patched, node.needed) if x.value is not None), key=abs)
    return {name: moved[name] for name in case.sites}


def _sae(case: Case) -> dict[str, float]:
    """The SAE feature that moves the metric most when it is patched, chosen on half of the questions."""
    choose, judge = case.half(0), case.half(1)
    both = sides(case.lens, choose.contrasts)
    real = torch.stack([both.clean.real, both.corrupt.real])

    def score(node: str, site: Site) -> float:
        rows = Activations((choose.outputs[node][real][:, None].contiguous(),))
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder) / "sae"
            train_sae(rows, at, Origin(str(site)), Training(k=SAE_K, steps=SAE_STEPS, batch=SAE_BATCH, seed=case.seed))
            sae = load_sae(at)
        chosen, judged = (
            unit_effects(make_scene(case.lens, each.contrasts, site), sae).mean(1) / each.whole
            for each in (choose, judge)
        )
        return float(judged[np.abs(chosen).argmax()]) if len(sae) else 0.0  # rows without variance leave no feature

    return {node: score(node, site) for node, site in case.sites.items()}


def _das(case: Case) -> dict[str, float]:
    """Share of the contrast that follows the source, when one learnt dimension of a node's output is interchanged
    between questions; learnt on half of them."""
    teach, judge = case.half(0), case.half(1)

    def score(site: Site) -> float:
        model, held_out = (_interchange(each, site) for each in (teach, judge))
        if not bool((model.values != model.values[:1]).any()):
            return 0.0  # every prompt has the same there, and no direction can be learnt
        direction = learn(model, _pairs(model, STEPS * BATCH, case.seed), 1, case.seed)
        pairs = _pairs(held_out, 4 * len(held_out.own), case.seed + 1)
        other = pairs.asks != held_out.clean[pairs.base]
        pairs = Pairs(pairs.base[other], pairs.source[other], pairs.asks[other])
        with torch.no_grad():
            moved = held_out.swapped(pairs, direction) - held_out.own[pairs.base]
        return float((torch.where(pairs.asks, moved, -moved)).mean()) / judge.whole

    return {node: score(site) for node, site in case.sites.items()}


def _interchange(case: Case, site: Site) -> Interchange:
    model = Interchange(case.lens, case.contrasts, site)
    if site.head is not None:  # it keeps those of all heads
        model.values = model.values[:, :, site.head]
    return model


def _pairs(model: Interchange, number: int, seed: int) -> Pairs:
    """Random base prompts, each with a source of another question, under either side."""
    rng, n = np.random.default_rng(seed), model.questions
    base = rng.integers(0, 2 * n, number)
    source = (base + rng.integers(1, n, number)) % n + n * rng.integers(0, 2, number)
    return Pairs(torch.from_numpy(base), torch.from_numpy(source), torch.from_numpy(source < n))


METHODS: Mapping[str, Callable[[Case], dict[str, float]]] = {
    "probe": _probe,
    "exact patching": _patching,
    "exact patching, noise": functools.partial(_patching, direction="noise"),
    "EAP": functools.partial(_edges, scored=eap),
    "EAP-IG": functools.partial(_edges, scored=eap_ig),
    "routing circuit": _circuit,
    "SAE feature": _sae,
    "DAS": _das,
}
"""Name -> scores of every node, signs included. The first train or fit on half of the questions, where they do."""
BROKEN: Mapping[str, Callable[[Case], dict[str, float]]] = {
    "exact patching, one layer off": functools.partial(_patching, off=1),
    "exact patching, sides shuffled": functools.partial(_patching, shuffled=True),
}
"""What a score of methods has to catch. Where all other nodes are exactly inert, what is left of shuffled sides still
ranks the planted ones first, so that the cut catches it (IoU), and AUROC does not."""
INTACT, RANDOM = "exact patching", "random scores"
OF_PAIRS = ("graft", "path attribution")


def localise(
    folder: Path, methods: Collection[str] = (*METHODS, *BROKEN, *OF_PAIRS), seed: int = 0
) -> tuple[Found, ...]:
    """What every method says of every node of an organism: on its cue contrast and, if it has hints, its hint contrast;
    and of every component of the pair, if there is an R.

    `folder` holds `spec.json`, `suite.yaml` and `checkpoints/sft` (`rl-<cue>`). Raises InputError for a method that
    does not exist, and where an instrument cannot measure the organism.
    """
    every = {**METHODS, **BROKEN}
    for name in methods:
        if name not in every and name not in OF_PAIRS:
            raise InputError(f"there is no method {name!r}; there are {', '.join((*every, *OF_PAIRS))}")
    found = []
    for case in cases(folder, seed):
        for name in (name for name in every if name in methods):
            start = time.perf_counter()
            found.append(_found(folder, case.kind, name, every[name](case), start))
    return (*found, *_of_pair(folder, [name for name in OF_PAIRS if name in methods], seed))


def _found(folder: Path, kind: Kind, method: str, scores: Mapping[str, float], start: float) -> Found:
    seconds = round(time.perf_counter() - start, 3)
    rounded = {name: round(abs(value), DIGITS) for name, value in scores.items()}
    return Found(organism=folder.name, contrast=kind, method=method, scores=rounded, seconds=seconds)


def _of_pair(folder: Path, methods: Sequence[str], seed: int) -> list[Found]:
    """How much of the change of log c each component brings about: alone in S, or along the line from S to R."""
    spec, suite = load_spec(folder / "spec.json"), load_suite(folder)
    before, after = (folder / "checkpoints" / name for name in ("sft", f"rl-{safe_name(_conditional(spec)[1])}"))
    if not methods or not after.is_dir():
        return []
    bench, judge = _bench(before, after, suite, seed)
    if not judge.moved_cues.any():
        raise InputError(f"{folder}: log c does not surely change from S to R, so no component can be found for it")
    found = []
    for method in methods:
        start = time.perf_counter()
        if method == "graft":
            scores = {name: judge.routing_share(bench.log_c([name])) for name in bench.names}
        else:
            path = attribute(bench, judge.policies)
            routing = [name.startswith("routing@") for name in path.names]
            scores = dict(zip(path.parts, np.abs(np.nanmean(path.values[:, routing], (0, 1))).tolist(), strict=True))
        found.append(_found(folder, "change", method, scores, start))
    return found


def _bench(before: Path, after: Path, suite: Suite, seed: int) -> tuple[WorkingModel, Judge]:
    tokenizer = load_tokenizer(before)
    s, r = load_model(before), load_model(after)
    scorer = Scorer(end_tokens(s, tokenizer), s.config.get_text_config().vocab_size)
    cells = make_cells(prepare(suite, some_questions(suite.neutral), tokenizer), s, scorer, seed)
    bench = WorkingModel(s, weights_of(s), weights_of(r), components_of(s, tokenizer), cells)
    first, second, *_ = suite.policies
    return bench, Judge(cells, (first, second), bench.readings(()), bench.readings(bench.names), cells.grid)
