"""The classes that ModelScope sees: models, preprocessors and pipelines, and their registration."""
