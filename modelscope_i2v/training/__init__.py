"""Training: one plain loop, what is learned, from what, and adapters; the small model and its scenes."""
