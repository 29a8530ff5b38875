"""The laboratory: it grows organisms whose truth is known, and holds the instruments against them; core never does."""
