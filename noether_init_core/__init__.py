"""noether-init."""
