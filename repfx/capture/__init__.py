"""Capture: any model becomes a private copy whose traceable parts are graphs."""
