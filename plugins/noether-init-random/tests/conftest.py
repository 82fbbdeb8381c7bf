"""The fixtures of the conformance kit."""

pytest_plugins = ["noether_init_core.testing"]
