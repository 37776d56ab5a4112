"""Text out of Python packages: a corpus that anyone can build again.

    python tools/pypi_text.py --output-dir build/package-text

Wheels are fetched with pip, at the versions that tools/pypi_packages.txt lists; nothing in them is
run. Each package belongs to one part (pretrain, pool, valid, test) as a whole, so that no package
is both learnt from and tested on. Domains, as ``PART/DOMAIN.jsonl.gz``:

    prose    docstrings, descriptions, and files .rst, .md and .txt
    python   code without its docstrings and comments
    stubs    .pyi, .pyx, .pxd, .h and .c
    po       translations: catalogues .po
    markup   .html, .css, .js, .json, .yaml and .xml

A record has ``text``, a passage, ``file`` and ``package``. Passages that occur twice are written
once, for the first of pretrain, test, valid and pool that has them. ``corpus.json`` records each
wheel's name, version and SHA-256, and counts.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from embedded_text import code_of, docstrings_of, passages

LIST = Path(__file__).with_name("pypi_packages.txt")
PARTS = ("pretrain", "test", "valid", "pool")
DOMAINS = ("prose", "python", "stubs", "po", "markup")
_BY_SUFFIX = {
    **dict.fromkeys((".rst", ".md", ".txt"), "prose"),
    **dict.fromkeys((".pyi", ".pyx", ".pxd", ".h", ".c"), "stubs"),
    ".po": "po",
    **dict.fromkeys((".html", ".css", ".js", ".json", ".yaml", ".yml", ".xml"), "markup"),
}
# Of one file and of one package in one domain, so that none makes up a domain: in characters.
_LONGEST_FILE, _LONGEST_PACKAGE = 200_000, 3_000_000
# Lines of minified or generated files are longer.
_LONGEST_LINE = 1_000
# Share of a passage's characters that are ASCII: a small vocabulary has no room for all scripts.
_LEAST_ASCII = 0.9


@dataclass(frozen=True)
class Package:
    part: str
    name: str
    version: str


def read_list(path: Path) -> list[Package]:
    """Lines "PART NAME==VERSION"; the rest after # is a comment."""
    found = []
    for line in path.read_text().splitlines():
        words = line.partition("#")[0].split()
        if words:
            part, requirement = words
            name, version = requirement.split("==")
            if part not in PARTS:
                raise SystemExit(f"{path}: {line!r} names no part; parts are {', '.join(PARTS)}.")
            found.append(Package(part, name, version))
    return found


def fetch(package: Package, folder: Path) -> Path:
    """Its wheel, downloaded if it is not there."""
    stem = package.name.replace("-", "_").lower()

    def there() -> list[Path]:
        return [path for path in sorted(folder.glob("*.whl")) if path.name.lower().replace(
            ".", "_").startswith(f"{stem}-{package.version}-".replace(".", "_"))]

    if not there():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
             "--no-deps", "--only-binary", ":all:", "--dest", str(folder),
             f"{package.name}=={package.version}"], check=True)
    return there()[0]


def texts(wheel: Path) -> Iterator[tuple[str, str, str]]:
    """(domain, file, text) of a wheel's files; tests, and what is not UTF-8, are left out."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            path = PurePosixPath(name)
            if {"test", "tests", "testing"} & set(path.parts):
                continue
            if path.suffix == ".py" or path.suffix in _BY_SUFFIX or path.name == "METADATA":
                try:
                    text = archive.read(name).decode("utf-8")
                except UnicodeDecodeError:
                    continue
                yield from _of_file(path, text)


def _of_file(path: PurePosixPath, text: str) -> Iterator[tuple[str, str, str]]:
    if path.suffix == ".py":
        try:
            yield "prose", str(path), docstrings_of(text)
            yield "python", str(path), code_of(text)
        except (SyntaxError, ValueError, RecursionError):
            return
    elif path.name == "METADATA":  # headers, an empty line, the description
        yield "prose", str(path), text.partition("\n\n")[2]
    elif "licen" not in path.name.lower() and not path.name.endswith("top_level.txt"):
        yield _BY_SUFFIX[path.suffix], str(path), text


def _is_sound(passage: str) -> bool:
    return max(map(len, passage.splitlines()), default=0) <= _LONGEST_LINE and len(
        passage.encode("ascii", "ignore")) >= _LEAST_ASCII * len(passage)


def _compressed(path: Path) -> io.TextIOWrapper:
    """A file to write, whose bytes depend on what is written alone."""
    return io.TextIOWrapper(gzip.GzipFile(path, "wb", mtime=0), encoding="utf-8")


def write_corpus(packages: list[Package], wheels: Path, output: Path, length: int) -> dict:
    """What ``corpus.json`` says."""
    seen: set[bytes] = set()
    record: dict = {"passage_characters": length, "packages": [], "characters": {}}
    for part in PARTS:
        (output / part).mkdir(parents=True, exist_ok=True)
        files = {domain: _compressed(output / part / f"{domain}.jsonl.gz") for domain in DOMAINS}
        total: collections.Counter = collections.Counter()
        for package in (package for package in packages if package.part == part):
            wheel = fetch(package, wheels)
            written: collections.Counter = collections.Counter()
            for domain, name, text in texts(wheel):
                for passage in passages(text[:_LONGEST_FILE], length):
                    digest = hashlib.blake2b(passage.encode(), digest_size=16).digest()
                    if digest in seen or written[domain] > _LONGEST_PACKAGE \
                            or not _is_sound(passage):
                        continue
                    seen.add(digest)
                    written[domain] += len(passage)
                    files[domain].write(json.dumps({
                        "text": passage, "file": f"{package.name}/{name}",
                        "package": package.name}) + "\n")
            record["packages"].append({
                **vars(package), "wheel": wheel.name,
                "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
                "characters": dict(written)})
            total.update(written)
            print(f"{part}: {package.name} {package.version}, {dict(written)}", flush=True)
        for file in files.values():
            file.close()
        record["characters"][part] = dict(total)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--packages", type=Path, default=LIST,
                        help="lines of part, name and version (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, to which missing ones are "
                        "downloaded (default: wheels in the output folder)")
    parser.add_argument("--passage-characters", type=int, default=1000,
                        help="length of a passage, to the next line end (default %(default)s)")
    flags = parser.parse_args()
    wheels = flags.wheels or flags.output_dir / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    record = write_corpus(read_list(flags.packages), wheels, flags.output_dir,
                          flags.passage_characters)
    (flags.output_dir / "corpus.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
