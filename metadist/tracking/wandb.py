"""Weights & Biases through its own client; offline where there is no account."""

from __future__ import annotations

import contextlib
import io
import netrc
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from metadist.errors import DataError, TrackingError
from metadist.tracking.base import RunInfo, ShownEpisode, Tracker
from metadist.tracking.wandb_file import has_ended

MODES = ("auto", "online", "offline", "disabled")

_PANELS = {
    "tasks_per_s": "throughput",
    "staleness": "staleness",
    "staleness_max": "staleness",
    "dropped": "staleness",
    "left_out": "staleness",
    "workers": "workers",
    "worker_memory_mb": "workers",
    "releases": "restarts",
}
_MAPPED = {"worker_s": "workers/{}_s", "utilisation": "workers/{}_utilisation", "restarts": "restarts/{}"}
_WRITTEN_S = 10.0  # longest wait for the client to write what it holds of an offline run
_SECRET = re.compile(r"(^|[_.-])(key|keys|token|password|passwd|secret|credentials?)$", re.IGNORECASE)


class WandbTracker(Tracker):
    """Sends a run to Weights & Biases, or keeps it under ``RUN_DIR/wandb`` for ``wandb sync``.

    One run id lasts across resumes. Only the driver writes; code is never uploaded, nothing is printed, and config
    entries named like a secret are masked. Rows carry ``outer_step``, the version, which all charts use. Their names
    fall into panels: ``learning``, ``adaptation`` (the curve by inner steps), ``throughput``, ``time`` (the budget of a
    step), ``staleness``, ``workers``, ``gpus``, ``restarts`` and ``evaluation``.

    In a sweep the run is the one that the agent has announced, in the sweep's project.

    Args:
        mode: ``online``, ``offline``, ``disabled``, or ``auto``: what ``WANDB_MODE`` says, else online where an
            account is set up, else offline.
        project: the project's name.
        entity: user or team; None takes the account's default.
        tags: labels of the run.

    Attributes:
        run_id: the run's id once started; None if disabled.
        mode: what ``auto`` came to, once started.
    """

    def __init__(
        self, mode: str = "auto", project: str = "metadist", entity: str | None = None, tags: tuple[str, ...] = ()
    ) -> None:
        if mode not in MODES:
            raise TrackingError("tracking.wandb.mode", f"is {mode!r}", f"choose one of {', '.join(MODES)}")
        self.mode, self.project, self.entity, self.tags = mode, project, entity, tuple(tags)
        self.run_id: str | None = None
        self._run: Any = None
        self._version = self._sent = 0

    def start(self, run: RunInfo) -> None:
        """Opens the run.

        Raises:
            TrackingError: the client is not installed, there is no account for ``online``, or it refuses.
        """
        self._version, self._metric, self._run_dir = run.start_version, run.metric, run.run_dir
        self._secrets = masked(run.config) != dict(run.config)
        if self.mode == "auto":
            self.mode = automatic_mode()
        elif self.mode == "online" and not has_account():
            raise TrackingError(
                "tracking.wandb.mode", "is online, but no account is set up",
                "run `wandb login`, set WANDB_API_KEY, or take tracking.wandb.mode=offline",
            )  # fmt: skip
        if self.mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            raise TrackingError(
                "tracking.wandb", "the package wandb is not installed",
                "run `pip install wandb`, or set tracking.wandb.mode=disabled",
            ) from error  # fmt: skip
        _forget_service()
        try:
            self._run = self._open(wandb, run)
        except Exception as error:
            raise TrackingError(
                "tracking.wandb", f"cannot be started ({type(error).__name__}: {error})",
                "check the account and the network, or take tracking.wandb.mode=offline",
            ) from error  # fmt: skip
        finally:
            _forget_service()
        self.run_id = self._run.id

    def log(self, version: int, metrics: Mapping[str, Any]) -> None:
        self._version = version
        if version <= self._sent:
            return  # made once more after a loss, with the same numbers
        self._sent = version
        self._send({panel(name): value for name, value in _flat(metrics).items() if name != "version"})

    def log_evaluation(self, version: int, result: Mapping[str, Any]) -> None:
        self._version = version
        split, metric = result.get("split", "test"), result.get("metric", self._metric)
        names = {"mean": metric, "pre_adaptation": f"pre_adaptation_{metric}", "ci95": "ci95", "episodes": "episodes"}
        shown = result.get("by_instance", {})
        instances = {f"evaluation/{split}_accuracy_instance_{n}": v["mean"] for n, v in shown.items()}
        single = {f"evaluation/{split}_{name}": result[key] for key, name in names.items() if key in result}
        curve = {
            f"adaptation/{split}_{name}_step_{k}": value
            for k, found in result.get("by_step", {}).items()
            for name, value in found.items()
        }
        self._send({**single, **instances, **curve})

    def log_picture(self, name: str, path: Path) -> None:
        if self._run is not None:
            import wandb

            self._send({f"pictures/{name}": wandb.Image(str(path))})

    def log_episodes(self, version: int, split: str, episodes: Sequence[ShownEpisode]) -> None:
        if self._run is None or not episodes:
            return
        import wandb
        from PIL import Image

        metric = self._metric
        table = wandb.Table(columns=["episode", "picture", f"{metric} before", f"{metric} after"])
        for shown in episodes:
            picture = wandb.Image(Image.open(io.BytesIO(shown.picture)))
            table.add_data(shown.number, picture, shown.before, shown.after)
        self._version = version
        with self._staged():
            self._send({f"evaluation/{split}_table": table})

    def log_checkpoint(
        self, version: int, files: Mapping[str, Path], aliases: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        if self._run is None:
            return
        import wandb

        made = wandb.Artifact(f"checkpoint-{self.run_id}", type="model", metadata=dict(metadata))
        with self._staged():
            for name, path in files.items():
                # A checkpoint's state holds the config as it is.
                if not (self._secrets and path.suffix == ".json"):
                    made.add_file(str(path), name)
            self._run.log_artifact(made, aliases=list(aliases))

    def alert(self, title: str, text: str) -> None:
        if self._run is not None:
            self._run.alert(title, text, level="WARN")

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        run.summary.update(_flat(summary))
        run.finish(exit_code=exit_code)
        if self.mode == "offline":
            _wait_until_written(Path(run.settings.sync_file))

    def _send(self, row: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.log({**row, "outer_step": self._version})

    @contextlib.contextmanager
    def _staged(self) -> Iterator[None]:
        """Keeps what is to be uploaded with the run, not in the home directory, until it is."""
        name = "WANDB_DATA_DIR"
        if name in os.environ:
            yield
            return
        os.environ[name] = str(self._run_dir.resolve() / "wandb" / "data")
        try:
            yield
        finally:
            del os.environ[name]

    def _open(self, wandb: Any, run: RunInfo) -> Any:
        wanted = {
            "silent": True,
            "console": "off",
            "save_code": False,
            "disable_code": True,
            "x_transaction_log_flush_interval": 1.0,  # a kill loses a second of rows, not all since the last block
            "finish_timeout": 120.0,  # a dead network must not hold a finished run for ever
            "finish_timeout_raises": False,
        }
        settings = {k: v for k, v in wanted.items() if k in wandb.Settings.model_fields}
        if not os.access(run.run_dir, os.W_OK):  # the client would quietly write to the temporary folder
            raise PermissionError(f"{run.run_dir} cannot be written")
        of_sweep = run.wandb_run_id is not None and run.wandb_run_id == sweeps_run()
        opened = wandb.init(
            dir=str(run.run_dir),
            # In a sweep the client takes what the agent has set, and complains of any other.
            id=None if of_sweep else run.wandb_run_id,
            resume="allow",
            mode=self.mode,
            project=None if of_sweep else self.project,
            entity=None if of_sweep else self.entity,
            name=run.run_dir.name if of_sweep else run.name,
            tags=self.tags,
            config={**masked(run.config), "code": dict(run.code), "data": {"content_id": run.content_id}},
            settings=wandb.Settings(**settings),
            reinit="create_new",
        )
        opened.define_metric("outer_step")
        opened.define_metric("*", step_metric="outer_step")
        return opened


def _wait_until_written(file: Path) -> None:
    """Returns once an offline run is whole on the disk; the client's ``finish`` can be some milliseconds early."""
    end = time.monotonic() + _WRITTEN_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, DataError):
            if has_ended(file):
                return
        time.sleep(0.01)


def automatic_mode() -> str:
    """What ``auto`` comes to: ``WANDB_MODE`` if it names a mode, else online where an account is set up."""
    asked = os.environ.get("WANDB_MODE", "").lower()
    asked = {"dryrun": "offline", "run": "online"}.get(asked, asked)
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "disabled"
    if asked in ("offline", "disabled"):
        return asked
    return "online" if has_account() else "offline"


def sweeps_run() -> str | None:
    """The id under which an agent of a sweep expects this process's run; None outside of sweeps."""
    return (os.environ.get("WANDB_RUN_ID") or None) if os.environ.get("WANDB_SWEEP_ID") else None


def has_account() -> bool:
    """Whether credentials for the server are at hand: in the environment or where ``wandb login`` keeps them."""
    return bool(os.environ.get("WANDB_IDENTITY_TOKEN_FILE")) or account_key() is not None


def account_key() -> str | None:
    """The key of the account, of the environment or where ``wandb login`` keeps it; None if there is none."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    host = urlparse(server_url()).hostname or ""
    named = os.environ.get("NETRC")
    files = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if found := netrc.netrc(str(file)).hosts.get(host):
                return found[2]
        except (OSError, netrc.NetrcParseError):
            continue
    return None


def server_url() -> str:
    """Where runs are sent."""
    return (os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").rstrip("/")


def panel(name: str) -> str:
    """A metric's name with the panel it is drawn in, e.g. ``time/step_s``; one with a slash stays as it is."""
    if "/" in name:
        return name
    group = _PANELS.get(name) or ("time" if name.endswith("_s") else "learning")
    return f"{group}/{name}"


def masked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every text under a name like ``api_key`` or ``token`` replaced by stars."""
    return {
        k: masked(v) if isinstance(v, Mapping) else "***" if isinstance(v, str) and _SECRET.search(str(k)) else v
        for k, v in config.items()
    }


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings flattened with slashes, those by worker into panels. What is None is left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in _MAPPED and isinstance(value, Mapping):
            flat.update({_MAPPED[name].format(k): v for k, v in value.items()})
        elif name == "gpu" and isinstance(value, Mapping):
            flat.update({f"gpus/{worker}_{what}": v for worker, told in value.items() for what, v in told.items()})
        elif isinstance(value, Mapping):
            flat.update({f"{name}/{k}": v for k, v in _flat(value).items()})
        elif value is not None:
            flat[name] = value
    return flat


def _forget_service() -> None:
    """Keeps this run's client to itself: a child that inherits these would talk to its parent's service."""
    for name in [n for n in os.environ if n.startswith(("WANDB_SERVICE", "_WANDB"))]:
        del os.environ[name]
