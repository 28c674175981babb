"""One file per model family; each exports `FAMILY` (see `amalgam.models.spec`)."""
