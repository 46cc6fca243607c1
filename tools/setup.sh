#!/usr/bin/env bash
# Makes a checkout ready: Debian packages when root and missing, a virtual environment in .venv.
#   tools/setup.sh          everything that `make demo` and `make test` need
#   tools/setup.sh --check  only says what is missing
set -euo pipefail
cd "$(dirname "$0")/.."

packages=() # nothing works without
optional=() # some tests are skipped without
have() { command -v "$1" >/dev/null 2>&1; }
have qemu-system-x86_64 || packages+=(qemu-system-x86)
[ -e /usr/share/seabios/bios-256k.bin ] || [ -e /usr/share/qemu/bios-256k.bin ] || packages+=(seabios)
have qemu-system-aarch64 || optional+=(qemu-system-arm)
have as || optional+=(binutils)

python=""
for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || packages+=(python3 python3-venv)

if [ "$(id -u)" = 0 ] && have apt-get; then
    packages+=("${optional[@]}")
elif [ ${#optional[@]} -gt 0 ]; then
    echo "some tests will be skipped without: ${optional[*]}" >&2
fi
if [ ${#packages[@]} -gt 0 ]; then
    if [ "${1:-}" = --check ]; then
        echo "missing Debian packages: ${packages[*]}" >&2
        exit 4
    fi
    if [ "$(id -u)" = 0 ] && have apt-get; then
        echo "installing: ${packages[*]}" >&2
        log=$(mktemp)
        if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"; } >"$log" 2>&1; then
            tail -n 20 "$log" >&2
            echo "apt-get could not install: ${packages[*]}" >&2
            exit 4
        fi
        rm -f "$log"
    else
        echo "missing: ${packages[*]}" >&2
        echo "install them first, on Debian: sudo apt-get install --no-install-recommends ${packages[*]}" >&2
        exit 4
    fi
    [ -n "$python" ] || python=python3
fi
[ "${1:-}" = --check ] && exit 0

stamp=.venv/.installed
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
    touch "$stamp"
fi
tools/build_interposer.sh
