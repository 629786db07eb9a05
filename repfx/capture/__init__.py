"""Capture: makes a private copy of a model and traces the parts that can be traced."""
