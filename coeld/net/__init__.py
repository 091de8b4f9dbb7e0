"""Everything that talks: brokers, neighbours, the engine's socket pair, peers."""
