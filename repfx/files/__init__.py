"""Files: models saved and loaded without pickle, and files that appear whole or not at all."""
