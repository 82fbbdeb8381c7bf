"""What a server of processes imports once: torch and the core, no plugin."""

from noether_init_core.testing import cases

# the first step of an optimizer imports a good part of torch
cases.new_model("single", seed=0)
