"""Reference data: simulation with OpenMM or torch, trajectories made elsewhere, the dataset on disk, padded batches."""
