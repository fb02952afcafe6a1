"""`results_table.py`: means and deviations over seeds, and a file filled between its marks."""

import json

import pytest
import results_table

import dt_pretrained


def finished_run(folder, seed, best, backbone="gpt2"):
    folder.mkdir(parents=True)
    args = dict(env="Hopper-v4", context_length=20, backbone=backbone, seed=seed, num_epochs=2)
    ends = dict(
        return_low=results_table.D4RL["Hopper"][0],
        return_high=results_table.D4RL["Hopper"][1] * best / 40,
    )
    records = [dict(epoch=i, step=400 * i, loss=0.1, **ends) for i in range(3)]
    for record, score in zip(records, (99, best, best - 1)):
        record["normalized_score"] = score
    (folder / "summary.json").write_text(json.dumps(dict(args=args, epochs=records)))
    return folder


def test_scores_are_mean_and_deviation_over_seeds(tmp_path):
    folders = [
        finished_run(tmp_path / str(seed), seed, best) for seed, best in ((666, 40.0), (42, 44.0))
    ]
    folders += [
        finished_run(tmp_path / "other", 1, 7.0, backbone="random-gpt2"),
        tmp_path / "no run",
    ]
    lines = results_table.markdown(results_table.score_table(folders)).splitlines()
    expected = "| Hopper-v4 | 20 | gpt2 | 800 | 42, 666 | 0.100 ± 0.000 | 42.0 ± 2.8 | 41.0 ± 2.8 "
    assert lines[2] == expected + "| 0.0 to 105.0 | 79.5 | 86.5 |"
    assert "| 7.0 | 6.0 | 0.0 to 18.0 | - | - |" in lines[3] and len(lines) == 4
    assert {name: task[2:] for name, task in dt_pretrained.TASKS.items()} == results_table.D4RL


def test_the_papers_scale():
    """The notebook prints a return of 118.69 as a score of 2.871; with D4RL's constants it is 4.27."""
    low, high = results_table.PAPER_HOPPER
    score = 100 * (118.69181341220788 - low) / (high - low)
    assert abs(score - 2.8712880990132525) < 1e-4
    assert (
        abs(
            results_table.on_d4rl_scale(score) - 100 * (118.6918 + 20.272305) / (3234.3 + 20.272305)
        )
        < 1e-3
    )


def test_a_run_still_at_work_is_passed_over(tmp_path):
    folder = finished_run(tmp_path / "a", 666, 40.0)
    summary = json.loads((folder / "summary.json").read_text())
    for number in (1, 2):
        (folder / "summary.json").write_text(
            json.dumps(summary | dict(epochs=summary["epochs"][:number]))
        )
        assert results_table.score_table([folder]) == []


def test_two_runs_of_one_seed_are_refused(tmp_path):
    folders = [finished_run(tmp_path / name, 666, 40.0) for name in "ab"]
    with pytest.raises(SystemExit, match="same seed"):
        results_table.score_table(folders)


def test_attention_gaps_are_means_over_seeds(tmp_path):
    for seed, gaps in ((666, (0.2, 1.0)), (42, (0.4, 2.0))):
        rows = []
        for epoch, block in ((0, 0), (0, 1), (4, 0), (4, 1)):
            rows.append(
                dict(run="", epoch=epoch, block=block, median_gap=gaps[block] * (epoch > 0))
            )
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "args.json").write_text(
            json.dumps(dict(env="Hopper-v4", backbone="gpt2", seed=seed))
        )
        results = dict(runs=[dict(run="gpt2")], attention_distance=rows)
        (tmp_path / str(seed) / "results.json").write_text(json.dumps(results))
    (row,) = results_table.attention_table([tmp_path / "666", tmp_path / "42"])
    assert list(row.values()) == ["Hopper-v4", "gpt2", 4, "42, 666", "0.30 ± 0.14", "1.50 ± 0.71"]


def test_a_file_is_filled_between_its_marks(tmp_path, capsys):
    readme = tmp_path / "README.md"
    end = "between\n<!-- table: blocks -->\n<!-- end -->\nafter\n"
    readme.write_text("before\n<!-- table: scores -->\nold\n<!-- end -->\n" + end)
    args = results_table.Args((finished_run(tmp_path / "a", 666, 40.0),), readme)
    results_table.main(args)
    results_table.main(args)  # and again, with the same end
    text = readme.read_text()
    assert "old" not in text and text.count("| 40.0 |") == 1 and text.endswith(end)
    assert "| 40.0 |" in capsys.readouterr().out
