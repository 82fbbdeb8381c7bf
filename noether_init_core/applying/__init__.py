"""Effects on models: their entries, memory for them, and weights and optimizer state written in place."""
