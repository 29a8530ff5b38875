"""Read it: what linear probes find where, what erasing it does, and the subspace that carries it."""
