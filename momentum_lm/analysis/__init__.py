"""Functions on arrays and tensors: no models, no files, nothing else of this package."""
