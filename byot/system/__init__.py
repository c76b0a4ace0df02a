"""What knows nothing of the method: files, checkpoints, processes, flags."""
