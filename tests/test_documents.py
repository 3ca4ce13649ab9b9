"""What the documents point at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
FOLDERS = "coordatt_fast|kernels|csrc|tests|bench|docs|examples|requirements"


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name != "CHANGELOG.md"], ids=str)
def test_paths_and_links(document):
    text = (ROOT / document).read_text()
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text)
    gone = [path for path in named if not (ROOT / path).exists() and not path.endswith(("/lib", ".json"))]
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target) or "bench/results" in target:
            continue
        at = (ROOT / document.parent / path) if path else ROOT / document
        if not at.exists() or (anchor and anchor not in anchors(at)):
            gone.append(target)
    assert not gone
