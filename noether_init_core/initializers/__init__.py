"""Base classes of initializers, their configs and sessions, and the restoring of optimizer and callback states.

The kinds are in ``builtin`` and in other distributions.
"""
