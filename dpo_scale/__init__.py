"""Direct Preference Optimization at any scale, on DeepSpeed. Importing the package is cheap: no torch."""

__version__ = "0.2.0"
