"""Serves small Hugging Face checkpoints over the OpenAI chat API, several versions at once, with exact token ids."""
