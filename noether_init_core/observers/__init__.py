"""Observers: plain objects with pluggy wrappers around the five hooks, switched on by name, never by being installed.

Here live the observers of this distribution, one module each; ``kinds`` finds those of all distributions. An observer
sees what an initializer does and says it; it decides nothing about files or keys.
"""
