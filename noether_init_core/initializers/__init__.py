"""Base classes of initializers. The kinds themselves live in ``builtin`` and in other distributions."""
