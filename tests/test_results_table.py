"""`results_table.py`: means and deviations over seeds, and a README filled between its marks."""

import json

import pytest
import results_table
from conftest import ROOT


def finished_run(folder, seed, best, loss=0.1, backbone="gpt2"):
    folder.mkdir(parents=True)
    summary = dict(env="Hopper-v4", context_length=20, backbone=backbone, seed=seed, steps=800)
    summary |= dict(epochs=[{"loss": loss}], best_normalized_score=best, final_normalized_score=best - 1)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "args.json").write_text("{}")
    return folder


def test_scores_are_mean_and_deviation_over_seeds(tmp_path):
    folders = [finished_run(tmp_path / str(seed), seed, best) for seed, best in ((666, 40.0), (42, 44.0))]
    folders += [finished_run(tmp_path / "other", 1, 7.0, backbone="random-gpt2"), tmp_path / "no run"]
    lines = results_table.score_table(folders).splitlines()
    expected = "| Hopper-v4 | 20 | `gpt2` | 666, 42 | 800 | 0.100 ± 0.000 | 42.0 ± 2.8 | 41.0 ± 2.8 | 79.5 |"
    assert lines[2] == expected and "| 7.0 | 6.0 | - |" in lines[3] and len(lines) == 4


def test_two_runs_of_one_seed_are_refused(tmp_path):
    folders = [finished_run(tmp_path / name, 666, 40.0) for name in "ab"]
    with pytest.raises(SystemExit, match="same seed"):
        results_table.score_table(folders)


def test_attention_gaps_are_medians_over_windows_and_means_over_seeds(tmp_path):
    for seed, gaps in ((666, [[0.0, 1.0], [0.2, 1.0], [9.0, 4.0]]), (42, [[0.4, 2.0]] * 3)):  # [windows, blocks]
        gap = {"0": [[0.0, 0.0]] * 3, "4": gaps}
        results = dict(runs=[dict(name="gpt2", env="Hopper-v4", seed=seed)], attention_distance={"attention": {"gap": gap}})
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "results.json").write_text(json.dumps(results))
    table = results_table.attention_table([tmp_path / "666", tmp_path / "42"])
    assert table.splitlines()[2:] == ["| Hopper-v4 | `gpt2` | 42, 666 | 0 and 4 | 0.30, 1.50 |"]


def test_a_readme_is_filled_between_its_marks(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- table: scores -->\nold\n<!-- end -->\nbetween\n<!-- table: blocks -->\n<!-- end -->\nafter\n"
    )
    args = results_table.Args((finished_run(tmp_path / "a", 666, 40.0),), readme)
    results_table.main(args)
    results_table.main(args)  # and again, with the same end
    text = readme.read_text()
    assert (
        "old" not in text
        and text.count("| 40.0 |") == 1
        and text.endswith("between\n<!-- table: blocks -->\n<!-- end -->\nafter\n")
    )
    assert "| 40.0 |" in capsys.readouterr().out


def test_the_readme_has_a_place_for_every_table():
    text = (ROOT / "README.md").read_text()
    for name in ("scores", "attention", "blocks", "gradients", "clipping", "similarity", "information"):
        assert text.count(f"<!-- table: {name} -->\n") == 1
