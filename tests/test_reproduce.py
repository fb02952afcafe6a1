"""The commands of tests/results/README.md that make the paper's figures, run in a tiny size."""

import re
import shlex
import subprocess

from conftest import ROOT

TINY = {
    "--num-epochs": ["2"],
    "--steps-per-epoch": ["2"],
    "--num-eval-episodes": ["1"],
    "--batch-size": ["2"],
    "--mine-steps": ["1"],
    "--mine-windows": ["20"],
    "--mine-batch-size": ["10"],
    "--mine-passes": ["1"],
    "--norm-windows": ["3"],
    "--confusion-windows": ["2"],
    "--cka-windows": ["10"],
}
LATER_EPOCHS = {"4", "10", "40"}  # all are the last one here


def commands():
    """The commands as bash expands them: [[script, argument, ...]]."""
    text = (ROOT / "tests" / "results" / "README.md").read_text()
    block = re.search(r"<!-- commands -->\n```bash\n(.+?)```", text, re.DOTALL)[1]
    show = 'python() { printf "%q " "$@"; echo; }\n'
    result = subprocess.run(
        ["bash", "-euc", show + block], capture_output=True, text=True, check=True
    )
    return [shlex.split(line) for line in result.stdout.splitlines()]


def options(command):
    """{"--flag": [values]} of a command."""
    found = {}
    for word in command[1:]:
        if word.startswith("--"):
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


def in_a_tiny_size(command, module_fields):
    chosen = options(command)
    chosen.pop("--dataset", None)  # the bundled one instead
    chosen.pop("--mine-paper-settings", None)  # 1,000 passes
    for flag, values in TINY.items():
        if flag[2:].replace("-", "_") in module_fields:
            chosen[flag] = values
    for flag in ("--epochs", "--save-epochs", "--attention-epochs"):
        if flag in chosen:
            epochs = ["2" if epoch in LATER_EPOCHS else epoch for epoch in chosen[flag]]
            chosen[flag] = list(dict.fromkeys(epochs))
    words = ["--sample"]
    for flag, values in chosen.items():
        words += [flag, *values]
    return words


def test_the_papers_figures_by_the_commands_of_the_page(run_script, tmp_path):
    import analyze_grads
    import analyze_repr
    import dt_no_context
    import dt_pretrained

    modules = {
        f"{module.__name__}.py": module
        for module in (analyze_grads, analyze_repr, dt_no_context, dt_pretrained)
    }
    all_commands = commands()
    assert len(all_commands) == 3 * 2 * 12 + 1  # three environments, two seeds
    of_one = [c for c in all_commands if any("Hopper" in word and "666" in word for word in c)]
    assert len(of_one) == 12
    for command in of_one:
        chosen = options(command)
        if "--backbone" in chosen:  # the paper's data and precision, not the defaults
            assert chosen["--dataset"] == ["hopper_medium-v2.hdf5"]
            assert chosen["--precision"] == ["fp32"] and chosen["--seed"] == ["666"]
        fields = modules[command[0]].Args.__dataclass_fields__
        result = run_script(command[0], *in_a_tiny_size(command, fields))
        assert result.status == 0, f"{command}\n{result.err}"
    figures = {
        "Hopper_no_context_666": ["learning_curves"],
        "Hopper_blocks_666": ["learning_curves"],
        "Hopper_attention_666": ["attention_gaps", "attention_heads"],
        "Hopper_gradients_666": ["parameter_change", "gradient_windows", "gradient_shares"],
        "Hopper_clipping_666": ["clipping"],
        "Hopper_representations_666": ["cka_before_after", "information_with_context"],
    }
    for folder, names in figures.items():
        for name in names:
            assert (tmp_path / "runs" / folder / f"{name}.png").exists(), name
    tables = run_script(all_commands[-1][0], *sorted((tmp_path / "runs").iterdir()))
    assert tables.status == 0 and "Hopper-v4 | 20 | gpt2" in tables.out
