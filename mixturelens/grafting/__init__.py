"""Change it: weights of one checkpoint in the other, component by component."""
