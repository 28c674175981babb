"""Keys of a config.json that several families read alike → blocks and layers. Must never know: single families."""
