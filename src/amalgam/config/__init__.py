"""Every setting, as frozen pydantic models: `settings` holds them, the rest reads YAML, variables and flags."""
