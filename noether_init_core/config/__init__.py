"""Configs: pydantic base models for kinds, config files as written, transforms, and the JSON schema.

``base`` is for initializers; ``document`` keeps places and lines, and knows Noether's resolved config.
"""
