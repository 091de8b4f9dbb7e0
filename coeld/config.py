"""The configuration: one frozen tree that explains itself. Pure.

Every key has its default, range and unit beside it; `agent.toml.example` is generated from this
file. Unknown keys and values out of range are errors that name the key, the value and what is
allowed. Nothing else reads the environment for settings.
"""
