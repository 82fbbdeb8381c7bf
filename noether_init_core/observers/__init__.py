"""Observers of this distribution: objects with pluggy wrappers around the five hooks, enabled by name in the config.

Each observer has a module; ``kinds`` finds those of all distributions. Installing an observer does not enable it. An
observer reports what an initializer does; it does not decide about files or keys.
"""
