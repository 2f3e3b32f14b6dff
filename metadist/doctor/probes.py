"""What is asked of a node, by functions that are sent there as they are: the standard library, and what they import.

A node may lack metadist, or have another one; what needs it fails there, which is an answer too.
"""

from __future__ import annotations

from typing import Any


def versions() -> dict[str, str]:
    """Versions of what a run is made with; ``code`` is a digest of metadist's own files."""
    import hashlib
    import importlib.metadata
    import importlib.util
    import platform
    from pathlib import Path

    found = {"python": platform.python_version()}
    for name in ("torch", "ray", "metadist"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    spec = importlib.util.find_spec("metadist")
    if spec is not None and spec.submodule_search_locations:
        root, digest = Path(list(spec.submodule_search_locations)[0]), hashlib.sha256()
        for file in sorted(p for kind in ("*.py", "*.cpp", "*.h") for p in root.rglob(kind)):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
        found["code"] = digest.hexdigest()[:12]
    return found


def shared_memory() -> dict[str, int]:
    """Bytes of ``/dev/shm``; nothing where there is none."""
    import os

    try:
        there = os.statvfs("/dev/shm")
    except OSError:
        return {"total": 0, "free": 0}
    return {"total": there.f_blocks * there.f_frsize, "free": there.f_bavail * there.f_frsize}


def write(place: str, name: str, text: str) -> dict[str, Any]:
    """Writes a file in a folder or below a URL, and reads it back.

    Args:
        place: which; a folder that is missing is made.
        name: of the file.
        text: what it holds.

    Returns:
        ``error``, what failed, or None; ``made``, the folders that :func:`remove` is to take away again.
    """
    import os
    from pathlib import Path

    made: list[str] = []
    try:
        if "://" in place:
            import fsspec

            files, root = fsspec.core.url_to_fs(place, use_listings_cache=False)
            if "file" in files.protocol or "local" in files.protocol:
                return write(root, name, text)
            files.pipe_file(f"{root}/{name}", text.encode())
            back = files.cat_file(f"{root}/{name}").decode()
        else:
            folder = Path(place)
            made = [str(p) for p in (folder, *folder.parents) if not p.exists()]
            os.makedirs(folder, exist_ok=True)
            (folder / name).write_text(text)
            back = (folder / name).read_text()
    except Exception as e:
        why = getattr(e, "strerror", None) or str(e).strip().split("\n")[0]
        return {"error": f"{type(e).__name__}: {why}", "made": made}
    return {"error": None if back == text else "what was written is not what is read", "made": made}


def remove(place: str, name: str, made: list[str]) -> None:
    """Takes away what :func:`write` has written; it may be gone."""
    import contextlib
    import os

    with contextlib.suppress(Exception):
        if "://" in place:
            import fsspec

            files, root = fsspec.core.url_to_fs(place, use_listings_cache=False)
            files.rm_file(f"{root}/{name}")
        else:
            os.unlink(os.path.join(place, name))
    with contextlib.suppress(OSError):
        for folder in made:
            os.rmdir(folder)


def holds(place: str, name: str, text: str) -> bool:
    """Whether a file is there and holds that."""
    import os

    try:
        if "://" in place:
            import fsspec

            files, root = fsspec.core.url_to_fs(place, use_listings_cache=False)
            return bool(files.cat_file(f"{root}/{name}").decode() == text)
        with open(os.path.join(place, name)) as file:
            return file.read() == text
    except Exception:
        return False


def shards(path: str, left_out: tuple[str, ...]) -> dict[str, Any]:
    """Opens a shard set, which checks its manifest, index and the sizes of its files, and reads a block."""
    from metadist.data import ShardSet
    from metadist.errors import MetadistError

    try:
        found = ShardSet(path, left_out=frozenset(left_out))
        try:
            found.raw(0)
        finally:
            found.close()
    except MetadistError as e:
        return {"error": f"{e.where}: {e.problem}", "mend": e.mend}
    manifest = found.manifest
    size = sum(s.bytes for s in manifest.shards)
    return {"error": None, "content_id": manifest.content_id, "shards": len(manifest.shards), "bytes": size}
