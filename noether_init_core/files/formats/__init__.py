"""What bytes mean: one module for each format of checkpoints. Nothing here knows where the bytes lie."""
