"""Ground floor: what somebody else wrote, files, locks, threads and the time. Knows nothing of models."""
