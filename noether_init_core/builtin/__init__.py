"""The kinds that the core's own distribution registers, and nothing else; nobody imports them but entry points."""
