"""Files from the Hugging Face Hub (optional extra ``hub``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stalign._settings import settings
from stalign.models._folder import CONFIG, GENES, WEIGHTS


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "Files from the Hub need the extra `hub`: `pip install 'stalign[hub]'`. "
            "A local folder or file works without."
        ) from error
    return huggingface_hub


def download(
    repo: str, file: str, *, revision: str | None = None, local_files_only: bool | None = None, hint: str = ""
) -> Path:
    """Fetch one file into ``settings.cache_dir`` and return its path.

    Raises
    ------
    PermissionError
        If the repository is gated and access was not granted.
    FileNotFoundError
        If the file is neither in the cache nor reachable.
    """
    hub = _hub()
    from huggingface_hub import errors

    try:
        return Path(
            hub.hf_hub_download(
                repo,
                file,
                revision=revision,
                cache_dir=settings.cache_dir / "hub",
                local_files_only=bool(local_files_only),
            )
        )
    except errors.GatedRepoError as error:
        raise PermissionError(_gated(repo, file)) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        # LocalEntryNotFoundError is one of these: nothing cached, and no network or none wanted.
        offline = isinstance(error, errors.LocalEntryNotFoundError)
        raise FileNotFoundError(
            (
                f"{repo}/{file} is not in the cache {settings.cache_dir / 'hub'} and could not be fetched "
                f"({'local_files_only=True' if local_files_only else 'no connection'}). Fetch it once where there is a "
                f"network, or pass a local path.{hint}"
            )
            if offline
            else f"{repo}/{file} (revision {revision or 'main'}) does not exist on the Hub, or is private.{hint}"
        ) from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{repo}/{file} could not be fetched from the Hub: {error}.{hint}") from error


def _gated(repo: str, file: str) -> str:
    return (
        f"{repo} is gated, and this machine has no access to it. Do one of these: "
        f"(1) accept its licence on https://huggingface.co/{repo}, then (2) log in with `hf auth login` "
        f"(or set HF_TOKEN) and call again; or (3) get {file} elsewhere and pass its local path: "
        f"weights='path/to/{file}'."
    )


def gated_steps(repo: str, file: str) -> str:
    """Return the three steps that solve missing access."""
    return _gated(repo, file)


def commit_of(path: Path) -> str:
    """Commit of a file in the Hub's cache: the folder under ``snapshots``."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


def fetch_model(repo: str, *, revision: str | None, local_files_only: bool | None) -> tuple[Path, str]:
    """Fetch the files of a model folder; returns the folder and the commit."""
    paths = [
        download(repo, file, revision=revision, local_files_only=local_files_only) for file in (CONFIG, GENES, WEIGHTS)
    ]
    return paths[0].parent, commit_of(paths[0]) or (revision or "main")
