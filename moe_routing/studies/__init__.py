"""What a study of runs says."""
