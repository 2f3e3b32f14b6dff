"""Asks what `metadist serve` serves: shows it a few labelled pictures, and asks about others.

Example: python tools/examples/ask.py http://127.0.0.1:8000 mine/known mine/unknown
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import urllib.request
from pathlib import Path
from typing import Any

KINDS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def ask(url: str, body: dict[str, Any], token: str) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as reply:
        return dict(json.load(reply))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("url", help="of the server, http://HOST:PORT")
    parser.add_argument("known", type=Path, help="a folder with a folder of pictures for each class")
    parser.add_argument("unknown", type=Path, help="a folder of pictures")
    parser.add_argument("--token", default=os.environ.get("METADIST_TOKEN", ""), help="[env: METADIST_TOKEN]")
    options = parser.parse_args()
    support = [{"class": path.parent.name, "picture": encoded(path)} for path in pictures(options.known)]
    adapter = ask(f"{options.url}/adapters", {"support": support}, options.token)
    print(f"adapter {adapter['adapter']}, until {adapter['expires']}")
    asked = pictures(options.unknown)
    query = [{"picture": encoded(path)} for path in asked]
    told = ask(f"{options.url}/adapters/{adapter['adapter']}/predict", {"query": query}, options.token)
    for path, answer in zip(asked, told["predictions"], strict=True):
        name = answer["class"]
        print(f"{path.relative_to(options.unknown)}: {name} ({answer['probabilities'][name]:.1%})")


if __name__ == "__main__":
    main()
