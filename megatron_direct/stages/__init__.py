"""What each sub-command does, stage by stage: read, compute on all ranks, write to the run."""
