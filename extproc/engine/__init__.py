"""A simulated OpenAI-compatible inference server that behaves like vLLM V1: a pure model, HTTP around it."""
