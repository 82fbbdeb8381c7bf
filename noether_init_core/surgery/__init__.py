"""State-dict surgery, pure: rules, steps, the plan, the plan of optimizer state, the way back. Nothing is applied."""
