"""Ground floor: foreign JSON, files, locks, threads and the time. Knows nothing of models."""
