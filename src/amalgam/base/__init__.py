"""Ground floor: files, locks, threads and the time. Knows nothing of models."""
