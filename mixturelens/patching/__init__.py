"""Activation patching, path patching and attribution: which sites and edges carry cue, hint and policy."""
