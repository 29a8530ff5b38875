"""Speed, as ratios measured side by side in one run: `make bench`.

- Exact probabilities of policies by teacher forcing, against what one would do without mixturelens: sample completions
  with `generate` and count.
- The exact patch engine against transformer-lens' own `get_act_patch_*`, on the default organism and on the shape of
  GPT-2 (random weights). Each runs in a process of its own, so that peak memory can be compared; times are the best of
  several sweeps, captures included.
- Linear probes at every site of the default organism, against a loop over scikit-learn's LogisticRegression.
- A sparse autoencoder on activations of the default organism, against SAELens' own trainer with the same settings.
- A step of GRPO on the default organism, through TRL, against a loop by hand that does no more than it must.
- `verdict`, `patch`, `probe` and `graft` on a pretrained model, beside the least that any of them could take: one plain
  forward of every prompt and every continuation through each checkpoint. The pair is that of `make real`, on its first
  questions; where it has not been made, the same shape with random weights, whose completions are noise.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import mixturelens as ml
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.prompts import prepare
from mixturelens.models import Pair, end_tokens, load_model, load_tokenizer, quiet_libraries
from mixturelens.suite import load_suite

REFERENCE = Path(__file__).resolve().parents[1] / "artifacts" / "reference"
PROMPTS = 100
SAMPLES = 64
SAES = ((512, 16, 4096, 150, "sparse"), (128, 8, 1024, 150, "sparse"), (128, 8, 1024, 1200, "train_sae"))
"""Features, k, batch and steps of the SAEs that are trained, and what SAELens is compared with: the default, last."""
ROUNDS = 3


def main() -> None:
    real()
    behaviour()
    probes()
    sae()
    grpo()
    for case, repeats in (("organism", 5), ("gpt2", 1)):
        found = {}
        for who in ("transformer-lens", "mixturelens"):
            # a process of its own, and alone: peak memory is that of a process
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[who] = pool.submit(patching, case, who, repeats).result()
        (theirs, their_peak, their_values, _), (ours, our_peak, our_values, products) = found.values()
        error = float(np.abs(np.array(their_values) - np.array(our_values)).max())
        print(f"\n{CASES[case]}")
        print(f"transformer-lens                    {theirs:7.2f} s   peak memory {their_peak / 1e6:6.0f} MB")
        print(f"mixturelens                         {ours:7.2f} s   peak memory {our_peak / 1e6:6.0f} MB")
        print(
            f"the exact engine is                 {theirs / ours:7.1f} times faster, at {our_peak / their_peak:.2f} of "
            f"the memory; largest difference {error:.1g} nats"
        )
        print(
            f"its matrix products alone           {products:7.2f} s: with nothing else to do it would be "
            f"{theirs / products:.1f} times faster, which is the limit"
        )


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
CASES = {
    "organism": "256 contrasts of the default organism, every head at every position (108 patches)",
    "gpt2": "8 contrasts of 16 tokens, 12 layers of width 768, residual stream everywhere (192 patches)",
}


def patching(
    case: str, who: Literal["transformer-lens", "mixturelens"], repeats: int
) -> tuple[float, float, list[float], float]:
    """(seconds of the best sweep, peak bytes of this process, the mean metric of every patch, seconds of its matrix
    products)."""
    from mixturelens.hooks.lens import Lens, load_lens, tokens
    from mixturelens.hooks.metrics import log_odds

    quiet_libraries()
    generator = torch.Generator().manual_seed(0)
    if case == "organism":
        from mixturelens.contrasts import cue_contrasts

        lens = load_lens(REFERENCE / "checkpoints" / "rl-A")
        rows = cue_contrasts(load_suite(REFERENCE / "suite.yaml"), lens.tokenizer, "a", ("A", "B")).rows
        rows = (rows * 2)[:256]
        clean, corrupt = tokens([row.clean for row in rows]), tokens([row.corrupt for row in rows])
        odds = log_odds([row.target for row in rows], [row.foil for row in rows], lens.model.config.vocab_size)
        component = "z"
    else:
        from transformers import AutoModelForCausalLM, GPT2Config

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(GPT2Config()).eval()
        lens = Lens(model, load_tokenizer(REFERENCE / "checkpoints" / "sft"))
        clean, corrupt = (tokens(torch.randint(0, 50000, (8, 16), generator=generator).tolist()) for _ in range(2))
        odds = log_odds([[5]] * 8, [[6]] * 8, model.config.vocab_size)
        component = "resid_pre"
    width = clean.ids.shape[1]

    def theirs() -> list[float]:
        from transformer_lens import patching as lens_patching

        name = {"z": "attn_head_out_by_pos", "resid_pre": "resid_pre"}[component]
        # their progress bar costs little, but hides the result
        lens_patching.tqdm = lambda rows: rows  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
        with torch.no_grad():
            _, cache = lens.bridge.run_with_cache(clean.ids)
            sweep = getattr(lens_patching, f"get_act_patch_{name}")
            return sweep(lens.bridge, corrupt.ids, cache, lambda logits: odds(logits[:, -1]).mean()).flatten().tolist()

    def ours() -> list[float]:
        from mixturelens.hooks.engine import Engine
        from mixturelens.types import Site

        sites = [
            Site(layer=layer, component=component, head=head, position=position)
            for layer in range(lens.layers)
            for position in range(width)
            for head in (range(lens.heads) if component == "z" else [None])
        ]
        source, _ = lens.capture(clean, [(layer, component) for layer in range(lens.layers)])
        return Engine(lens, corrupt).sweep(sites, source, odds).mean(1).tolist()

    best, values = float("inf"), []
    for _ in range(repeats):
        start = time.perf_counter()
        values = ours() if who == "mixturelens" else theirs()
        best = min(best, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    if who == "transformer-lens":
        return best, peak, values, best
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ours()
    products = sum(each.self_cpu_time_total for each in seen.key_averages() if each.key in PRODUCTS) / 1e6
    return best, peak, values, products


def probes() -> None:
    """Fit the cue (with four shuffles of it) and the first letter of the answer, at every site."""
    import warnings

    from sklearn.linear_model import LogisticRegression

    from mixturelens.hooks.lens import load_lens
    from mixturelens.probing.prompts import read_prompts
    from mixturelens.probing.reading import read
    from mixturelens.probing.readouts import sites_of
    from mixturelens.probing.solve import fit_logistic

    quiet_libraries()
    lens = load_lens(REFERENCE / "checkpoints" / "sft")
    prompts = read_prompts(load_suite(REFERENCE / "suite.yaml"), lens.tokenizer)
    where = sites_of(lens, prompts, exhaustive=True)
    captured = read(lens, prompts, where.keys)
    generator = torch.Generator().manual_seed(0)
    ours = theirs = 0.0
    fits, sites, excess, gaps, tight = 0, 0, [], [], []
    for group in ("neutral", "placed"):
        rows = prompts.rows[group]
        fit = torch.tensor([row.question in prompts.halves[0] for row in rows])
        cue = torch.tensor([row.cue == rows[0].cue for row in rows]).long()
        letters = sorted({row.answer[0] for row, fitted in zip(rows, fit, strict=True) if fitted})
        answer = torch.tensor([letters.index(row.answer[0]) if row.answer[0] in letters else -1 for row in rows])
        order = [torch.randperm(int(fit.sum()), generator=generator) for _ in range(4)]
        positions = prompts.positions[group]
        own = [site for site in where.every if site.position in positions]
        for some in ([site for site in own if (site.component == "z") == heads] for heads in (False, True)):
            features = captured.at(group, positions, some)
            sites += len(features)
            for truth, labels in ((cue, [cue[fit], *(cue[fit][o] for o in order)]), (answer, [answer[fit]])):
                y = torch.stack(labels)
                start = time.perf_counter()
                probe = fit_logistic(features[:, fit], y)
                ours += time.perf_counter() - start
                scaled = ((features - probe.mean[:, None]) * probe.scale[:, None]).numpy()
                held = (~fit & (truth >= 0)).numpy()
                scores = probe.scores(features).numpy()
                for site, z in enumerate(scaled):
                    train = z[fit.numpy()]
                    for k, target in enumerate(y.numpy()):
                        fits += 1
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")  # its defaults stop before it has converged
                            start = time.perf_counter()
                            model = LogisticRegression().fit(train, target)
                            theirs += time.perf_counter() - start
                            mine = _objective(
                                probe.weights[site, k].numpy(), probe.bias[site, k].numpy(), train, target
                            )
                            if k == 0:
                                excess.append(mine / _objective(model.coef_, model.intercept_, train, target) - 1)
                                found = scores[site, k]
                                guess = found[:, 0] > 0 if found.shape[1] == 1 else found.argmax(1)
                                right = float((guess[held] == truth.numpy()[held]).mean())
                                gaps.append(abs(right - model.score(z[held], truth.numpy()[held])))
                            if k == 0 and site % 16 == 0:
                                best = LogisticRegression(tol=1e-10, max_iter=10000).fit(train, target)
                                tight.append(mine / _objective(best.coef_, best.intercept_, train, target) - 1)
    print(f"\n{fits} probes at {sites} sites of the default organism: cue, its shuffles, first letter of the answer")
    print(f"scikit-learn's LogisticRegression   {theirs:7.2f} s   in a loop")
    print(f"mixturelens                         {ours:7.2f} s   {theirs / ours:.1f} times faster")
    print(
        f"loss relative to scikit-learn's     {np.median(excess):+.1g} in the median, {max(excess):+.1g} at most; to "
        f"its converged one {np.median(tight):+.1g} and {max(tight):+.1g} ({len(tight)} probes)"
    )
    print(f"accuracy on held-out questions      {np.median(gaps):.3f} apart in the median, {max(gaps):.3f} at most")


def sae() -> None:
    """Trainings in turns, on the same batches. `sparse` is SAELens' trainer and settings, and our steps; `train_sae`
    the whole of it, with the start at examples, resampling, checkpoints and saving."""
    import io

    from mixturelens.features.activations import collect, texts
    from mixturelens.features.effort import Training
    from mixturelens.features.sae import Origin, load_sae, make_trainer, train_sae
    from mixturelens.hooks.lens import load_lens

    quiet_libraries()
    lens, suite = load_lens(REFERENCE / "checkpoints" / "sft"), load_suite(REFERENCE / "suite.yaml")
    acts = collect([lens], texts([lens], suite, suite.prompts), (1, "resid_pre"))
    x = acts.batch(0, len(acts), seed=1)[:, 0]
    variance = float((x - x.mean(0)).square().sum())

    def judged(folder: Path) -> tuple[float, float]:
        """(share of variance that is missed, features that fire on some row)."""
        dictionary = load_sae(folder)
        f = dictionary.encode(x)
        return float((x - dictionary.decode(f)).square().sum()) / variance, int((f > 0).any(0).sum())

    def train(who: str, folder: Path, width: int, k: int, batch: int, steps: int) -> float:
        training = Training(width=width, k=k, steps=steps, batch=batch)
        if who == "train_sae":
            start = time.perf_counter()
            train_sae(acts, folder, Origin("blocks.1.hook_resid_pre"), training)
            return time.perf_counter() - start
        trainer = make_trainer(acts, training, sparse=who == "sparse")
        trainer.cfg.dead_feature_window = 1000  # their default, so that no auxiliary loss slows them down
        with contextlib.redirect_stderr(io.StringIO()):  # their progress bar
            start = time.perf_counter()
            trained = trainer.fit()
            seconds = time.perf_counter() - start
        trained.save_inference_model(folder)
        return seconds

    with tempfile.TemporaryDirectory() as name:
        train("sparse", Path(name) / "warm-up", 32, 4, 64, 2)
        for width, k, batch, steps, ours in SAES:
            found: dict[str, list[tuple[float, float, float]]] = {"SAELens": [], ours: []}
            for number in range(ROUNDS):
                for who, rounds in found.items():
                    folder = Path(name) / f"{who}-{width}-{steps}-{number}"
                    seconds = train(who, folder, width, k, batch, steps)
                    rounds.append((steps * batch / seconds, *judged(folder)))
            print(
                f"\nSAE of {len(acts)} activations of width {acts.dim}: {width} features, k {k}, batch {batch}, "
                f"{steps} steps"
            )
            for who, rounds in found.items():
                speed, missed, fire = (statistics.median(each) for each in zip(*rounds, strict=True))
                title = who if who == "SAELens" else f"mixturelens ({who})"
                print(f"{title:28} {speed:9,.0f} samples a second   unexplained {missed:.4f}   features {fire:.0f}")
            pairs = zip(found["SAELens"], found[ours], strict=True)
            low, *_, high = ratios = sorted(own[0] / other[0] for other, own in pairs)
            print(
                f"training is                  {statistics.median(ratios):9.1f} times faster ({low:.1f} to {high:.1f})"
            )


def _objective(weights: np.ndarray, bias: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> float:
    """What scikit-learn minimises (C = 1)."""
    logits = rows.astype(float) @ weights.astype(float).T + bias
    logits = np.hstack([np.zeros_like(logits), logits]) if logits.shape[1] == 1 else logits
    log_losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]
    return float(log_losses.sum() + np.square(weights.astype(float)).sum() / 2)


STEPS = 20
"""Steps of GRPO that are timed, behind two that are not."""


def grpo() -> None:
    """Seconds of a step: ours by TRL's trainer, with everything that a stage does at a step; the other by hand."""
    found: dict[str, list[float]] = {"hand": [], "ours": []}
    for _ in range(ROUNDS):
        found["hand"].append(_by_hand())
        found["ours"].append(_by_trl())
    ratios = sorted(own / hand for hand, own in zip(*found.values(), strict=True))
    print("\nGRPO of the default organism, 32 prompts, 8 completions each, one thread")
    for who, title in (("hand", "a loop by hand"), ("ours", "mixturelens, by TRL's trainer")):
        print(f"{title:36}{1000 * statistics.median(found[who]):7.0f} ms a step")
    print(
        f"a step takes                        {statistics.median(ratios):7.2f} times as long ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}; limit 1.3)"
    )


def _by_trl() -> float:
    import shutil

    from mixturelens.lab.organism import load_spec, with_settings
    from mixturelens.lab.training import train_stage

    class Enough(Exception):
        """Thrown behind the last step that is timed."""

    times: list[float] = []

    def progress(stage: str, step: int, steps: int, numbers: dict[str, float]) -> None:
        times.append(time.perf_counter())
        if step == STEPS + 2:
            raise Enough

    spec = with_settings(load_spec("default"), {"rl.measure_every": 1000, "rl.stop_reward": None}, "bench")
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(REFERENCE / "checkpoints" / "sft", Path(name) / "checkpoints" / "sft")
        with contextlib.suppress(Enough):
            train_stage(spec, "rl-A", Path(name), "cpu", progress)
    return (times[-1] - times[1]) / STEPS


def _by_hand() -> float:
    """Sample with `generate`, reward, take the advantage in a group, and step, with the loss of GRPO on whole rows."""
    from mixturelens.lab.organism import build_suite, load_spec, rl_prompts
    from mixturelens.lab.training import make_reward
    from mixturelens.spelling import encode_prompts

    spec = load_spec("default")
    tokenizer, model = load_tokenizer(REFERENCE / "checkpoints" / "sft"), load_model(REFERENCE / "checkpoints" / "sft")
    suite, rows = build_suite(spec), rl_prompts(spec, "A")
    contexts = torch.tensor(encode_prompts(suite, rows, tokenizer))
    ends, pad = end_tokens(model, tokenizer), model.config.pad_token_id
    reward = make_reward(suite, rows, ends)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.rl.learning_rate, eps=spec.rl.adam_epsilon)
    times: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for _ in range(STEPS + 3):
        times.append(time.perf_counter())
        chosen = torch.randperm(len(rows))[: spec.rl.prompts].repeat_interleave(spec.rl.group)
        model.eval()
        whole = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=contexts[chosen],
            attention_mask=torch.ones_like(contexts[chosen]),
            max_new_tokens=spec.max_new_tokens,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=pad,
        )
        model.train()
        drawn = whole[:, contexts.shape[1] :]
        ended = (drawn == ends[0]).int()
        written = ended.cumsum(-1) - ended == 0
        completions = [row[seen].tolist() for row, seen in zip(drawn, written, strict=True)]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        got = torch.tensor(reward(texts, completions, chosen.tolist())).view(-1, spec.rl.group)
        advantage = ((got - got.mean(1, keepdim=True)) / (got.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        logits = model(input_ids=whole[:, :-1], logits_to_keep=drawn.shape[1]).logits
        logs = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        loss = -((logs - logs.detach()).exp() * advantage * written).sum() / written.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    return (times[-1] - times[2]) / STEPS


REAL = Path(os.environ.get("MIXTURELENS_REAL", REFERENCE.parent / "pretrained" / "run"))
PAIR = REAL / "checkpoints" / "sft", REAL / "checkpoints" / "rl-xml"
ASKED = 16
"""Questions of the part about a pretrained model."""


def real() -> None:
    """Each command in a process of its own, in turn, on what the ones before it wrote."""
    with tempfile.TemporaryDirectory() as name:
        folder, pair = REAL, PAIR
        if not PAIR[1].is_dir():
            folder = Path(name) / "pair"
            random_pair(folder)
            pair = folder / "S", folder / "R"
        suite = load_suite(folder / "suite.yaml")
        what = "SmolLM2-135M" if folder == REAL else "the shape of SmolLM2-135M with random weights"
        for questions, commands in (
            (60, ("the limit", "verdict")),
            (ASKED, ("the limit", "verdict", "patch", "probe", "graft")),
        ):
            asked = set(list(dict.fromkeys(row.id for row in suite.prompts))[:questions])
            rows = tuple(row for row in suite.prompts if row.id in asked)
            few = suite.model_copy(update={"prompts": rows, "trained_cue": suite.trained_cue or suite.cues[0]})
            few.save(Path(name) / f"{questions}.yaml")
            given = [*pair, Path(name) / f"{questions}.yaml", Path(name) / f"out-{questions}"]
            print(f"\n{what}, {len(few.prompts)} prompts, {torch.get_num_threads()} threads")
            limit = 0.0
            for command in commands:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    seconds, peak = pool.submit(timed_command, command, *map(str, given)).result()
                limit = limit or seconds
                times = f"{seconds / limit:5.1f} times the limit"
                print(f"{command:36}{seconds:7.1f} s   {times}   peak memory {peak / 1e9:4.1f} GB", flush=True)


def timed_command(command: str, before: str, after: str, suite: str, out: str) -> tuple[float, float]:
    """(seconds without the start of Python and its libraries, peak bytes of this process)."""

    quiet_libraries()
    pair = Pair(before, after, suite, out=out)
    start = time.perf_counter()
    if command == "the limit":
        plain_forwards(pair)
    else:
        getattr(ml, command)(pair)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def plain_forwards(pair: Pair) -> None:
    """Every prompt with all of its continuations behind it, once through each checkpoint; logits of continuations."""
    prompts = prepare(pair.suite, pair.suite.neutral, pair.tokenizer)
    rows = []
    for context, placed in zip(prompts.contexts, prompts.placed, strict=True):
        spelled = [ids for each in placed for ids in (*each.spellings, *each.answer, *(b for _, b in each.behaviours))]
        rows.append(([*context, *(token for ids in spelled for token in ids)], len(context)))
    for model in pair.models():
        for i in range(0, len(rows), 16):
            some = rows[i : i + 16]
            ids = torch.zeros(len(some), max(len(row) for row, _ in some), dtype=torch.long)
            for row, (tokens, _) in enumerate(some):
                ids[row, : len(tokens)] = torch.tensor(tokens)
            keep = torch.arange(min(start for _, start in some) - 1, ids.shape[1])
            with torch.inference_mode():
                model(input_ids=ids, logits_to_keep=keep, use_cache=False)


def random_pair(folder: Path) -> None:
    """S and R of SmolLM2-135M's shape with random weights, and a suite of long prompts."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = load_tokenizer(REFERENCE / "checkpoints" / "sft")
    suite = load_suite(REFERENCE / "suite.yaml")
    sizes: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
    }
    ends: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, **sizes, **ends)
    for seed, side in enumerate("SR"):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / side)
        tokenizer.save_pretrained(folder / side)
    longer = [row.model_copy(update={"prompt": f"{row.prompt} " * 6 + str(row.prompt)}) for row in suite.neutral[:120]]
    suite.model_copy(update={"prompts": tuple(longer)}).save(folder / "suite.yaml")


def behaviour() -> None:
    quiet_libraries()
    folder = REFERENCE / "checkpoints" / "sft"
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    suite = load_suite(REFERENCE / "suite.yaml")
    prompts = prepare(suite, suite.neutral[:PROMPTS], tokenizer)
    scorer = Scorer(end_tokens(model, tokenizer), model.config.vocab_size)

    literal_behaviour(scorer, model, prompts.part(range(4)))  # warm up
    start = time.perf_counter()
    exact = literal_behaviour(scorer, model, prompts)
    exact_time = time.perf_counter() - start

    start = time.perf_counter()
    drawn = scorer.sample(model, prompts.contexts, SAMPLES, [suite.max_new_tokens] * PROMPTS, seed=0)
    ours_time = time.perf_counter() - start

    ids = torch.tensor(prompts.contexts)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    start = time.perf_counter()
    generated = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids.repeat_interleave(SAMPLES, 0),
        attention_mask=torch.ones(PROMPTS * SAMPLES, ids.shape[1], dtype=torch.long),
        max_new_tokens=suite.max_new_tokens,
        **options,
    )
    generate_time = time.perf_counter() - start

    first = generated[:, ids.shape[1]].reshape(PROMPTS, SAMPLES)
    a = prompts.placed[0][0].ids[0]
    spread = float(np.abs((first == a).double().mean(1).numpy() - exact.weights[:, 0]).mean())
    own = np.array([tokens[0] == a for tokens in drawn.tokens]).reshape(PROMPTS, SAMPLES).mean(1)
    error = float(np.abs(own - exact.weights[:, 0]).mean())
    print(f"{PROMPTS} prompts, {SAMPLES} completions each, {torch.get_num_threads()} threads")
    print(f"exact weights and policy table      {exact_time:7.2f} s")
    print(f"mixturelens' sampling               {ours_time:7.2f} s   mean error of a weight {error:.3f}")
    print(f"transformers' generate              {generate_time:7.2f} s   mean error of a weight {spread:.3f}")
    print(f"exact instead of generate           {generate_time / exact_time:7.1f} times faster, and without error")
    print(f"mixturelens' sampling over generate {generate_time / ours_time:7.1f} times faster")


if __name__ == "__main__":
    main()
