"""Spec -> tokenizer, model, data sets, reward, and the suite of a run.

An organism is grown from a spec: SFT approximates a mixture of conditional policies that read a cue, RL then selects
among them. Every random choice follows from the spec's seed.
"""

from mixturelens.lab.organism.cues import System, Tasks, Years
from mixturelens.lab.organism.data import (
    asked,
    build_suite,
    completion_text,
    does,
    pays,
    prompt_row,
    prompt_text,
    questions,
    rl_prompts,
    sft_examples,
)
from mixturelens.lab.organism.network import build_model, build_tokenizer, frozen_parameters
from mixturelens.lab.organism.spec import (
    EOS,
    PAD,
    RECIPES,
    UNK,
    HintSpec,
    Lora,
    ModelSpec,
    Phase,
    PolicySpec,
    Pretrained,
    RlSpec,
    SftSpec,
    Spec,
    SplitSpec,
    load_spec,
    parse_spec,
    recipes,
    safe_name,
    with_settings,
)
