"""`results_table.py`: means and deviations over seeds, and a file filled between its marks."""

import json

import numpy as np
import pytest
import results_table

import dt_pretrained


def finished_run(folder, seed, scores, backbone="gpt2", head_std=None):
    folder.mkdir(parents=True)
    args = {
        "env": "Hopper-v4",
        "context_length": 20,
        "backbone": backbone,
        "seed": seed,
        "num_epochs": len(scores),
        "head_std": head_std,
        "max_grad_norm": 0.25,
    }
    records = []
    for epoch, score in enumerate([99.0, *scores]):  # the model before training does not count
        record = {"epoch": epoch, "step": 400 * epoch, "loss": 0.1, "saturated_fraction": 0.5}
        records.append({**record, "normalized_score": score})
    (folder / "summary.json").write_text(json.dumps({"args": args, "epochs": records}))
    return folder


def test_scores_are_mean_and_deviation_over_seeds(tmp_path):
    folders = [
        finished_run(tmp_path / "a", 666, [40.0, 39.0]),
        finished_run(tmp_path / "b", 42, [44.0, 43.0]),
        finished_run(tmp_path / "c", 1, [7.0, 6.0], backbone="random-gpt2"),
        finished_run(tmp_path / "d", 1, [8.0, 9.0], head_std=0.02),
        tmp_path / "no run",
    ]
    scores, small_head = results_table.score_tables(folders)
    gpt2, random = results_table.markdown(scores).splitlines()[2:]
    expected = "| Hopper-v4 | 20 | gpt2 | 800 | 42, 666 | 0.100 ± 0.000 | 50% ± 0% | 41.5 ± 2.0 "
    assert gpt2 == expected + "| 42.0 ± 2.0 | 42.0 ± 2.0 | 41.0 ± 2.0 | 79.5 | 86.5 |"
    assert random.endswith("| 6.5 | 7.0 | 7.0 | 6.0 | - | - |")
    assert [row["starting point"] for row in small_head] == ["gpt2, head 0.02"]


def test_constants_are_the_scripts():
    for name, task in dt_pretrained.TASKS.items():
        assert results_table.D4RL[name] == (task.random_return, task.expert_return)


def test_the_papers_scale():
    """The notebook prints a return of 118.69 as a score of 2.871; D4RL's constants make it 4.27."""
    low, high = results_table.PAPER_HOPPER
    score = 100 * (118.69181341220788 - low) / (high - low)
    assert abs(score - 2.8712880990132525) < 1e-4
    expected = 100 * (118.6918 + 20.272305) / (3234.3 + 20.272305)
    assert abs(results_table.on_d4rl_scale(score) - expected) < 1e-3


def test_the_papers_image_model_is_igpt_as_gpt2():
    assert all("igpt" not in scores for scores in results_table.PAPER.values())
    assert results_table.PAPER["Hopper", 20]["igpt-as-gpt2"] == 2.6


@pytest.mark.parametrize("n", [1, 5, 40])
def test_the_expected_best_is_that_of_a_simulation(n):
    scores = np.random.default_rng(0).normal(50, 20, size=13)
    drawn = np.random.default_rng(1).choice(scores, size=(200_000, n)).max(axis=1)
    error = 4 * drawn.std() / 200_000**0.5 + 1e-9
    assert abs(results_table.expected_best(scores, n) - drawn.mean()) < error
    if n == 1:
        assert abs(results_table.expected_best(scores, n) - scores.mean()) < 1e-9


def test_a_run_still_at_work_is_passed_over(tmp_path):
    folder = finished_run(tmp_path / "a", 666, [40.0, 39.0])
    summary = json.loads((folder / "summary.json").read_text())
    for number in (1, 2):
        unfinished = {**summary, "epochs": summary["epochs"][:number]}
        (folder / "summary.json").write_text(json.dumps(unfinished))
        assert results_table.score_tables([folder]) == ([], [])


def test_two_runs_of_one_seed_are_refused(tmp_path):
    folders = [finished_run(tmp_path / name, 666, [40.0]) for name in "ab"]
    with pytest.raises(SystemExit, match="same seed"):
        results_table.score_tables(folders)


def test_attention_is_a_mean_over_seeds(tmp_path):
    for seed, gaps in ((666, (0.2, 1.0)), (42, (0.4, 2.0))):
        rows = []
        for epoch, block in ((0, 0), (0, 1), (4, 0), (4, 1)):
            row = {
                "run": f"runs/{seed}",
                "label": "gpt2",
                "seed": seed,
                "epoch": epoch,
                "block": block,
            }
            row["median_gap"] = gaps[block] * (epoch > 0)
            for name in ("own_token", "on_returns", "on_states", "on_actions", "entropy"):
                row[name] = [0.25, 0.75, float("nan")]
            rows.append(row)
        (tmp_path / str(seed)).mkdir()
        results = {"runs": [{"run": "gpt2", "K": 1}], "attention": rows}
        (tmp_path / str(seed) / "results.json").write_text(json.dumps(results))
    folders = [tmp_path / "666", tmp_path / "42", tmp_path / "42"]  # one twice
    (row,), looks = results_table.attention_tables(folders)
    assert list(row.values()) == ["gpt2", 1, 4, "42, 666", "0.30 ± 0.10", "1.50 ± 0.50"]
    assert len(looks) == 2 and looks[0]["on the own token"] == "0.50 ± 0.00"
    assert looks[0]["most of a head"] == "0.75 ± 0.00"


def test_a_file_is_filled_between_its_marks(tmp_path, capsys):
    readme = tmp_path / "README.md"
    end = "between\n<!-- table: blocks -->\n<!-- end -->\nafter\n"
    readme.write_text("before\n<!-- table: scores -->\nold\n<!-- end -->\n" + end)
    args = results_table.Args((finished_run(tmp_path / "a", 666, [40.0]),), readme)
    results_table.main(args)
    results_table.main(args)  # and again, with the same end
    text = readme.read_text()
    assert "-->\nold\n" not in text and text.count("| gpt2 |") == 1 and text.endswith(end)
    assert "| 40.0 |" in capsys.readouterr().out
