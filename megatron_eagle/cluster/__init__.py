"""All that speaks to Slurm: submits chains of stages, judges how each attempt ended, reports, checks nodes."""
