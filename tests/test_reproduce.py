"""The commands of tests/results/README.md that make the paper's figures, run in a tiny size."""

import re
import shlex
import subprocess

import pandas as pd
from conftest import ROOT

TINY = {
    "--num-epochs": "2",
    "--steps-per-epoch": "2",
    "--num-eval-episodes": "1",
    "--batch-size": "2",
    "--mine-windows": "20",
    "--mine-batch-size": "10",
    "--mine-passes": "1",
    "--mine-steps": "2",
    "--norm-windows": "3",
    "--confusion-windows": "2",
    "--cka-windows": "10",
    "--attention-windows": "5",
}
OF_ANALYSES = {
    "dt_no_context.py": ("--attention-windows",),
    "analyze_grads.py": ("--norm-windows", "--confusion-windows"),
    "analyze_repr.py": (
        "--mine-windows",
        "--mine-batch-size",
        "--mine-passes",
        "--mine-steps",
        "--cka-windows",
    ),
}


def commands(folder):
    """The commands as bash expands them in an empty folder: [[script, argument, ...]]."""
    text = (ROOT / "tests" / "results" / "README.md").read_text()
    block = re.search(r"<!-- commands -->\n```bash\n(.+?)```", text, re.DOTALL)[1]
    show = 'python() { printf "%q " "$@"; echo; }\n'
    result = subprocess.run(
        ["bash", "-euc", show + block], cwd=folder, capture_output=True, text=True, check=True
    )
    return [shlex.split(line) for line in result.stdout.splitlines()]


def in_a_tiny_size(command):
    """Its arguments on the bundled data: two epochs, which all later ones become, and one block."""
    script, *words = command
    chosen = {}
    for word in words:
        if word.startswith("--"):
            chosen[word] = []
        else:
            chosen[list(chosen)[-1]].append(word)
    chosen.pop("--dataset", None)
    for flag, value in TINY.items():
        is_of_training = not any(flag in flags for flags in OF_ANALYSES.values())
        if is_of_training or flag in OF_ANALYSES.get(script, ()):
            if chosen.get(flag) != ["0"]:
                chosen[flag] = [value]
    for flag in ("--epochs", "--save-epochs"):
        if flag in chosen:
            epochs = ["2" if int(epoch) > 1 else epoch for epoch in chosen[flag]]
            chosen[flag] = list(dict.fromkeys(epochs))
    if "--replace-blocks" in chosen:
        chosen["--replace-blocks"] = ["0"]
    arguments = ["--sample"]
    for flag, values in chosen.items():
        arguments += [flag, *values]
    return arguments


def test_the_papers_figures_by_the_commands_of_the_page(run_script, figures_as_dots, tmp_path):
    all_commands = commands(tmp_path)
    assert len(all_commands) == 3 * 2 * 12 + 1  # three environments, two seeds
    of_one = [c for c in all_commands if any("Hopper" in word and "666" in word for word in c)]
    assert len(of_one) == 12
    for command in of_one:
        if "--backbone" in command:  # the paper's data and precision, not the defaults
            assert "hopper_medium-v2.hdf5" in command and "fp32" in command and "666" in command
        result = run_script(command[0], *in_a_tiny_size(command))
        assert result.status == 0, f"{command}\n{result.err}"
    figures = {
        "no_context": ["learning_curves"],
        "blocks": ["learning_curves"],
        "attention": ["attention_gaps", "attention_heads"],
        "gradients": [
            "parameter_change",
            "gradient_windows",
            "gradient_shares",
            "gradient_per_set",
        ],
        "clipping": ["learning_curves"],
        "representations": [
            "cka_before_after",
            "cka_heat_maps_state",
            "information_with_context",
            "information_of_same_step",
            "information_in_data",
        ],
    }
    for folder, names in figures.items():
        for name in names:
            assert (tmp_path / "runs/Hopper" / folder / f"666/{name}.png").exists(), name
    information = pd.read_csv(tmp_path / "runs/Hopper/representations/666/information.csv")
    assert information.training.notna().any()
    tables = run_script(all_commands[-1][0], *sorted((tmp_path / "runs/Hopper/gpt2").iterdir()))
    assert tables.status == 0 and "gpt2" in tables.out
