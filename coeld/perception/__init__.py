"""Stage 1, perceive: what this device offers, who else is there, what they say. Pure."""
