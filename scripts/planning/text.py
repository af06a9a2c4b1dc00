"""How a plan is printed."""

from collections.abc import Mapping


def print_rows(title: str, rows: Mapping[str, str]) -> None:
    print(f"\n{title}")
    for name, text in rows.items():
        print(f"  {name:18} {text}")


def counted(calls: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in calls.items())


def size(value: float) -> str:
    """Bytes in powers of ten: 1.23 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:,.2f} {unit}"
    return f"{value:.0f} B"
