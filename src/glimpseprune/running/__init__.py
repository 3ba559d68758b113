"""How a run runs: strategies, checkpoints, SLURM, what a run folder receives, and what watches over it."""
