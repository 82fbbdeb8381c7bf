"""The stack: calls the initializers of one run in order, and reports what they did."""
