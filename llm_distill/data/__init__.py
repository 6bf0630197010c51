"""Who wrote the text, how it becomes batches, and what can be wrong with it."""
