"""The networks of I2VGen-XL. They know nothing of samplers, files or ModelScope."""
