"""Many inputs: what generate and enhance make of one, of each, in one process or on a cluster."""
