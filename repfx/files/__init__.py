"""Files: models saved and loaded without pickle, and files that are never left half written."""
