"""What leaves this machine: a student with its card, datasets of signals and texts, other programs' formats."""
