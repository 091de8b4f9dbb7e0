"""This machine: what it has, where files lie, who it is."""
