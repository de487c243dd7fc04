"""One rank: model, optimizer, engine, loop; it reads a run directory and nothing else."""
