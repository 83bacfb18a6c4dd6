"""Training: the run, the loop, optimizer, checkpoints and what a run reports."""
