#!/bin/sh
# Build what `steer` and `run` load into QEMU, when it is older than its source.  The same compiler
# makes the same file.
set -eu
cd "$(dirname "$0")/../qmp_memlistener/steer"
[ "$(uname -m)" = x86_64 ] || exit 0
if [ interposer.elf -nt interposer.c ] && [ interposer.elf -nt interposer.h ]; then exit 0; fi
if ! command -v "${CC:-cc}" >/dev/null; then
    echo "no C compiler: \`steer\` and \`run\` say so" >&2
    exit 0
fi
"${CC:-cc}" -O2 -Wall -Wextra -Werror -fPIC -shared -fvisibility=hidden -ftls-model=initial-exec \
    -ffile-prefix-map="$PWD"=. -Wl,--build-id=none -s -o interposer.elf.new interposer.c
mv interposer.elf.new interposer.elf
