"""Who writes: one interface, and behind it transformers, vLLM, or an endpoint."""
