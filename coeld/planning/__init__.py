"""Before anything is installed: does a model fit, how fast will it answer, and why."""
