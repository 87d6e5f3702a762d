"""A stand-in for a judge's endpoint: it costs nothing, speaks OpenAI's protocol and misbehaves on command."""
