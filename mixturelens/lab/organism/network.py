"""Spec -> tokenizer and untrained network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixturelens.lab.organism.spec import EOS, PAD, UNK, Freezable, Pretrained, Spec
from mixturelens.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


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
    """The untrained network of the spec, in fp32, from the spec's seed. Raises InputError for an unknown size."""
    import torch
    import transformers

    network = spec.model
    if isinstance(network, Pretrained):
        raise InputError(f"model.pretrained: {network.pretrained} is there, and not built")
    config_class = getattr(transformers, network.config, None)
    if not (isinstance(config_class, type) and issubclass(config_class, transformers.PretrainedConfig)):
        raise InputError(f"model.config: transformers has no config class {network.config!r}")
    known = config_class()
    for key in network.sizes:
        if not hasattr(known, key):
            raise InputError(f"model.sizes: {network.config} has no setting {key!r}")
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
    torch.manual_seed(spec.seed)
    try:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise InputError(f"model: {network.config} with these sizes: {error}") from None


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
