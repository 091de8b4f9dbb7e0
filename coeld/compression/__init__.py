"""Compression: weights in few bits, rows in few bytes, and what that costs. Pure."""
