"""A job of SLURM that SIGUSR1 tells of its end asks to be queued again: the same command goes on where it was."""

import os
import signal
import subprocess

__all__ = ["requeued"]


def requeued(number: int) -> str | None:
    """Ask SLURM to queue this job again, if it is one and the signal is SIGUSR1; what came of it, in a sentence.

    SIGTERM asks for nothing: it comes with scancel too, and where it comes with a pre-emption SLURM queues the job
    again by itself.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or number != getattr(signal, "SIGUSR1", None):
        return None
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"SLURM did not queue job {job} again ({error}): submit it anew."
    return f"SLURM has queued job {job} again."
