"""Memory: how much a generation takes, where the networks are, and what happens when it runs out."""
