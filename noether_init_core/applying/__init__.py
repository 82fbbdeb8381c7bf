"""Effects on models: which entries they have, memory for them, weights and optimizer state written in place."""
