"""Processes of this machine, by what the system says of them: no other program is needed; and code for new ones."""

import contextlib
from pathlib import Path

# As if fairseq and transformers were not installed. (None in sys.modules is not that: `datasets` takes such an entry
# for an imported module.)
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fairseq", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def children(parent, word=""):
    """Ids of the processes that process ``parent`` has started, in their order, whose command has ``word`` in it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            started_by = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if started_by == parent and word.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return sorted(found)
