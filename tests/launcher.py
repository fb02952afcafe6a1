"""Starts scripts quickly: a process that has imported everything forks for each of them.

What a script needs takes seconds to import, which is most of the time of a short run.
"""

import functools
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent

# dt_pretrained.py without what follows the training: figure and table.
TRAIN = """
import sys, tyro
import dt_pretrained as dt
args = tyro.cli(dt.Args, default=dt.SAMPLE if "--sample" in sys.argv else dt.Args())
folder = dt.complete_arguments(args, args.backbone)
dt.train(args, folder, dt.load_backbone(args))
"""


class Launcher:
    """`modules` are imported once, and all that is started has the same `environment`.

    Its process ends with the one that made it.
    """

    def __init__(self, *modules, environment=os.environ):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "dt_pretrained", "torch._dynamo", *modules],
            env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.count = 0

    def start(self, folder, program, *arguments):
        """Start `python program arguments`, or `python -c program arguments`, in `folder`.

        Returns the id of the process.
        """
        self.count += 1
        self.files = [folder / f"{name}_{self.count}" for name in ("out", "err")]
        request = [folder, *self.files, program, *arguments]
        self.process.stdin.write(json.dumps([str(part) for part in request]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """Wait for what was started; returns its exit status, its output and its errors."""
        status = int(self.process.stdout.readline())
        out, err = (path.read_text() for path in self.files)
        return SimpleNamespace(status=status, out=out, err=err)

    def run(self, folder, program, *arguments):
        self.start(folder, program, *arguments)
        return self.wait()


shared_launcher = functools.cache(Launcher)  # for files that need nothing special


def run(folder, out, err, program, *arguments):
    """In a process of its own: returns its exit status."""
    os.chdir(folder)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = [program, *arguments]
    try:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            exec(program, {"__name__": "__main__"})
    except SystemExit as end:
        if not isinstance(end.code, str):
            return end.code or 0
        print(end.code, file=sys.stderr)  # what Python itself would do with it
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for module in sys.argv[1:]:
        __import__(module)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = run(*json.loads(line))
            sys.stdout.flush()
            os._exit(status)  # to take everything down again would take a second
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
