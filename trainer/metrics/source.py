"""The source that made a run, in its record: rule 4 of the NanoGPT speedrun's track 3 asks for all of it."""

import gzip
import hashlib
import io
import subprocess
import tarfile
from functools import cache
from pathlib import Path

from common import atomic_write

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 32 * 2**20  # bytes of tracked files
NONE = "not recorded: no checkout of git that can be read"


def keep_source(folder: Path) -> str:
    """Where the source can be had, for the record's header; of a checkout with changes it is written into ``folder``.

    Only tracked files are kept: what git ignores, or has not been told of, may be anything.
    """
    try:
        commit, changes = git("rev-parse", "HEAD").strip(), git("status", "--porcelain", "-uno", "--", ".").strip()
        if not git("ls-files", "--", "train.py"):
            return NONE  # but a folder inside another checkout
        if not changes:
            return f"commit {commit}"
        packed = tracked_files()
    except (OSError, subprocess.SubprocessError):
        return NONE
    if packed is None:
        return f"not recorded: changed since commit {commit}, and its tracked files hold more than {LIMIT >> 20} MiB"
    path = folder / f"source-{hashlib.sha256(packed).hexdigest()[:12]}.tar.gz"
    if not path.exists():
        with atomic_write(path) as file:
            file.write(packed)
    return f"{path.name}, changed since commit {commit}"


@cache  # the jobs of a sweep run what was imported when the first one began
def tracked_files() -> bytes | None:
    """A .tar.gz of the tracked files as they are, the same bytes for the same files; None if they are too large."""
    files = [ROOT / name for name in git("ls-files", "-z").split("\0") if name]
    files = [file for file in files if file.is_symlink() or file.is_file()]  # one that was deleted is a change too
    if sum(file.lstat().st_size for file in files) > LIMIT:
        return None
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for file in files:
            tar.add(file, f"source/{file.relative_to(ROOT)}", recursive=False, filter=_bare)
    return packed.getvalue()


def _bare(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without times and users."""
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def git(*words: str) -> str:
    """Raises OSError or SubprocessError: git is absent, or this is no checkout."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
