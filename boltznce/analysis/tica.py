"""Slowest coordinates of a simulation: time-lagged independent components (Pérez-Hernández et al., JCP 139, 015102)."""

from collections.abc import Callable, Sequence

import numpy as np

from boltznce.errors import UserError

__all__ = ["tica_projection"]


def tica_projection(
    trajectories: Sequence[np.ndarray], lag: int, n_components: int = 2
) -> Callable[[np.ndarray], np.ndarray]:
    """Learn the components of trajectories (n_frames, F), ``lag`` frames apart; returns (n, F) -> (n, n_components).

    Raises UserError where deeptime is not installed, and for trajectories no longer than the lag.
    """
    try:
        from deeptime.decomposition import TICA
    except ModuleNotFoundError as error:
        raise UserError(
            'TICA needs deeptime: pip install "boltznce[tica]", or set evaluation.tica_lag=null.'
        ) from error
    long_enough = [np.asarray(each, dtype=np.float64) for each in trajectories if len(each) > 2 * lag]
    if not long_enough:
        raise UserError(
            f"The trajectories are too short for TICA with a lag of {lag} frames: lower evaluation.tica_lag."
        )
    estimator = TICA(lagtime=lag, dim=n_components)
    model = estimator.fit_from_timeseries(long_enough).fetch_model()
    return lambda features: np.asarray(model.transform(np.asarray(features, dtype=np.float64)))[:, :n_components]
