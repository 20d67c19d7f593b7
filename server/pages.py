"""What the server's own pages may do in a browser: run their own script, use their own style, talk to this server."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

STATIC = Path(__file__).parent / "static"
INDEX_PAGE = STATIC / "index.html"
DOCS_PAGE = STATIC / "docs.html"


def page_policies() -> dict[str, str]:
    """Path -> Content-Security-Policy, by the hashes of the scripts and styles that stand in the page itself."""
    return {"/": _policy(INDEX_PAGE), "/docs": _policy(DOCS_PAGE)}


def _policy(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    rules = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    for tag in ("script", "style"):
        hashes = [_hash(content) for content in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)]
        rules.append(f"{tag}-src {' '.join(hashes) or repr('none')}")
    return "; ".join(rules)


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
