"""Small real parts that stand in for large ones. They speak the real protocols."""
