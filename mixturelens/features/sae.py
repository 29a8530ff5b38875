"""Sparse autoencoders: trained with SAELens, kept in its format, and judged by what is lost.

Importing sae_lens takes 10 s, so only training does. What it trains here is its BatchTopK SAE (Bussmann et al. 2024,
arXiv 2412.06410) with two changes. Of each batch only what is selected is ever touched again, which changes speed
alone. And dead features begin anew at examples that are reconstructed badly (resampling, Bricken et al. 2023), because
on few and repetitive tokens 20 to 45% of the features would never fire. A site that has no use for as many features
still leaves some without any: these are not saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixturelens.features.activations import (
    BATCH_TOKENS,
    Activations,
    At,
    Progress,
    Storage,
    batches,
    collect,
    own_tokens,
)
from mixturelens.features.batchtopk import sparse_class
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effort import Training
from mixturelens.features.record import Quality
from mixturelens.features.saved import load_sae, read_config
from mixturelens.features.splice import BothModels, Spliced, but_sinks, own
from mixturelens.files import read_json
from mixturelens.hooks.lens import Lens
from mixturelens.records import new_folder, write_text
from mixturelens.stats import interval, resample_counts, resampled_mean, share
from mixturelens.types import InputError

RATE = 2e-3
"""Adam's learning rate, for activations whose mean square norm is d."""
WARM_UP = 50
DECAY = 0.2
"""Share of the steps, at the end, in which the rate falls to zero."""
DEAD = 10
"""Batches without firing after which a feature counts as dead in training."""
RESAMPLE = 100
"""Steps between two resamplings."""
RESAMPLED = 0.7
"""Share of the steps in which dead features are resampled; what comes late would not be learnt any more."""
EXAMPLES = 16384
"""Rows among which badly reconstructed ones are looked for."""
RARE = 0.01
"""Of the average feature's rate of firing (k / width): features that are rarer in the end are as good as dead."""
COUNTED = 1 << 17
"""Rows on which that is counted."""
SAVES = 8
"""Checkpoints a training: what a kill can cost is an eighth of it."""
LOGITS = 256 << 20
"""Bytes of logits of one batch, when losses are measured."""
LEAST = 0.05
"""Nats by which the mean in a site's place must surely hurt, for a share of that loss to mean anything."""


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What an SAE's activations are of, as SAELens says it in its metadata."""

    site_name: str
    """`blocks.1.hook_resid_pre`, ..."""
    model_name: str | None = None


def train_sae(
    activations: Activations,
    folder: Path,
    origin: Origin,
    training: Training | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train an SAE of `training.width` features, of which k fire on an average token, and return its folder.

    Features that in the end fire less than RARE of what is usual are left out, so there may be fewer.

    It reads the first model's activations. They are scaled to a mean square norm of d, and the scale is folded back, so
    that the saved SAE takes activations as they are. `origin` is kept in its metadata. The folder is what
    `sae_lens.SAE.load_from_disk` reads.

    The folder is whole or absent. A training that was killed goes on from its last checkpoint, and ends with the same
    weights to the bit; one that is done is not done again. Raises InputError if the folder holds another SAE, or for
    sizes that make no sense.
    """
    training = training or Training()
    width = training.width or 2 * activations.dim
    training = replace(training, width=width)
    k, steps, batch, seed = training.k, training.steps, training.batch, training.seed
    if not 0 < k <= width or steps < 1 or batch < 1:
        raise InputError(f"an SAE needs 0 < k <= width, steps and rows: k {k:g}, {width}, {steps}, {batch} were given")
    made = {
        "activations": activations.digest,
        "site": origin.site_name,
        "width": width,
        "k": float(k),
        "steps": steps,
        "batch": batch,
        "seed": seed,
    }
    work = folder.parent / f".{folder.name}.training"
    if folder.exists():
        shutil.rmtree(work, ignore_errors=True)  # of a start that was killed when it had written the folder
        if read_config(folder).get("metadata", {}).get("mixturelens") != made:
            raise InputError(f"{folder} holds another SAE (other activations, site or settings); give another folder")
        return folder
    metadata = {"hook_name": origin.site_name, "model_name": origin.model_name, "mixturelens": made}
    trainer = make_trainer(activations, training, metadata)
    _start_at_examples(trainer, activations, seed)
    for step in range(_resume(trainer, work, made), steps):
        output = trainer.step(activations.batch(step, batch, seed)[:, 0])
        trainer.n_training_steps += 1
        if trainer.n_training_steps % RESAMPLE == 0 and trainer.n_training_steps <= RESAMPLED * steps:
            _resample(trainer, activations, seed)
        if trainer.n_training_steps % max(1, -(-steps // SAVES)) == 0 and trainer.n_training_steps < steps:
            _save(trainer, work, made)
        if not bool(torch.isfinite(output.loss)):
            raise InputError(f"{origin.site_name}: the loss is not finite at step {step}; are the activations?")
        if progress:
            progress(step + 1, steps)
    trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    with new_folder(folder) as temporary:
        trainer.sae.save_inference_model(temporary)
        fires = _firing(load_sae(temporary), activations) >= RARE * k / width
        if not fires.all():
            _leave_out(trainer.sae, ~fires)
            trainer.sae.save_inference_model(temporary)
    shutil.rmtree(work, ignore_errors=True)
    return folder


def make_trainer(
    activations: Activations,
    training: Training,
    metadata: dict[str, Any] | None = None,
    sparse: bool = True,
) -> Any:
    """SAELens' trainer of a BatchTopK SAE; with `sparse` False, one that SAELens would train by itself.

    Its first weights do not depend on the seed of `training`, whose width must be given. `metadata` is saved with it.
    """
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    config = BatchTopKTrainingSAEConfig(
        d_in=activations.dim,
        d_sae=training.width or 2 * activations.dim,
        k=training.k,
        dtype="float32",
        device="cpu",
        normalize_activations="expected_average_only_in",  # by the trainer's own scaler, which we tell the scale
        aux_loss_coefficient=0.0,  # dead features are resampled instead
        metadata=SAEMetadata(**(metadata or {})),
    )
    steps, batch = training.steps, training.batch
    options = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=RATE,
        lr_end=RATE / 10,
        lr_warm_up_steps=min(WARM_UP, steps // 4),
        lr_decay_steps=int(DECAY * steps),
        dead_feature_window=DEAD,
        logger=LoggingConfig(log_to_wandb=False),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # its first weights are drawn from the global generator
        sae = (sparse_class() if sparse else BatchTopKTrainingSAE)(config)
    stream = (activations.batch(step, batch, seed=0)[:, 0] for step in range(steps))
    trainer: Any = SAETrainer(options, sae, stream)
    trainer.activation_scaler.scaling_factor = float(activations.scale[0])
    return trainer


@torch.no_grad()
def _start_at_examples(trainer: Any, activations: Activations, seed: int) -> None:
    """Bias at the mean, and every feature at a row of its own, less the mean."""
    sae, scale = trainer.sae, trainer.activation_scaler.scaling_factor
    sae.b_dec.copy_(activations.mean[0] * scale)
    generator = torch.Generator().manual_seed(seed)
    some = activations.rows(torch.randint(len(activations), (len(sae.W_dec),), generator=generator))[:, 0] * scale
    directions = torch.nn.functional.normalize(some - sae.b_dec, dim=1)
    # a row that is the mean itself gives no direction; what was there is as good as any
    directions = torch.where(directions.any(1, keepdim=True), directions, torch.nn.functional.normalize(sae.W_dec))
    sae.W_dec.copy_(directions * sae.cfg.decoder_init_norm)
    sae.W_enc.copy_(sae.W_dec.T)


@torch.no_grad()
def _resample(trainer: Any, activations: Activations, seed: int) -> None:
    """Features that do not fire any more take over what is reconstructed worst: rows drawn by their squared error."""
    dead = trainer.dead_neurons.nonzero()[:, 0]
    if not len(dead):
        return
    sae, step = trainer.sae, trainer.n_training_steps
    some = activations.batch(step, max(EXAMPLES, len(dead)), seed + 1)[:, 0] * trainer.activation_scaler.scaling_factor
    error = some - sae.reconstruct(some)[0]
    generator = torch.Generator().manual_seed(seed + step)
    weights = error.square().sum(1).clamp(min=1e-20)  # so that there is something to draw, were all of them 0
    drawn = error[torch.multinomial(weights, len(dead), generator=generator)]
    directions = torch.nn.functional.normalize(drawn, dim=1)
    live = ~trainer.dead_neurons
    like = live if live.any() else ~live
    sae.W_dec[dead] = directions * sae.W_dec[like].norm(dim=1).mean()
    sae.W_enc[:, dead] = directions.T * sae.W_enc[:, like].norm(dim=0).mean()
    sae.b_enc[dead] = 0
    for parameter in (sae.W_dec, sae.b_enc, sae.W_enc):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = trainer.optimizer.state[parameter][name]
            (moment.T if parameter is sae.W_enc else moment)[dead] = 0
    trainer.n_forward_passes_since_fired[dead] = 0


def _firing(dictionary: Dictionary, activations: Activations) -> Float[Tensor, " feature"]:
    """Share of (at most COUNTED) rows on which each feature fires."""
    rows = torch.arange(0, len(activations), -(-len(activations) // COUNTED))
    fired = torch.zeros(len(dictionary))
    for some in rows.split(EXAMPLES):
        fired += (dictionary.encode(activations.rows(some)[:, 0]) > 0).sum(0)
    return fired / len(rows)


@torch.no_grad()
def _leave_out(sae: Any, without: Bool[Tensor, " feature"]) -> None:
    sae.W_enc = torch.nn.Parameter(sae.W_enc[:, ~without].contiguous())
    sae.W_dec, sae.b_enc = (torch.nn.Parameter(each[~without]) for each in (sae.W_dec, sae.b_enc))
    sae.cfg.d_sae = len(sae.b_enc)


def _save(trainer: Any, work: Path, made: dict[str, Any]) -> None:
    """A checkpoint counts once `progress.json` lies in it, which is written last; then the one before it goes."""
    name = f"step-{trainer.n_training_steps}"
    trainer.save_checkpoint(name, base_path=work)
    write_text(work / name / "progress.json", json.dumps(made))
    for other in work.iterdir():
        if other.name != name:
            shutil.rmtree(other)


def _resume(trainer: Any, work: Path, made: dict[str, Any]) -> int:
    """Load the latest whole checkpoint of this very training, and say how many steps it has taken; remove others."""
    found = {}
    for folder in work.glob("step-*"):
        file = folder / "progress.json"
        if file.is_file() and read_json(file, "is gone", foreign=True) == made:
            found[int(folder.name.split("-")[1])] = folder
        else:
            shutil.rmtree(folder)
    if not found:
        return 0
    trainer.sae.load_weights_from_checkpoint(found[max(found)])
    trainer.load_trainer_state(found[max(found)])
    return trainer.n_training_steps


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgingTexts:
    """Texts that a dictionary is judged on: each a prompt with a completion behind it, as token ids."""

    texts: Sequence[Sequence[int]]
    prompt_lengths: Sequence[int]
    """Tokens of each text's prompt."""
    seed: int = 0
    """Of the bootstrap over texts."""


@torch.no_grad()
def quality(
    lens: Lens,
    dictionary: Dictionary,
    at: At,
    judging: JudgingTexts,
    activations: Float[Tensor, "row d"] | None = None,
) -> Quality:
    """Judge a dictionary on texts, at best ones that it was not trained on.

    Loss is taken over what follows each text's prompt; the reconstruction takes the place of the activation at all
    tokens but sinks of attention. What is explained and what fires is counted over all tokens of the texts, or over
    `activations` where these are at hand, which may be of more texts. The interval is a bootstrap over texts, each
    counted equally; it is not measured where the mean in the site's place does no harm. Raises InputError for a
    dictionary of another width, one that does not reconstruct, texts without a completion, or a site where nothing
    varies.
    """
    if dictionary.bias is None:
        raise InputError("the dictionary has no bias: it is not meant to reconstruct, so nothing says what is lost")
    texts, lengths = judging.texts, judging.prompt_lengths
    if len(texts) < 2 or any(not 0 < n < len(text) for n, text in zip(lengths, texts, strict=True)):
        raise InputError("quality needs two texts at least, each a prompt with a completion behind it")
    x = collect([lens], texts, at, Storage(memory=1 << 62)).parts[0][:, 0] if activations is None else activations
    if x.shape[-1] != (d := dictionary.read.shape[1]):
        raise InputError(f"the dictionary reads {d} dimensions, and the site has {x.shape[-1]}")
    mean = x.double().mean(0)
    variance = float((x.double() - mean).square().sum())
    if not variance > 1e-9 * float(x.double().square().sum()):
        raise InputError(f"L{at[0]}.{at[1]} is the same on every token: there is no variance to explain")
    dictionary = dictionary.to(lens.device)
    fired = torch.zeros(len(dictionary), dtype=torch.double, device=lens.device)
    error = 0.0
    for part in x.split(BATCH_TOKENS):
        part = part.to(lens.device)
        f = dictionary.encode(part)
        error += float((part - dictionary.decode(f, part)).double().square().sum())
        fired += (f != 0).sum(0)
    middle = mean.float().to(lens.device)

    def reconstructed(mine: Tensor, _: Tensor) -> Tensor:
        return dictionary.decode(dictionary.encode(mine), mine).to(mine.dtype)

    def ablated(mine: Tensor, _: Tensor) -> Tensor:
        return middle.to(mine.dtype).expand_as(mine)

    ground = BothModels(lens, lens, at, [text[:n] for text, n in zip(texts, lengths, strict=True)])
    counts = resample_counts(len(texts), judging.seed)
    plain, kept, lost = (
        resampled_mean(completion_losses(Spliced(ground, splice), judging, lens), counts)
        for splice in (own, but_sinks(reconstructed), but_sinks(ablated))
    )
    return Quality(
        explained=1 - error / variance,
        active=float(fired.sum()) / len(x),
        dead=float((fired == 0).double().mean()),
        loss_recovered=interval(share(lost - kept, lost - plain, LEAST), counts),
        tokens=len(x),
    )


@torch.no_grad()
def completion_losses(model: Callable[..., Any], judging: JudgingTexts, lens: Lens) -> Float[np.ndarray, " text"]:
    """Mean negative log-probability (nats) of a token behind each text's prompt, under what is called like a model."""
    texts, prompt_lengths = judging.texts, judging.prompt_lengths
    losses = np.zeros(len(texts))
    vocabulary = lens.model.config.get_text_config().vocab_size
    order = sorted(range(len(texts)), key=lambda i: prompt_lengths[i])
    behind = max(len(text) - n for text, n in zip(texts, prompt_lengths, strict=True))
    step = max(1, min(BATCH_TOKENS // max(map(len, texts)), LOGITS // (4 * vocabulary * behind)))
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        (some, batch), *_ = batches([texts[i] for i in rows], lens.device, 1 << 62)
        rows = [rows[i] for i in some]
        first = min(prompt_lengths[i] for i in rows)
        columns = torch.arange(first - 1, batch.ids.shape[1] - 1, device=batch.ids.device)
        logits = model(input_ids=batch.ids, logits_to_keep=columns, use_cache=False).logits
        target = own_tokens(batch, [len(texts[i]) for i in rows]) & ~own_tokens(
            batch, [prompt_lengths[i] for i in rows]
        )
        target = target[:, first:]  # the logits at a token are those of the next one
        wanted = batch.ids[:, first:][target]
        values = torch.nn.functional.cross_entropy(logits[target].double(), wanted, reduction="none")
        sums = values.new_zeros(len(rows)).index_add_(0, target.nonzero()[:, 0], values)
        losses[rows] = (sums / target.sum(1)).cpu().numpy()
    return losses
