"""One module per model architecture: what its tensors are called and what its numbers mean."""
