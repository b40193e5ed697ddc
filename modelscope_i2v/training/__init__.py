"""Training: procedural scenes, losses, one plain loop. It shares the lower floors with the engine."""
