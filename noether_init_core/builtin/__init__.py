"""The kinds that the core registers. They are imported through their entry points only."""
