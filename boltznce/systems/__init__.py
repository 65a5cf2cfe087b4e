"""What is sampled: molecules, peptides and systems in the plane, each with a reduced energy u(x) = U(x) / kT."""
