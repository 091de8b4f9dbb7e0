"""The local socket: HTTP with OpenAI's protocol, and /status."""
