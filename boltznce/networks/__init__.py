"""Plain modules (x, t, features) -> velocity or energy, one architecture a file; they know no flow and no system."""
