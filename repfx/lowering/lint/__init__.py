"""Checks of a Q/DQ file that anybody made, against the rules of a runtime."""
