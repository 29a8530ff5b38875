"""Spec -> tokenizer and untrained network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixturelens.lab.organism.spec import EOS, PAD, UNK, Freezable, Pretrained, Spec
from mixturelens.types import InputError, loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


LAYERS, LARGEST, NUMBERS = 200, 1_000_000, 500_000_000
"""Of a network that is grown from nothing, at most: layers, any one size, and parameters with tables."""


def build_tokenizer(spec: Spec, beside: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one word, one token. Tags and policy words are ordinary vocabulary.

    `beside`: words that the spec does not name.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    surface = [word for text in spec.surface_texts() for word in text.split()]
    words = dict.fromkeys([PAD, EOS, UNK, *surface, *spec.questions.words, *beside])
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=EOS, unk_token=UNK)


def build_model(spec: Spec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The untrained network of the spec, in fp32, from the spec's seed.

    Raises InputError for sizes that make no network, or one that is larger than any that is grown from nothing.
    """
    import torch
    import transformers

    network = spec.model
    if isinstance(network, Pretrained):
        raise InputError(f"model.pretrained: {network.pretrained} is there, and not built")
    with loading("model.config", f"transformers has no config class {network.config!r}"):
        config_class = getattr(transformers, network.config, None)
        known = config_class() if isinstance(config_class, type) else None
    if config_class is None or not isinstance(known, transformers.PretrainedConfig):
        raise InputError(f"model.config: transformers has no config class {network.config!r}")
    for key, value in network.sizes.items():
        if not hasattr(known, key) or callable(getattr(known, key)):
            raise InputError(f"model.sizes: {network.config} has no setting {key!r}")
        if isinstance(value, int) and not 0 <= value <= LARGEST:
            raise InputError(f"model.sizes.{key}: {value} is not from 0 to {LARGEST}")
    with loading("model", f"{network.config} makes no network of these sizes"):
        config = config_class(
            **{
                "tie_word_embeddings": False,
                **network.sizes,
                "vocab_size": len(tokenizer),
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "bos_token_id": None,
            }
        )
        layers = config.get_text_config().num_hidden_layers
        if not 1 <= layers <= LAYERS:
            raise InputError(f"model.sizes: {layers} layers; give 1 to {LAYERS}")
        with torch.device("meta"):
            outline = transformers.AutoModelForCausalLM.from_config(config)
        numbers = sum(tensor.numel() for tensor in (*outline.parameters(), *outline.buffers()))
        if numbers > NUMBERS:
            raise InputError(
                f"model.sizes: make a network of {numbers} numbers, and {NUMBERS} are the most; lower them, or give "
                "model.pretrained"
            )
        torch.manual_seed(spec.seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def frozen_parameters(model: PreTrainedModel, groups: tuple[Freezable, ...]) -> list[str]:
    """Names of the parameters in the named groups, whatever the architecture calls them."""
    from torch import nn

    unembedding = model.get_output_embeddings()
    names = []
    for module_name, module in model.named_modules():
        group: Freezable | None = None
        if module is unembedding:
            group = "unembedding"
        elif isinstance(module, nn.Embedding):
            group = "embeddings"
        elif "norm" in type(module).__name__.lower():
            group = "norms"
        if group in groups:
            names += [f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return names
