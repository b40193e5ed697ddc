"""A stage without ModelScope: its parts, its generation, its memory and its progress."""
