"""Keep the sections that the scripts share the same, word for word.

python tests/tools/shared_sections.py      # rewrite the copies from dt_pretrained.py

The section Runs is shared by the three analyses, and its copies are made from dt_no_context.py.
"""

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("dt_pretrained.py", "dt_no_context.py", "analyze_grads.py", "analyze_repr.py")
SHARED = ("Arguments", "Model", "Backbones", "Data", "Evaluation", "Training", "Utilities")
BANNER = re.compile(r"^# ={98}\n# (.+)\n# ={98}\n", re.MULTILINE)


def split(text):
    """The part before the first banner, and {first words of a banner: section, banner included}."""
    banners = [*BANNER.finditer(text), None]
    sections = {}
    for banner, following in itertools.pairwise(banners):
        end = following.start() if following else len(text)
        sections[banner[1].split(":")[0]] = text[banner.start() : end]
    return text[: banners[0].start()], sections


def rewritten(name):
    """The text of script `name` with its shared sections replaced by their originals."""
    _, originals = split((ROOT / SCRIPTS[0]).read_text())
    _, analysis = split((ROOT / SCRIPTS[1]).read_text())
    head, sections = split((ROOT / name).read_text())
    for title in sections:
        if title in SHARED:
            sections[title] = originals[title]
        elif title == "Runs":
            sections[title] = analysis[title]
    return head + "".join(sections.values())


if __name__ == "__main__":
    for name in SCRIPTS[1:]:
        text = rewritten(name)
        print(f"{name}: {'unchanged' if text == (ROOT / name).read_text() else 'rewritten'}")
        (ROOT / name).write_text(text)
