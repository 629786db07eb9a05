"""What a graph means: the vocabulary of operators, and every question about a node."""
