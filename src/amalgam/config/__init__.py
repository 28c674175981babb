"""Every setting, as frozen pydantic models: a module for each section (`server.port` is in `server`), which `settings`
puts together; `reading` makes them of YAML, variables and flags.
"""
