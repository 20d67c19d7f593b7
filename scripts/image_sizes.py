"""Prints what the image that this runs in is made of, as JSON {part: bytes}. scripts/build_image.py runs it there."""

import json
import os
import re
import sys
from collections import Counter

SITE = r"/opt/octavo/lib/python3[^/]*/site-packages"
PARTS = (  # the first that matches a path has it
    ("torch", rf"{SITE}/(torch|torchgen|functorch)(-[^/]*|/|$)"),
    ("CUDA's libraries", rf"{SITE}/(nvidia|cuda)"),
    ("Triton", rf"{SITE}/triton"),
    ("transformers", rf"{SITE}/transformers"),
    ("Octavo", rf"{SITE}/(engine|server|configs|octavo-[^/]*)/|/usr/local/bin/octavo-health"),
    ("other Python packages", r"/opt/octavo/"),
    (
        "Python",
        r"/usr/(local/)?(bin|lib|include|share)/([^/]*-linux-gnu/)?(lib)?python3?[\d.]*(/|$)|/usr/lib/[^/]*-linux-gnu/libpython",
    ),
    (
        "compiler",
        r"/usr/(include|libexec/gcc|lib/gcc)/|/usr/bin/[^/]*-linux-gnu-|"
        r"/usr/lib/[^/]*-linux-gnu/([^/]*\.[ao]|lib(bfd|opcodes|ctf|isl|mpfr|mpc|gmp|[atlu]san|cc1|gprofng|sframe|itm|quadmath)[^/]*)$",
    ),
    ("Debian", r"/"),
)


def sizes() -> Counter[str]:
    found: Counter[str] = Counter()
    for folder, names, files in os.walk("/"):
        if folder == "/":
            names[:] = sorted(set(names) - {"proc", "sys", "dev", "run", "tmp", "models"})
        names[:] = [name for name in names if os.path.join(folder, name) != "/home/octavo/.cache"]
        for name in files:
            path = os.path.join(folder, name)
            stat = os.lstat(path)
            part = next(part for part, pattern in PARTS if re.match(pattern, path))
            # A file with several names is one; each name has its share.
            found[part] += stat.st_size // stat.st_nlink
    return found


if __name__ == "__main__":
    json.dump(sizes(), sys.stdout)
