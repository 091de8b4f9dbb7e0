"""Stage 4, update: from what is held to what was won, without interrupting an answer. Pure."""
