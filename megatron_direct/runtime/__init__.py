"""What every room stands on: ranks, devices, files, digests and the run directory."""
