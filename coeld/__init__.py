"""coeld: the small computers you own, as one machine that runs a language model."""

__version__ = "0.1.0"
