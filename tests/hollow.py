"""Checkpoints of any size that take no room: a config, and weights of which only the header was ever written."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def hollow(folder: Path) -> None:
    """Write the weights of a folder's config as a header, in bfloat16, and a hole."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        size = 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
