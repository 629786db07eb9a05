"""What runtimes on this machine make of a file: outputs, layers in integers, latency."""
