"""What weighted samples say: free energies with uncertainties, quality of the weights, distances, figures."""
