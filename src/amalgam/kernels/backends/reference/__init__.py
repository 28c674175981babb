"""Plain torch on any device: the specification, instruction by instruction."""
