"""Where a target wants its quantizers, and in which numbers."""
