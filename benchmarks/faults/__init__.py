"""Index runs under fire: a corpus, ways to hurt a run, and what must hold afterwards."""
