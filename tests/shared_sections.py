"""Keep the sections that the scripts share the same, word for word.

python tests/shared_sections.py      # rewrite the copies from the first script that has the section
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("dt_pretrained.py", "dt_no_context.py", "analyze_grads.py", "analyze_repr.py")
SHARED = ("Defaults", "Model", "Backbones", "Starting point", "Data", "Evaluation", "Training", "Interruptions", "Run", "Video")
SHARED += ("Study",)
OWN = {("dt_no_context.py", "Starting point")}  # sections that a script has in a version of its own
BANNER = re.compile(r"^# ={118}\n# (.+)\n# ={118}\n", re.MULTILINE)


def split(text):
    """Return the part before the first banner, and the sections, banner included, by the banner's first words."""
    starts = list(BANNER.finditer(text)) + [None]
    sections = {}
    for banner, following in zip(starts, starts[1:]):
        sections[banner[1].split(":")[0]] = text[banner.start() : following.start() if following else len(text)]
    return text[: starts[0].start()], sections


def rewritten(name):
    """Return the text of script `name` with its shared sections replaced by those of the first script that has them."""
    originals = {}
    for script in reversed(SCRIPTS):
        originals |= split((ROOT / script).read_text())[1]
    head, sections = split((ROOT / name).read_text())
    copied = [title in SHARED and (name, title) not in OWN for title in sections]
    return head + "".join(originals[title] if copy else sections[title] for title, copy in zip(sections, copied))


if __name__ == "__main__":
    for name in SCRIPTS[1:]:
        text = rewritten(name)
        print(f"{name}: {'unchanged' if text == (ROOT / name).read_text() else 'rewritten'}")
        (ROOT / name).write_text(text)
