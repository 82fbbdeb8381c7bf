"""The stack: the initializers of one run, called in order, and the report of what they did."""
