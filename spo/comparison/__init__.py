"""From run directories to a verdict: which method is better, by how much, and how sure that is."""
