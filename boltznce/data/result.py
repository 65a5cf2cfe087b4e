"""What a simulation says of a state: its free energy, a profile, a surface, and how far parts of it agree."""

import dataclasses

import numpy as np

__all__ = ["SimulationResult"]


@dataclasses.dataclass(frozen=True)
class SimulationResult:
    """Free energies (kT) along a dihedral (rad), with standard errors.

    Attributes:
        delta_f, delta_f_error: -log(P(state) / P(rest)).
        centres: (n_bins,); ``profile``: (n_bins,), minimum 0, NaN where nothing was seen; ``profile_error``: (n_bins,),
            of the difference from the minimum.
        parts: (n_repeats, n_parts), ΔF of each stretch of time of each repeat by itself.
        checks: figures of whether all was visited, by what they are called.
        surface: (n, n), over two coordinates whose names are ``surface_of``, minimum 0, NaN where nothing was seen.
    """

    delta_f: float
    delta_f_error: float
    centres: np.ndarray
    profile: np.ndarray
    profile_error: np.ndarray
    parts: np.ndarray
    checks: dict[str, float] = dataclasses.field(default_factory=dict)
    surface: np.ndarray | None = None
    surface_of: tuple[str, ...] = ()

    def summary(self) -> str:
        """ΔF, how far independent parts of the simulation agree, and the checks."""
        half = self.parts.shape[1] // 2
        halves = ", ".join(f"{row[:half].mean():.2f} and {row[half:].mean():.2f}" for row in self.parts)
        told = "".join(f"; {name}: {value:.3g}" for name, value in self.checks.items())
        return f"ΔF = {self.delta_f:.3f} ± {self.delta_f_error:.3f} kT (halves of each repeat: {halves}{told})"
