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

# D-Bus and GLib (PyGObject is built with libgirepository), and arm64's headers to compare numbers with
extras=()
girepository() { have pkg-config && pkg-config --exists gobject-introspection-1.0; }
girepository || extras+=(libgirepository1.0-dev pkg-config gcc libc6-dev)
have dbus-run-session || extras+=(dbus-bin dbus-daemon)
have gdbus || extras+=(libglib2.0-bin)
have xmllint || extras+=(libxml2-utils)
[ -e /usr/aarch64-linux-gnu/include/linux/kvm.h ] || extras+=(linux-libc-dev-arm64-cross)
extras_missing="tests of D-Bus, GLib and arm64 will be skipped without: ${extras[*]}"

# libvirt, and what its Python module is built with
libvirt=()
[ -e /usr/sbin/libvirtd ] || libvirt+=(libvirt-daemon-system libvirt-daemon-driver-qemu)
have virsh || libvirt+=(libvirt-clients)
have pkg-config && pkg-config --exists libvirt || libvirt+=(libvirt-dev pkg-config)
have cc || libvirt+=(gcc libc6-dev)
libvirt_missing="tests of libvirt will be skipped without: libvirt-python and ${libvirt[*]}"

python=""
for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || packages+=(python3 python3-venv)

install() {
    log=$(mktemp)
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1
}

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
        if ! install "${packages[@]}"; then
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
if [ ${#extras[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && have apt-get; then
        echo "installing: ${extras[*]}" >&2
        install "${extras[@]}" || echo "$extras_missing" >&2
    else
        echo "$extras_missing" >&2
    fi
fi
if [ ${#libvirt[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && have apt-get; then
        echo "installing: ${libvirt[*]}" >&2
        install "${libvirt[@]}" || echo "$libvirt_missing" >&2
    else
        echo "$libvirt_missing" >&2
    fi
fi

stamp=.venv/.installed
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
    if have pkg-config && pkg-config --exists libvirt; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[libvirt]' >/dev/null 2>&1 ||
            echo "tests of libvirt will be skipped: libvirt-python could not be built (it needs gcc and Python's headers)" >&2
    fi
    touch "$stamp"
fi
# the extra `glib`, without the cairo that PyGObject needs for drawing alone
if girepository && ! .venv/bin/python -c 'import asyncio_glib, gi.events' 2>/dev/null; then
    into_venv() { PATH="$PWD/.venv/bin:$PATH" .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
    into_venv meson-python ninja setuptools &&
        into_venv --no-build-isolation --no-deps --config-settings=setup-args=-Dpycairo=disabled \
            'PyGObject>=3.50,<3.52' asyncio-glib==0.1 ||
        echo "tests of the GLib loop will be skipped: PyGObject could not be built" >&2
fi
tools/build_interposer.sh
