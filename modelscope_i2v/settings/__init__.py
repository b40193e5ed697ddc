"""What a user can set: rules, settings, requests and records."""
