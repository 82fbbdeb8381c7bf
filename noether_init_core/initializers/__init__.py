"""Base classes of initializers with their configs, the session, and how optimizer and callback states are restored.

The kinds themselves live in ``builtin`` and in other distributions.
"""
