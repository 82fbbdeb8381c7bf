"""The modules that the server of new processes imports once: torch and the core, no plugin."""

from noether_init_core.testing import cases

# the first step of an optimizer imports further parts of torch
cases.new_model("single", seed=0)
