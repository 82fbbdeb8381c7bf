"""Configs: the pydantic models of kinds, the open ``AnyInitializer``, and files of config.

``base`` is a leaf that initializers build on; ``any_initializer`` and ``files`` stand above the kinds.
"""
