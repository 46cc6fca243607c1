"""apt with a configuration of its own: reads the machine's archive address, touches nothing else.

Lists, caches, sources and package status live in one directory, so it works for any user and
leaves the system's apt as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Apt", "Archive", "Unavailable", "machine_archive", "run"]

TOOLS = ("apt-get", "apt-cache", "apt-config", "dpkg", "dpkg-deb")
RUN_TIMEOUT_S = 60.0
APT_TIMEOUT_S = 1800.0


class Unavailable(Exception):
    """The machine or the archive does not offer what is needed: exit code 4."""


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    cwd: Path | None = None,
    timeout: float = RUN_TIMEOUT_S,
) -> str:
    """Standard output of a command; raises Unavailable with its last lines when it fails."""
    try:
        done = subprocess.run(
            argv,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise Unavailable(f"{argv[0]} gave no answer within {timeout:.0f} s") from exc
    except OSError as exc:
        raise Unavailable(f"{argv[0]} cannot be started: {exc.strerror}") from exc
    if done.returncode:
        tail = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-4:]
        raise Unavailable(
            f"{Path(argv[0]).name} {argv[1]} failed ({done.returncode}): {' | '.join(tail)}"
        )
    return done.stdout


# The archive that the machine uses.


@dataclass(frozen=True, slots=True)
class Archive:
    """URIs of a Debian archive and the source options that go with it (Signed-By and such)."""

    uris: str
    options: Mapping[str, str] = field(default_factory=dict)


# Options about which files to fetch from the machine's own suites; they mean nothing here.
_NOT_COPIED = {"types", "uris", "suites", "components", "enabled", "architectures", "arch"}
_NOT_COPIED |= {"languages", "lang", "targets", "target", "pdiffs"}
_DEBIAN_SUITES = {"stable", "oldstable", "oldoldstable", "testing", "unstable", "sid"}
_ONE_LINE = re.compile(
    r"^deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<rest>.*)"
)


def deb822_stanzas(text: str) -> Iterator[dict[str, str]]:
    """Fields of each stanza of a `.sources` file, names in lower case (sources.list(5))."""
    fields: dict[str, str] = {}
    last = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, last = {}, ""
        elif line[0].isspace() and last:
            fields[last] += "\n" + line
        elif ":" in line:
            name, value = line.split(":", 1)
            last = name.strip().lower()
            fields[last] = value.strip()


def one_line_stanzas(text: str) -> Iterator[dict[str, str]]:
    """The `deb` lines of a `.list` file as stanzas of the other format."""
    for line in text.splitlines():
        m = _ONE_LINE.match(line.strip())
        if m is None:
            continue
        fields = {"types": "deb", "uris": m["uri"], "suites": m["suite"]}
        fields["components"] = m["rest"].split("#", 1)[0]
        for option in (m["options"] or "").split():
            name, _, value = option.partition("=")
            fields[name.lower()] = value.replace(",", " ")
        yield fields


def find_archive(etc: Path, codename: str | None, bases: Sequence[str]) -> Archive:
    """The Debian archive in the apt sources under `etc`.  Raises Unavailable.

    It is the first enabled entry with component `main` whose suite is Debian's: the machine's
    own codename or a name such as `stable`.  Security and update suites are other archives.
    """
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    wanted = _DEBIAN_SUITES | set(bases) | {codename or "stable"}
    for path in files:
        if not path.is_file() or path.suffix not in {".list", ".sources"}:
            continue
        text = path.read_text(errors="replace")
        for fields in (deb822_stanzas if path.suffix == ".sources" else one_line_stanzas)(text):
            if (
                "deb" in fields.get("types", "").split()
                and "main" in fields.get("components", "").split()
                and wanted & set(fields.get("suites", "").split())
                and fields.get("enabled", "yes").lower() not in {"no", "false", "0"}
                and not fields.get("uris", "cdrom:").startswith("cdrom:")
            ):
                kept = {k: v for k, v in fields.items() if k not in _NOT_COPIED and v}
                return Archive(" ".join(fields["uris"].split()), kept)
    raise Unavailable(f"no Debian archive among the apt sources in {etc}; add one and try again")


def machine_archive(bases: Sequence[str]) -> Archive:
    """The archive of this machine, by its own suites or `bases`.  Raises Unavailable."""
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} is missing; this needs a Debian machine")
    if (arch := run(["dpkg", "--print-architecture"]).strip()) != "amd64":
        raise Unavailable(f"packages are picked for amd64, this machine is {arch}")
    codename = None
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            codename = line.split("=", 1)[1].strip("\"'")
    return find_archive(Path("/etc/apt"), codename, bases)


# A private apt.


class Apt:
    """apt-get and apt-cache over two suites, with state that lives in `home` alone.

    `suite` and `base` may be the same one.  Packages are those of `architecture`, None: the
    machine's own.
    """

    def __init__(
        self,
        home: Path,
        archive: Archive,
        suite: str,
        base: str,
        *,
        architecture: str | None = None,
    ) -> None:
        self._suite = suite
        self.archives = home / "cache" / "archives"
        for name in ("lists/partial", "cache/archives/partial", "parts", "log"):
            (home / name).mkdir(parents=True)
        (home / "status").touch()
        stanza = {
            "Types": "deb",
            "URIs": archive.uris,
            "Suites": " ".join(dict.fromkeys((base, suite))),
            "Components": "main",
            **{name.title(): value for name, value in archive.options.items()},
        }
        text = "".join(f"{name}: {value}\n" for name, value in stanza.items())
        (home / "parts" / "debian.sources").write_text(text)
        conf = home / "apt.conf"
        conf.write_text("\n".join([*_inherited(), *_private(home, architecture)]) + "\n")
        self._env = {"APT_CONFIG": str(conf), "DEBIAN_FRONTEND": "noninteractive"}

    def update(self) -> None:
        run(["apt-get", "update", "-q"], env=self._env, timeout=APT_TIMEOUT_S)

    def versions(self, package: str) -> list[str]:
        """Package versions on offer, newest first."""
        lines = run(["apt-cache", "madison", package], env=self._env).splitlines()
        return [line.split("|")[1].strip() for line in lines if line.count("|") == 2]

    def closure(self, packages: Sequence[str]) -> tuple[int, int]:
        """How many packages, and bytes, `packages` need on a machine that has none."""
        sizes = [
            int(line.split()[2])
            for line in self._install("--print-uris", packages).splitlines()
            if line.startswith("'")
        ]
        return len(sizes), sum(sizes)

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Fetch that closure; apt checks sizes and hashes."""
        self._install("--download-only", packages)
        return sorted(self.archives.glob("*.deb"))

    def depends(self, package: str) -> list[str]:
        """Packages that `package` (`NAME=VERSION`) itself depends on, of each choice the last."""
        lines = run(["apt-cache", "depends", "-i", package], env=self._env).splitlines()
        return [line.split()[1] for line in lines if line.startswith("  Depends:")]

    def fetch(self, packages: Sequence[str]) -> list[Path]:
        """Fetch `packages` (`NAME=VERSION` or `NAME`) without what they depend on."""
        argv = ["apt-get", "download", "-q", *packages]
        run(argv, env=self._env, cwd=self.archives, timeout=APT_TIMEOUT_S)
        return sorted(self.archives.glob("*.deb"))

    def _install(self, mode: str, packages: Sequence[str]) -> str:
        argv = ["apt-get", "install", mode, "-q", "-y", "--no-install-recommends"]
        argv += ["-t", self._suite, *packages]
        return run(argv, env=self._env, timeout=APT_TIMEOUT_S)


def _inherited() -> Iterator[str]:
    """The machine's own ways to reach an archive (proxies, timeouts), and nothing else.

    Hooks stay out: apt.conf.d may hold some that write to the system after an update.
    """
    skip = ("Acquire::IndexTargets", "Acquire::Languages", "Acquire::cdrom", "Acquire::Changelogs")
    for line in run(["apt-config", "dump"]).splitlines():
        if line.startswith("Acquire::") and not line.startswith(skip):
            yield line


def _private(home: Path, architecture: str | None) -> Iterator[str]:
    """Settings that keep apt inside `home`, and to one architecture."""
    null = "/dev/null"
    values = {
        "Dir::Etc::main": null,
        "Dir::Etc::parts": null,
        "Dir::Etc::preferences": null,
        "Dir::Etc::preferencesparts": null,
        "Dir::Etc::sourcelist": null,
        "Dir::Etc::sourceparts": home / "parts",
        "Dir::State": home,
        "Dir::State::lists": home / "lists",
        "Dir::State::status": home / "status",
        "Dir::Cache": home / "cache",
        "Dir::Cache::archives": home / "cache" / "archives",
        "Dir::Log": home / "log",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "30",
        "Acquire::https::Timeout": "30",
        "APT::Update::Error-Mode": "any",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }
    yield from (f'{name} "{value}";' for name, value in values.items())
    if architecture is not None:
        yield f'APT::Architecture "{architecture}";'
        yield f'APT::Architectures {{ "{architecture}"; }};'
