pytest_plugins = ["noether_init_core.testing"]
