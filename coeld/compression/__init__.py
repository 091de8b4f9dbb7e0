"""Compression: how weights are stored in few bits. Pure: arrays in, arrays out."""
