"""Models on disk: catalogue, import, store. Nothing here runs a model."""
