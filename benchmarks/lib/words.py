"""A summary's values as they stand in a table."""

from benchmarks.lib.results import Summary


def phases(summary: Summary) -> str:
    ms = summary.ms or {}
    if "backward" not in ms:
        return f"{ms.get('captured', 0):.1f} in all / {ms.get('data', 0):.1f}"
    forward = ms.get("views", 0) + ms["forward"]
    return f"{forward:.1f} / {ms['backward']:.1f} / {ms['optimizer']:.1f} / {ms['data']:.1f}"


def memory(summary: Summary) -> str:
    if summary.reserved is None:
        return f"{summary.memory:,.0f}"
    reserved = f"{summary.reserved:,.0f} reserved"
    if "captured" in (summary.ms or {}):  # to the allocator, the memory of a graph's step is free
        return reserved
    return f"{summary.memory:,.0f} ({reserved})"


def speedup(summary: Summary) -> str:
    if summary.speedup is None:
        return ""
    median, low, high = summary.speedup
    return f"{median:.2f}" + (f" ({low:.2f} to {high:.2f})" if summary.rounds > 1 else "")


def pays(summary: Summary) -> str:
    if summary.speedup is None:
        return ""
    if summary.pays_after is None:
        return "never" if summary.speedup[0] <= 1 else "uncertain"
    return f"{summary.pays_after:,.0f}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cell(text: str) -> str:
    return text.replace("|", "\\|")
