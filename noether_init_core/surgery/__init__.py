"""State-dict surgery: rules, steps, the plan, the plan of optimizer state, and the inverse. Pure: changes no model."""
