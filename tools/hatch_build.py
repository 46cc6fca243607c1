"""For the wheel: builds what `steer` and `run` load into QEMU, where there is a C compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_OBJECT = "qmp_memlistener/steer/interposer.elf"


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling finds it by this name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        del version
        root = Path(self.root)
        subprocess.run([root / "tools/build_interposer.sh"], check=True)
        if self.target_name == "wheel" and (root / _OBJECT).exists():
            build_data["artifacts"].append(_OBJECT)
            build_data["tag"] = "py3-none-linux_x86_64"
