"""Configs: the pydantic models that kinds derive theirs from, config files as they were written, transforms, schema.

``base`` is what initializers build on; ``document`` knows places and lines, and Noether's resolved config.
"""
