"""The engine: token ids in; tokens, logprobs or vectors out. It knows nothing of HTTP."""
