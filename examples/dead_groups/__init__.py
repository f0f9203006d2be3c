"""Do remedies for dead groups pay? They are compared at equal cost: ``dead_groups.md``."""
