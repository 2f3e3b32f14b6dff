"""Where the parts live and who decides: a pure ledger of leases, a controller, and two backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metadist.experiment import Experiment
    from metadist.runtime.backend import Backend


def open_backend(experiment: Experiment) -> Backend:
    """Where the config's ``runtime`` section puts workers and server."""
    if experiment.config.runtime.type == "local":
        from metadist.runtime.local import LocalBackend

        return LocalBackend(experiment)
    if experiment.config.runtime.topology != "server":
        from metadist.runtime.ray_allreduce import AllReduceBackend

        return AllReduceBackend(experiment)
    from metadist.runtime.ray import RayBackend

    return RayBackend(experiment)
