"""One file per family of published layouts; each exports `FORMAT` or `FORMATS` (see `amalgam.precision.format`)."""
