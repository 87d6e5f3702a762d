"""The OpenAI-compatible door for agents: routes each run to its version and records the call by itself."""
