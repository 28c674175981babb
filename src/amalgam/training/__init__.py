"""Models that learn from another one: what is trained, by which loss, step by step, so that a killed run goes on."""
