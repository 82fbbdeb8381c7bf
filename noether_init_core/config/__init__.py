"""Configs: the pydantic models that kinds derive theirs from, and config files as they were written.

``base`` is what initializers build on; ``document`` knows places and lines, and no kind.
"""
