"""Keep the sections that the scripts share the same, word for word.

python tests/shared_sections.py      # rewrite the copies from dt_pretrained.py
"""

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("dt_pretrained.py", "dt_no_context.py", "analyze_grads.py", "analyze_repr.py")
SHARED = ("Helpers", "Environment and data", "Model", "Backbones", "Evaluation", "Training")
BANNER = re.compile(r"^# ={118}\n# (.+)\n# ={118}\n", re.MULTILINE)


def split(text):
    """Return the part before the first banner, and the sections, banner included, by the banner's first words."""
    starts = [*BANNER.finditer(text), None]
    sections = {}
    for banner, following in itertools.pairwise(starts):
        sections[banner[1].split(":")[0]] = text[banner.start() : following.start() if following else len(text)]
    return text[: starts[0].start()], sections


def rewritten(name):
    """Return the text of script `name` with its shared sections replaced by those of dt_pretrained.py."""
    _, originals = split((ROOT / SCRIPTS[0]).read_text())
    head, sections = split((ROOT / name).read_text())
    return head + "".join(originals[title] if title in SHARED else text for title, text in sections.items())


if __name__ == "__main__":
    for name in SCRIPTS[1:]:
        text = rewritten(name)
        print(f"{name}: {'unchanged' if text == (ROOT / name).read_text() else 'rewritten'}")
        (ROOT / name).write_text(text)
