"""A tiny model of QEMU's memory core for property tests: regions, its `info mtree`, its rendering.

`render_by_insertion` does what `render_memory_region` does, literally and slowly: walk the
subregions in list order and insert what is not yet obscured.  It shares no code with the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st


@dataclass(eq=False)
class Mr:
    """QEMU's MemoryRegion; `subregions` in QEMU's list order (priority, then latest first)."""

    name: str
    size: int
    kind: str = "i/o"
    container: bool = False
    readonly: bool = False
    enabled: bool = True
    addr: int = 0
    priority: int = 0
    alias: Mr | None = None
    alias_offset: int = 0
    subregions: list[Mr] = field(default_factory=list)

    def add(self, child: Mr, addr: int, priority: int = 0) -> None:
        """memory_region_add_subregion_overlap()."""
        child.addr = addr
        child.priority = priority
        for i, other in enumerate(self.subregions):
            if priority >= other.priority:
                self.subregions.insert(i, child)
                return
        self.subregions.append(child)

    @property
    def shown_kind(self) -> str:
        return self.alias.shown_kind if self.alias else self.kind


@dataclass
class Piece:
    start: int
    end: int
    mr: Mr
    offset: int
    readonly: bool


def render_by_insertion(root: Mr) -> list[tuple[int, int, str, str, int]]:
    """(start, size, kind, name, offset) of every range of the flat view."""
    view: list[Piece] = []

    def visit(mr: Mr, base: int, lo: int, hi: int, readonly: bool) -> None:
        if not mr.enabled:
            return
        base += mr.addr
        readonly = readonly or mr.readonly
        lo, hi = max(lo, base), min(hi, base + mr.size)
        if lo >= hi:
            return
        if mr.alias is not None:
            visit(mr.alias, base - mr.alias.addr - mr.alias_offset, lo, hi, readonly)
            return
        for sub in mr.subregions:
            visit(sub, base, lo, hi, readonly)
        if mr.container:
            return
        pos = lo
        for old in sorted(view, key=lambda p: p.start):
            if old.end <= pos or old.start >= hi:
                continue
            if pos < old.start:
                view.append(Piece(pos, old.start, mr, pos - base, readonly))
            pos = max(pos, old.end)
        if pos < hi:
            view.append(Piece(pos, hi, mr, pos - base, readonly))

    visit(root, 0, 0, 1 << 64, False)
    merged: list[Piece] = []
    for p in sorted(view, key=lambda p: p.start):
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.end == p.start
            and last.mr is p.mr
            and last.offset + (last.end - last.start) == p.offset
            and last.readonly == p.readonly
        ):
            last.end = p.end
        else:
            merged.append(p)
    return [
        (p.start, p.end - p.start, "rom" if p.readonly else p.mr.kind, p.mr.name, p.offset)
        for p in merged
    ]


def info_mtree(spaces: dict[str, Mr], *, disabled: bool = True) -> str:
    """What `info mtree` (`-D` when `disabled`) would print, CRLF and all."""
    lines: list[str] = []
    queue: list[Mr] = []

    def show(mr: Mr, level: int, base: int) -> None:
        start = base + mr.addr
        last = (start + mr.size - 1) % (1 << 64) if mr.size else start
        if mr.alias is not None and mr.alias not in queue:
            queue.append(mr.alias)
        if mr.enabled or disabled:
            text = f"alias {mr.name} @{mr.alias.name}" if mr.alias else mr.name
            if mr.alias:
                end = mr.alias_offset + (mr.size - 1 if mr.size else 0)
                text += f" {mr.alias_offset:016x}-{end:016x}"
            off = "" if mr.enabled else " [disabled]"
            lines.append(
                f"{'  ' * level}{start:016x}-{last:016x} (prio {mr.priority}, {mr.shown_kind}): "
                f"{text}{off}"
            )
        for sub in sorted(mr.subregions, key=lambda s: (s.addr, -s.priority)):
            show(sub, level + 1, start)

    for name, root in spaces.items():
        lines.append(f"address-space: {name}")
        show(root, 1, 0)
        lines.append("")
    at = 0
    while at < len(queue):
        lines.append(f"memory-region: {queue[at].name}")
        show(queue[at], 1, 0)
        lines.append("")
        at += 1
    return "\r\n".join(lines) + "\r\n"


SPACE = 1 << 16


@st.composite
def trees(draw: st.DrawFn, *, unique_priorities: bool = True) -> Mr:
    """A machine of RAM blocks, containers, aliases and windows; every region has its own name."""
    counter = 0

    def name(prefix: str) -> str:
        nonlocal counter
        counter += 1
        return f"{prefix}{counter}"

    addr = st.integers(0, SPACE // 256 - 1).map(lambda a: a * 256)
    size = st.integers(1, SPACE // 256).map(lambda s: s * 256)
    targets: list[Mr] = []

    def leaf() -> Mr:
        kind = draw(st.sampled_from(["ram", "rom", "romd", "ramd", "i/o", "i/o"]))
        return Mr(name(kind[:3].replace("/", "")), draw(size), kind, readonly=kind == "rom")

    def region(depth: int) -> Mr:
        what = draw(st.sampled_from(["leaf", "leaf", "alias", "container"]))
        if what == "container" and depth > 0:
            mr = Mr(name("window-"), draw(size), container=True)
            fill(mr, depth - 1)
            if mr.subregions:
                return mr
        if what == "alias" and targets:
            target = draw(st.sampled_from(targets))
            offset = draw(addr) % target.size
            # pam-rom is the one alias that QEMU maps read-only, hw/pci-host/pam.c
            rom = draw(st.booleans()) and target.kind == "ram" and not target.subregions
            alias = Mr("pam-rom" if rom else name("alias-"), draw(size), alias=target)
            alias.alias_offset = offset
            alias.readonly = rom
            return alias
        return leaf()

    def fill(parent: Mr, depth: int) -> None:
        n = draw(st.integers(1, 4))
        taken: set[int] = set()
        for _ in range(n):
            child = region(depth)
            child.enabled = draw(st.integers(0, 4)) > 0
            prio = draw(st.integers(-4, 8))
            while unique_priorities and prio in taken:
                prio += 1
            taken.add(prio)
            parent.add(child, draw(addr), prio)

    root = Mr("system", 1 << 64, container=True)
    for _ in range(draw(st.integers(1, 2))):
        target = leaf()
        target.kind = draw(st.sampled_from(["ram", "i/o"]))
        target.readonly = False
        targets.append(target)
    if draw(st.booleans()):
        bus = Mr(name("bus-"), SPACE, container=True)
        bus.add(leaf(), draw(addr))
        targets.append(bus)
    fill(root, 2)
    return root
