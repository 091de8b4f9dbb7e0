"""The engine process: ONNX Runtime sessions, KV caches, the data path. Started by the agent."""
