"""What a graph means: the vocabulary of operators, and views that answer questions about nodes."""
