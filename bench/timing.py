"""How malloc is set in a process that measures, and what that means for a case."""

# How glibc's malloc is set in the process that measures. A new page costs more than the arithmetic done on
# it, and whether malloc hands pages back depends on the history of the heap, so the state is fixed and
# reported.
PAGES: dict[str, dict[str, str]] = {
    # As users have it. Fine for outputs up to 16 MB, whose pages stay in the heap once warm.
    "plain": {},
    # Every block from 16 MB up is mapped anew on each call, which plain malloc always does from 32 MB up.
    "fresh": {"MALLOC_MMAP_THRESHOLD_": str(16 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)},
    # Nothing is ever given back to the system, as with a caching allocator or buffers that are reused.
    "kept": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 46),
        "MALLOC_TOP_PAD_": str(64 << 20),
    },
}
PAGES_SHORT = {"plain": "plain malloc", "fresh": "fresh pages", "kept": "kept pages"}
LARGE_OUTPUT = 16_000_000  # bytes; above it, fresh and kept pages are measured apart


def pages_for(size: int, device: str) -> tuple[str, ...]:
    """Page states a case with full-size tensors of ``size`` bytes is measured in."""
    return ("fresh", "kept") if size > LARGE_OUTPUT and device == "cpu" else ("plain",)
