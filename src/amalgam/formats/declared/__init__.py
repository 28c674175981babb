"""What a checkpoint's `quantization_config` declares, whichever tool has written it."""
