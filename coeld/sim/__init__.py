"""A whole swarm in one process and in virtual time: proof of the decision core, and `coeld sim`."""
