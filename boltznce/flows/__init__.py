"""Generators: interpolant flows in Cartesian space and spline flows on internal coordinates, with their likelihoods."""
