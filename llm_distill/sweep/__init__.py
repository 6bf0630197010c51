"""Settings by search: what may be tried (`space`), the trials in a file (`study`), what mattered (`report`)."""
