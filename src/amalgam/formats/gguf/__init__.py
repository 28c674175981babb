"""What a GGUF file's metadata and tensor names mean."""
