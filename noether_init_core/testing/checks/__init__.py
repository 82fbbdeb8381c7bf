"""The checks of the kit, one module for each thing that a user relies on; no check knows a kind."""
