"""Where nobody knows cue and policies: from completions of S and R on a user's own prompts to a proposed suite."""
