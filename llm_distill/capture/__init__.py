"""The teacher runs once: its signals are stored, and held against what it would say itself."""
