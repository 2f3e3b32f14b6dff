"""``metadist serve``: what a run has learned, over HTTP."""

from __future__ import annotations

import os
from pathlib import Path

import click

from metadist.cli_code import allowed, code_option
from metadist.errors import ClusterError, ConfigError


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 for other machines; give a token then.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--token-file", type=click.Path(path_type=Path), help="Requests must bear what it holds.  [env: METADIST_TOKEN]"
)
@click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that answer.")
@click.option("--max-adapters", type=click.IntRange(min=1), default=1000, show_default=True, help="Kept at a time.")
@click.option("--expire-s", type=click.FloatRange(min=1), default=3600.0, show_default=True, help="Of an adapter.")
@click.option("--max-examples", type=click.IntRange(min=1), default=200, show_default=True, help="Of a request.")
@click.option("--max-bytes", type=click.IntRange(min=1000), default=16 << 20, show_default=True, help="Of a request.")
@click.option("--max-queued", type=click.IntRange(min=1), default=200, show_default=True, help="Requests that wait.")
@click.option(
    "--adapters", type=click.Path(path_type=Path), help="Folder of the adapters.  [default: RUN_DIR/adapters]"
)
@click.option("--checkpoint", default="latest", show_default=True, help="latest, best, or a version.")
@code_option
def serve(
    run_dir: Path,
    host: str,
    port: int,
    token_file: Path | None,
    replicas: int,
    max_adapters: int,
    expire_s: float,
    max_examples: int,
    max_bytes: int,
    max_queued: int,
    adapters: Path | None,
    checkpoint: str,
    allow_code: bool,
) -> None:
    """Serve what a run has learned: adapt to a few examples, ask about others, forget.

    \b
    GET /                      a page to try it on
    GET /health                what is served
    POST /adapters             {"support": [{"class": NAME, "picture": BASE64}, ...]}  ->  {"adapter": ID, ...}
    POST /adapters/ID/predict  {"query": [{"picture": BASE64}, ...]}  ->  {"predictions": [...]}
    DELETE /adapters/ID

    Runs on texts take "text" in place of "picture". Adapters are files, so they outlive the processes that answer.

    \b
    Example:
      metadist serve runs/omniglot --port 8000 --replicas 2
    """
    token = _token(token_file)
    if host not in ("127.0.0.1", "localhost", "::1") and not token:
        raise ConfigError("--host", f"is {host}, open to other machines, and there is no token", "give --token-file")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as e:
        raise ClusterError("metadist serve", f"needs {e.name}", 'run `pip install "metadist[serve]"`') from e
    from metadist.serving.requests import Limits
    from metadist.serving.running import run
    from metadist.serving.server import Settings

    limits = Limits(examples=max_examples, body_bytes=max_bytes)
    settings = Settings(
        run_dir.resolve(), (adapters or run_dir / "adapters").resolve(), checkpoint, token, max_adapters, expire_s,
        limits, bool(allowed(allow_code)),
    )  # fmt: skip
    run(settings, host, port, replicas, max_queued, lambda line: click.echo(line, err=True))


def _token(file: Path | None) -> str:
    if file is None:
        return os.environ.get("METADIST_TOKEN", "").strip()
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError("--token-file", f"{file} cannot be read ({e})", "name a file that holds the token") from None
    if not token:
        raise ConfigError("--token-file", f"{file} is empty", "put the token into it")
    return token
