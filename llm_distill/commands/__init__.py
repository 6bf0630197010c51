"""The commands of `llm-distill`, one module each. Each takes the arguments that follow its name."""
