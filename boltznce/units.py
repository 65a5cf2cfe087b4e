"""Constants in the units of the project: nm, ps, amu, kJ/mol, K."""

GAS_CONSTANT = 0.00831446261815324  # kJ/mol/K, exact (SI of 2019)
