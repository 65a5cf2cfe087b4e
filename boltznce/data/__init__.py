"""Reference data: simulation with OpenMM or torch, the dataset on disk, batches of many molecules."""
