"""Who writes for a student in training: transformers or vLLM, by its weights as they are."""
