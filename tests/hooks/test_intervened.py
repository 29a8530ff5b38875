"""A model with interventions behaves as runs made by hand say, and without any it is the model itself."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from mixturelens.behaviour.likelihood import END, Scorer
from mixturelens.hooks import intervened as room
from mixturelens.hooks.intervened import Intervened
from mixturelens.hooks.kept import KeptBeginnings
from mixturelens.hooks.lens import Lens, load_lens, tokens
from mixturelens.hooks.placed import known_prompts
from mixturelens.models import end_tokens, load_model
from mixturelens.spelling import encode_prompts
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError, Intervention, Site

PAIRS = Path(__file__).parents[1] / "pairs"
SHAPES = ["llama", "gpt2", "gpt_neox", "qwen2"]
every_shape = pytest.mark.parametrize("shape", SHAPES)
EXACT = {"atol": 1e-5, "rtol": 0.0}
LITERALS = [[13, 11], [13, 15], [14, END], [14, 15, END]]


@functools.cache
def lens_of(shape: str) -> Lens:
    return load_lens(PAIRS / shape / "S")


@functools.cache
def plain_model(shape: str):
    return load_model(PAIRS / shape / "S")


@functools.cache
def suite_of(shape: str, longer: bool = False) -> Suite:
    """Four questions; `longer`: the tag of cue B is two tokens and one question is shorter, so lengths differ."""
    suite = load_suite(PAIRS / shape)
    rows = list(suite.prompts[:8])
    for number, row in enumerate(rows if longer else []):
        tag, question = row.spans["cue"], row.spans["question"]
        if row.cue == "B":
            tag = f"{tag} {tag}"
        if number >= 6:
            question = question[:-2]
        spans = {"cue": tag, "question": question}
        rows[number] = row.model_copy(update={"prompt": f"{tag} {question} =", "spans": spans})
    return Suite.model_validate({**suite.model_dump(), "prompts": rows})


def scorer_of(shape: str) -> Scorer:
    model = plain_model(shape)
    return Scorer(end_tokens(model, lens_of(shape).tokenizer), model.config.vocab_size)


def contexts_of(shape: str, cue: str | None = None, longer: bool = False) -> list[list[int]]:
    suite = suite_of(shape, longer)
    rows = [row for row in suite.neutral if cue in (None, row.cue)]
    return encode_prompts(suite, rows, lens_of(shape).tokenizer)


def intervened(shape: str, *interventions: Intervention, longer: bool = False) -> Intervened:
    suite, lens = suite_of(shape, longer), lens_of(shape)
    return Intervened(lens, interventions, known_prompts(suite, suite.neutral, lens.tokenizer))


def do(site: str, what: str, **how) -> Intervention:
    """`L0.z.3@cue`, as sites are printed."""
    name, _, position = site.partition("@")
    layer, component, *head = name.split(".")
    where = int(position) if position.isdigit() else position or None
    unit = {("neuron" if component == "neurons" else "head"): int(head[0])} if head else {}
    return Intervention(site=Site(layer=int(layer[1:]), component=component, position=where, **unit), do=what, **how)


def same_behaviour(scorer: Scorer, one, other, of_one: list[list[int]], of_other: list[list[int]]) -> None:
    """All four ways in which behaviour asks a model."""
    literals = [[tuple(x) for x in LITERALS]] * len(of_one)
    found, expected = scorer.literals(one, of_one, literals), scorer.literals(other, of_other, literals)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
    rng = np.random.default_rng(0)
    continuations = [[int(t) for t in rng.integers(2, 16, rng.integers(1, 4))] for _ in of_one]
    np.testing.assert_allclose(
        scorer.sequences(one, of_one, continuations), scorer.sequences(other, of_other, continuations), atol=1e-5
    )
    limits = [3] * len(of_one)
    assert (
        scorer.sample(one, of_one, 2, limits, seed=5).tokens == scorer.sample(other, of_other, 2, limits, seed=5).tokens
    )
    _, (found,) = scorer.enumerate([one], of_one[:2], 2)
    _, (expected,) = scorer.enumerate([other], of_other[:2], 2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def logits(model, context: list[int], completion: list[int]) -> torch.Tensor:
    """After the prompt and after each token of the completion, in one forward."""
    with torch.inference_mode():
        keep = torch.arange(len(context) - 1, len(context) + len(completion))
        return model(input_ids=torch.tensor([[*context, *completion]]), logits_to_keep=keep).logits[0]


@every_shape
def test_without_interventions_it_is_the_model_itself(shape: str):
    contexts = contexts_of(shape)
    same_behaviour(scorer_of(shape), intervened(shape), plain_model(shape), contexts, contexts)
    longer = contexts_of(shape, longer=True)
    same_behaviour(scorer_of(shape), intervened(shape, longer=True), plain_model(shape), longer, longer)


@every_shape
def test_all_of_the_other_prompt_makes_it_the_other_prompt(shape: str):
    model = intervened(shape, do("L0.resid_pre", "replace", source="A"))
    same_behaviour(scorer_of(shape), model, plain_model(shape), contexts_of(shape, "B"), contexts_of(shape, "A"))
    # so does what lies at the cue, the only tokens that differ
    model = intervened(shape, do("L0.resid_pre@cue", "replace", source="A"))
    same_behaviour(scorer_of(shape), model, plain_model(shape), contexts_of(shape, "B"), contexts_of(shape, "A"))
    a, b = (scorer_of(shape).sequences(model, contexts_of(shape, cue), [[13, 15]] * 4) for cue in "AB")
    np.testing.assert_allclose(a, b, atol=1e-5)
    own = scorer_of(shape).sequences(plain_model(shape), contexts_of(shape, "B"), [[13, 15]] * 4)
    assert (np.abs(own - b) > 1).all()


@every_shape
def test_without_attention_it_is_a_model_without_attention(shape: str):
    model = copy.deepcopy(plain_model(shape))
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "attn.c_proj", "attention.dense")):
            torch.nn.init.zeros_(module.weight)
    contexts = contexts_of(shape)
    found = intervened(shape, do("L0.z", "scale", amount=0), do("L1.z", "scale", amount=0))
    same_behaviour(scorer_of(shape), found, model, contexts, contexts)
    heads = [do(f"L{layer}.z.{head}", "scale", amount=0) for layer in range(2) for head in range(4)]
    same_behaviour(scorer_of(shape), intervened(shape, *heads), model, contexts, contexts)


def run_by_hand(shape: str, ids: list[int], layer: int, component: str, edit) -> torch.Tensor:
    lens = lens_of(shape)
    with torch.inference_mode():
        return lens.run(tokens([ids]), [(lens.point(layer, component), edit)], last_only=False)[0]


def activation(shape: str, ids: list[int], layer: int, component: str) -> torch.Tensor:
    return lens_of(shape).capture(tokens([ids]), [(layer, component)])[0][layer, component]


@every_shape
@pytest.mark.parametrize("site", ["L0.z.2", "L1.z", "L0.mlp_out", "L1.neurons.7", "L0.k.1", "L0.resid_post"])
@pytest.mark.parametrize("position", ["", "@question", "@last", "@completion", "@3"])
def test_mean_is_half_of_the_sum_over_two_cues(shape: str, site: str, position: str):
    model = intervened(shape, do(site + position, "mean"))
    a, b = contexts_of(shape, "A")[1], contexts_of(shape, "B")[1]
    completion = [13, 8]
    name, _, unit = site[3:].partition(".")
    layer, end = int(site[1]), len(b)
    columns = {"": range(8), "@question": range(1, 5), "@last": [5], "@completion": range(6, 8), "@3": [3]}[position]
    assert end == 6
    sources = [activation(shape, [*ids, *completion], layer, name) for ids in (a, b)]

    def edit(value: torch.Tensor) -> torch.Tensor:
        for column in columns:
            at = (0, column) if not unit else (0, column, int(unit))
            value[at] = (sources[0][at] + sources[1][at]) / 2
        return value

    expected = run_by_hand(shape, [*b, *completion], layer, name, edit)[end - 1 :]
    torch.testing.assert_close(logits(model, b, completion), expected, **EXACT)


@every_shape
def test_set_add_and_project_do_what_they_say(shape: str):
    context, completion = contexts_of(shape, "B")[2], [13, 15]
    vector = torch.linspace(-1, 2, 32)
    direction = vector / vector.norm()

    def by_hand(edit) -> torch.Tensor:
        def at_question(x: torch.Tensor) -> torch.Tensor:
            x[:, 1:5] = edit(x[:, 1:5])
            return x

        return run_by_hand(shape, [*context, *completion], 0, "resid_post", at_question)[len(context) - 1 :]

    def found(*whats: tuple[str, dict]) -> torch.Tensor:
        steps = [do("L0.resid_post@question", what, **how) for what, how in whats]
        return logits(intervened(shape, *steps), context, completion)

    given = {"vector": tuple(vector.tolist())}
    plain = logits(plain_model(shape), context, completion)
    put, added = found(("set", given)), found(("add", {**given, "amount": 0.5}))
    projected = found(("project", given))
    torch.testing.assert_close(put, by_hand(lambda x: vector.expand_as(x)), **EXACT)
    torch.testing.assert_close(added, by_hand(lambda x: x + 0.5 * vector), **EXACT)
    torch.testing.assert_close(
        projected, by_hand(lambda x: x - torch.einsum("rpd,d,e->rpe", x, direction, direction)), **EXACT
    )
    torch.testing.assert_close(found(("scale", {"amount": 1.7})), by_hand(lambda x: 1.7 * x), **EXACT)
    for changed in (put, added, projected):
        assert (changed - plain).abs().max() > 0.01
    torch.testing.assert_close(found(("project", given), ("project", given)), projected, **EXACT)
    torch.testing.assert_close(found(("add", given), ("add", {**given, "amount": -1.0})), plain, **EXACT)
    # the last one of a place wins where it puts something there
    torch.testing.assert_close(found(("add", given), ("set", given)), put, **EXACT)


@every_shape
@pytest.mark.parametrize("site", ["L0.resid_post@question", "L1.resid_pre", "L0.z.2@completion", "L1.z@last"])
def test_erase_removes_what_is_read_and_no_more(shape: str, site: str):
    context, completion = contexts_of(shape, "B")[2], [13, 15]
    size = 8 if ".z" in site else 32
    generator = torch.Generator().manual_seed(3)
    vector, read = torch.randn(2, size, generator=generator)
    read = read / (read @ vector)
    how = {"vector": tuple(vector.double().tolist()), "offset": 0.3}
    how["read"] = tuple((read.double() / (read.double() @ vector.double())).tolist())
    name, _, position = site.partition("@")
    layer, component, *head = name.split(".")
    columns = {"question": slice(1, 5), "": slice(None), "completion": slice(6, None), "last": slice(5, 6)}[position]

    def edit(x: torch.Tensor) -> torch.Tensor:
        for unit in [()] if component != "z" else [(int(h),) for h in (head or range(4))]:
            at = (slice(None), columns, *unit)
            now = x[at].clone()
            x[at] = now - torch.einsum("rp,d->rpd", now @ read - 0.3, vector)
        return x

    plain = logits(plain_model(shape), context, completion)
    expected = run_by_hand(shape, [*context, *completion], int(layer[1:]), component, edit)[len(context) - 1 :]
    found = logits(intervened(shape, do(site, "erase", **how)), context, completion)
    torch.testing.assert_close(found, expected, **EXACT)
    assert (found - plain).abs().max() > 0.01
    twice = logits(intervened(shape, *[do(site, "erase", **how)] * 2), context, completion)
    torch.testing.assert_close(twice, found, atol=1e-4, rtol=0)  # a projection


@every_shape
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("site", ["L0.resid_post@question", "L1.resid_pre", "L0.z.2@completion", "L1.neurons@last"])
def test_a_clamped_unit_has_the_activation_that_was_asked_for(shape: str, site: str, threshold: float | None):
    context, completion = contexts_of(shape, "B")[2], [13, 15]
    name, _, position = site.partition("@")
    layer, component, *head = name.split(".")
    size = {"z": 8, "neurons": lens_of(shape).d_mlp}.get(component, 32)
    read, vector = torch.randn(2, size, generator=torch.Generator().manual_seed(3))
    columns = {"question": slice(1, 5), "": slice(None), "completion": slice(6, None), "last": slice(5, 6)}[position]

    def edit(x: torch.Tensor, to: float = 1.5) -> torch.Tensor:
        at = (slice(None), columns, *(int(h) for h in head))
        now = x[at].clone()
        f = now @ read - 0.3
        if threshold is not None:
            f = f * (f > threshold)  # a feature that does not fire is at 0
        x[at] = now + torch.einsum("rp,d->rpd", to - f, vector)
        return x

    expected = run_by_hand(shape, [*context, *completion], int(layer[1:]), component, edit)[len(context) - 1 :]
    how = {"vector": tuple(vector.tolist()), "read": tuple(read.tolist()), "offset": 0.3, "threshold": threshold}
    clamp = do(site, "clamp", amount=1.5, **how)
    found = logits(intervened(shape, clamp), context, completion)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - logits(plain_model(shape), context, completion)).abs().max() > 0.01


def test_clamping_at_zero_is_erasing_and_a_unit_that_never_fires_is_added():
    """Where the unit reads one in what it writes, and has no threshold; and where the threshold is out of reach."""
    context, vector = contexts_of("llama", "B")[2], torch.randn(32, generator=torch.Generator().manual_seed(1)).double()
    read = vector / (vector @ vector)
    how = {"vector": tuple(vector.tolist()), "read": tuple(read.tolist()), "offset": -0.2}

    def found(what: str, **more) -> torch.Tensor:
        return logits(intervened("llama", do("L1.resid_pre@last", what, **more)), context, [13])

    torch.testing.assert_close(found("clamp", amount=0.0, **how), found("erase", **how), **EXACT)
    added = found("add", amount=0.7, vector=how["vector"])
    torch.testing.assert_close(found("clamp", amount=0.7, threshold=1e6, **how), added, **EXACT)
    # two units of one site both read what was there, although each writes into what the other reads
    clamps = [do("L1.resid_pre@last", "clamp", amount=amount, **how) for amount in (0.7, 0.2)]
    once = found(
        "clamp", amount=0.7 + 0.2, **how | {"offset": -0.2, "read": tuple((2 * read).tolist())}, threshold=None
    )
    both = logits(intervened("llama", *clamps), context, [13])
    shifted = {**how, "read": tuple((2 * read).tolist()), "offset": -0.4}
    torch.testing.assert_close(both, found("clamp", amount=0.9, **shifted), **EXACT)
    assert not torch.allclose(once, both)


@every_shape
def test_a_vector_for_heads_goes_to_the_head_or_to_all(shape: str):
    context, vector = contexts_of(shape, "B")[0], torch.linspace(1, 2, 8)

    def one(z: torch.Tensor) -> torch.Tensor:
        z[:, :, 2] = vector
        return z

    for site, edit in (("L1.z.2", one), ("L1.z", lambda z: vector.expand_as(z))):
        model = intervened(shape, do(site, "set", vector=tuple(vector.tolist())))
        expected = run_by_hand(shape, context, 1, "z", edit)[-1:]
        torch.testing.assert_close(logits(model, context, []), expected, **EXACT)


@every_shape
@pytest.mark.parametrize("layer", [0, 1])
def test_prompts_of_different_lengths_are_aligned_at_their_ends(shape: str, layer: int):
    replace = do(f"L{layer}.z.1@completion", "replace", source="A")
    model = intervened(shape, replace, longer=True)
    for a, b in zip(contexts_of(shape, "A", longer=True), contexts_of(shape, "B", longer=True), strict=True):
        assert len(b) == len(a) + 1
        completion = [13, 15, 8]
        source = activation(shape, [*a, *completion], layer, "z")

        def edit(z: torch.Tensor, source=source) -> torch.Tensor:
            z[:, -3:, 1] = source[:, -3:, 1]
            return z

        expected = run_by_hand(shape, [*b, *completion], layer, "z", edit)[len(b) - 1 :]
        torch.testing.assert_close(logits(model, b, completion), expected, **EXACT)


REPAIRS = {
    "completion": (do("L0.z.1@completion", "replace", source="A"), do("L1.z.2@completion", "replace", source="A")),
    "last too": (do("L0.z@last", "replace", source="B"), do("L0.z@completion", "mean")),
    "mixed": (do("L0.mlp_out@completion", "mean"), do("L1.z.0", "scale", amount=0.5)),
}


@every_shape
@pytest.mark.parametrize("longer", [False, True], ids=["one length", "two lengths"])
@pytest.mark.parametrize("repair", REPAIRS)
def test_the_cache_changes_nothing(shape: str, longer: bool, repair: str):
    """Completions drawn with a key-value cache, in a padded batch, have the probabilities of teacher forcing alone."""
    model, contexts = intervened(shape, *REPAIRS[repair], longer=longer), contexts_of(shape, longer=longer)
    completions = [[13, 15, 8, 9], [14, 10, 1, 7]] * (len(contexts) // 2)
    batch, steps, past = tokens(contexts), [], None
    ids, mask, positions = batch.ids, batch.real.long(), batch.position_ids
    with torch.inference_mode():
        for step in range(5):
            output = model(
                input_ids=ids,
                attention_mask=mask if longer else None,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
            steps.append(output.logits[:, -1])
            past = output.past_key_values
            if step < 4:
                ids, positions = torch.tensor([[c[step]] for c in completions]), positions[:, -1:] + 1
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
    found = torch.stack(steps, 1)
    for row, (context, completion) in enumerate(zip(contexts, completions, strict=True)):
        torch.testing.assert_close(found[row], logits(model, context, completion), **EXACT)


@every_shape
def test_a_batch_of_several_lengths_is_scored_like_each_prompt_alone(shape: str):
    model, scorer = intervened(shape, *REPAIRS["completion"], longer=True), scorer_of(shape)
    contexts = contexts_of(shape, longer=True)
    drawn = scorer.sample(model, contexts, 3, [3] * len(contexts), seed=1)
    of = [contexts[i] for i in drawn.context]
    together = scorer.sequences(model, of, drawn.tokens)
    alone = [scorer.sequences(model, [c], [y])[0] for c, y in zip(of, drawn.tokens, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    again = scorer.sample(model, contexts, 3, [3] * len(contexts), seed=1)
    assert again.tokens == drawn.tokens


# --- what is refused --------------------------------------------------------------------------------------------------


def test_an_unknown_prompt_is_refused():
    with pytest.raises(InputError, match="asked about a prompt that is not among those"):
        scorer_of("llama").sequences(intervened("llama"), [[3, 5, 11, 11]], [[13]])


VECTOR = tuple(float(i) for i in range(8))


@pytest.mark.parametrize(
    ("intervention", "says"),
    [
        (do("L0.z", "replace", source="C"), "L0.z <- that of cue C: no prompt has cue 'C'; cues are A, B"),
        (do("L0.z@hint", "scale"), "L0.z@hint: no position 'hint' here; there are completion, cue, last, question"),
        (do("L0.z@6", "scale"), "L0.z@6: position 6 is outside the 6 tokens of a prompt"),
        (do("L0.resid_pre", "add", vector=VECTOR), "L0.resid_pre: the vector has 8 numbers, not 32"),
        (do("L0.neurons.1", "set", vector=VECTOR), "the vector has 8 numbers, not 1"),
        (do("L0.neurons", "set", vector=VECTOR), "the vector has 8 numbers, not 48"),
        (
            do("L0.z.1", "clamp", vector=VECTOR[:7], read=VECTOR[:7]),
            "L0.z.1: the vector has 7 numbers, not 8",
        ),
        (do("L0.pattern.1", "scale"), "L0.pattern.1: attention patterns can be patched, but not intervened in"),
        (do("L0.z.4", "scale"), "L0.z.4: there is no head 4"),
        (do("L2.z", "scale"), "blocks.2.attn.hook_z"),
    ],
    ids=str,
)
def test_what_does_not_exist_is_refused_by_name(intervention: Intervention, says: str):
    with pytest.raises(InputError) as caught:
        intervened("llama", intervention)
    assert says in str(caught.value)


@pytest.mark.parametrize("site", ["L0.z@cue", "L0.z@0", "L0.z"])
def test_positions_that_cannot_be_aligned_are_refused(site: str):
    """A token that has no counterpart under the other cue, or whose counterpart means something else."""
    for how in ({"what": "mean"}, {"what": "replace", "source": "A"}):
        with pytest.raises(InputError, match=r"7 tokens, and 6 under cue 'A'|6 tokens, and 7 under cue 'B'"):
            intervened("llama", do(site, **how), longer=True)
    intervened("llama", do("L0.z@question", "mean"), longer=True)  # behind the cue


def test_a_question_without_its_other_cue_is_refused():
    suite, lens = suite_of("llama"), lens_of("llama")
    prompts = known_prompts(suite, suite.neutral[1:], lens.tokenizer)
    Intervened(lens, [do("L0.z", "scale")], prompts)
    with pytest.raises(InputError, match="a question asked under B has no prompt under cue 'A'"):
        Intervened(lens, [do("L0.z", "mean")], prompts)


def test_known_prompts_know_spans_and_other_cues():
    suite, lens = suite_of("llama", True), lens_of("llama")
    known = known_prompts(suite, suite.neutral, lens.tokenizer)
    b = next(prompt for ids, prompt in known.items() if ids[:2] == (4, 4))
    assert b.spans == {"cue": (0, 1), "question": (2, 3, 4, 5)}
    assert b.under["B"] == b.ids
    assert b.under["A"] == (3, *b.ids[2:])


# --- prompts that are computed once -----------------------------------------------------------------------------------

EVERYWHERE = [
    (do(f"L1.resid_pre{at}", "scale", amount=0.5),) for at in ("@cue", "@question", "@last", "@completion", "@3", "")
]
TOGETHER = [
    (do("L0.z.1@completion", "replace", source="A"),),
    (do("L1.z.0@last", "mean"), do("L0.mlp_out@completion", "scale", amount=0.0)),
    (do("L0.resid_pre@question", "replace", source="B"), do("L1.z.1@completion", "replace", source="A")),
    (do("L1.resid_post@completion", "add", vector=(0.5,) * 64, amount=2.0),),
]


@pytest.mark.parametrize(
    ("shape", "longer", "interventions"),
    [
        *(("llama", True, each) for each in (*EVERYWHERE, *TOGETHER)),
        *(("llama", False, each) for each in TOGETHER),
        # where prompts are kept is of no account to a shape; how it goes on behind them is
        *((shape, True, each) for shape in SHAPES[1:] for each in TOGETHER),
    ],
    ids=lambda each: "+".join(map(str, each)) if isinstance(each, tuple) else str(each),
)
def test_what_goes_on_behind_kept_prompts_is_what_whole_rows_say(
    shape: str, longer: bool, interventions: tuple[Intervention, ...], monkeypatch: pytest.MonkeyPatch
):
    lens, suite, scorer = lens_of(shape), suite_of(shape, longer), scorer_of(shape)
    sized = [
        each if each.vector is None else each.model_copy(update={"vector": (0.5,) * lens.d_model})
        for each in interventions
    ]
    contexts = contexts_of(shape, longer=longer)
    placed = [[*context, token] for context in contexts for token in (13, 14)]
    literals = [[tuple(x) for x in LITERALS]] * len(placed)
    prompts = known_prompts(suite, suite.neutral, lens.tokenizer)
    try:
        whole, other = (
            Intervened(lens, sized, prompts),
            Intervened(lens, sized, prompts, KeptBeginnings(lens, most=2000)),
        )
    except InputError:
        assert longer  # such a position is not aligned
        return
    expected = scorer.literals(whole, placed, literals)
    bare = scorer.literals(whole, contexts, literals[: len(contexts)])
    assert not whole.kept.known
    monkeypatch.setattr(room, "LONG", 2)
    for _ in range(2):  # kept, and kept already
        for model in (whole, other):
            for of, by_hand in ((placed, expected), (contexts, bare)):
                found = scorer.literals(model, of, literals[: len(of)])
                np.testing.assert_allclose(found[0], by_hand[0], atol=1e-5)
                np.testing.assert_allclose(found[1], by_hand[1], atol=1e-5)
    if all(each.site.position in ("last", "completion") for each in sized):
        assert whole.kept.known == len(contexts)  # other prompts of the same questions among them


@pytest.mark.parametrize(
    ("shape", "longer", "interventions"),
    [
        *(("llama", True, each) for each in (*EVERYWHERE, *TOGETHER)),
        *(pytest.param(shape, False, each, marks=pytest.mark.slow) for shape in SHAPES for each in TOGETHER),
    ],
    ids=lambda each: "+".join(map(str, each)) if isinstance(each, tuple) else str(each),
)
def test_rows_that_go_on_token_by_token_are_what_whole_rows_say(
    shape: str, longer: bool, interventions: tuple[Intervention, ...]
):
    """Each row goes on from any that was there, in an order of its own, beside rows of other prompts."""
    lens, suite = lens_of(shape), suite_of(shape, longer)
    sized = [
        each if each.vector is None else each.model_copy(update={"vector": (0.5,) * lens.d_model})
        for each in interventions
    ]
    try:
        model = Intervened(lens, sized, known_prompts(suite, suite.neutral, lens.tokenizer))
    except InputError:
        assert longer  # such a position is not aligned
        return
    bare = [tuple(context) for context in contexts_of(shape, longer=longer)]
    contexts = [*bare, *((*context, 13) for context in bare), *((*context, 14, 11) for context in bare)]
    seen = []
    for some, rows in model.begun(contexts, [3] * len(contexts)):
        texts = [list(contexts[i]) for i in some]
        whole = [len(next(each for each in bare if contexts[i][: len(each)] == each)) for i in some]
        seen += some
        for above, put in (
            (None, None),
            (range(len(some)), [15] * len(some)),
            ([*reversed(range(len(some))), 0], [*range(6, 6 + len(some)), 15]),
            ([0], [9]),
        ):
            if above is not None:
                rows.go_on(above, put)
                texts = [[*texts[row], token] for row, token in zip(above, put, strict=True)]
                whole = [whole[row] for row in above]
            assert len(rows.logits) == len(texts)
            for row, (text, length) in enumerate(zip(texts, whole, strict=True)):
                expected = logits(model, text[:length], text[length:])[-1]
                torch.testing.assert_close(rows.logits[row], expected, **EXACT)
    assert sorted(seen) == list(range(len(contexts)))


def test_completions_drawn_behind_kept_prompts_are_as_frequent_as_they_are_probable(monkeypatch: pytest.MonkeyPatch):
    model, scorer, contexts = intervened("llama", *REPAIRS["completion"]), scorer_of("llama"), contexts_of("llama")
    number = 400
    literals = [[tuple(x) for x in LITERALS]] * len(contexts)
    logprobs, _ = scorer.literals(model, contexts, literals)
    monkeypatch.setattr("mixturelens.behaviour.likelihood.LONG", 2)
    limits = [3] * len(contexts)
    drawn = scorer.sample(model, contexts, number, limits, seed=1)
    assert model.kept.known
    assert drawn.tokens == scorer.sample(model, contexts, number, limits, seed=1).tokens
    assert max(map(len, drawn.tokens)) <= 3
    ends = set(scorer.ends)
    for i, expected in enumerate(logprobs):
        mine = [drawn.tokens[k] for k in np.flatnonzero(drawn.context == i)]
        assert len(mine) == number
        for literal, logprob in zip(LITERALS, expected, strict=True):
            if literal[-1] == END:
                begins = [t[: len(literal) - 1] == literal[:-1] and t[len(literal) - 1] in ends for t in mine]
            else:
                begins = [t[: len(literal)] == literal for t in mine]
            p = np.exp(logprob)
            assert abs(np.mean(begins) - p) <= 4 * np.sqrt(p * (1 - p) / number) + 1e-3


def test_tokens_of_id_zero_at_the_end_are_tokens(monkeypatch: pytest.MonkeyPatch):
    """Rows are padded, and what a completion ends in may look like padding."""
    model, scorer, contexts = intervened("llama", *REPAIRS["completion"]), scorer_of("llama"), contexts_of("llama")
    several = [[13, 0, 0, 0, 0], [0, 0, 0], [13]]
    given = [context for context in contexts for _ in several], several * len(contexts)
    expected = scorer.sequences(model, *given)
    monkeypatch.setattr(room, "LONG", 2)
    found = scorer.sequences(model, *given)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=1e-5)
