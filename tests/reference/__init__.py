"""Slow, obvious truths to compare coeld with, and tiny files to feed it."""
