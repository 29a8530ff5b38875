"""Questions about a trained pair, one per file: hypothesis, prediction, control, run."""
