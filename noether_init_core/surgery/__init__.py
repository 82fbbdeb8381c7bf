"""State-dict surgery: rules, the plan (pure), its application (the only place that writes weights), optimizer state."""
