"""`results_table.py`: means and deviations over seeds, and a file filled between its marks."""

import numpy as np
import pandas as pd
import pytest
import results_table

import dt_pretrained


def finished_run(folder, seed, scores, backbone="gpt2", head_std=None):
    """A run's log.csv: per epoch two steps with losses around 0.1, two episodes around its score."""
    folder.mkdir(parents=True)
    rows = []
    for epoch, score in enumerate([99.0, *scores]):  # the model before training does not count
        step = 400 * epoch
        for difference in (-1, 1):
            row = {"epoch": epoch, "step": step, "return": 118.6918, "score": score + difference}
            rows.append(row)
            if epoch > 0:
                row = {"epoch": epoch, "step": step, "loss": 0.1 + difference / 50}
                rows.append({**row, "saturated_fraction": 0.5 / epoch, "grad_norm": 1.0})
    settings = {"env": "Hopper-v4", "dataset": "d", "backbone": backbone, "K": 20, "seed": seed}
    settings |= {"head_std": head_std, "max_grad_norm": 0.25, "clipped_fraction": 1.0}
    pd.DataFrame(rows).assign(**settings).to_csv(folder / "log.csv", index=False)
    return folder


@pytest.fixture
def folders(tmp_path):
    return [
        finished_run(tmp_path / "a", 666, [40.0, 39.0]),
        finished_run(tmp_path / "b", 42, [44.0, 43.0]),
        finished_run(tmp_path / "c", 1, [7.0, 6.0], backbone="my/random-gpt2"),
        finished_run(tmp_path / "d", 1, [8.0, 9.0], head_std=0.02),
        tmp_path / "no run",
    ]


def test_scores_are_mean_and_deviation_over_seeds(folders):
    table = results_table.score_table(results_table.read_logs(folders))
    header, _, small_head, gpt2, other = results_table.markdown(table).splitlines()
    settings = "| env | K | backbone | head_std | steps | seeds | loss | saturated in epoch 1 "
    columns = "| one evaluation | best of 5 | best of 40 | best | last | paper, best of 40 |"
    assert header == settings + columns
    expected = (
        "| Hopper-v4 | 20 | gpt2 | - | 800 | 42, 666 | 0.100 ± 0.000 | 50% ± 0% | 41.5 ± 2.0 "
    )
    assert gpt2 == expected + "| 42.0 ± 2.0 | 42.0 ± 2.0 | 42.0 ± 2.0 | 41.0 ± 2.0 | 86.5 |"
    expected = "| Hopper-v4 | 20 | gpt2 | 0.02 | 800 | 1 | 0.100 | 50% | 8.5 "
    assert small_head == expected + "| 9.0 | 9.0 | 9.0 | 9.0 | 86.5 |"
    assert "| random-gpt2 |" in other and other.endswith("| 6.5 | 7.0 | 7.0 | 7.0 | 6.0 | - |")


def test_the_papers_scale(folders):
    """The notebook prints a return of 118.69 as a score of 2.871; D4RL's constants make it 4.27."""
    table = results_table.score_table(results_table.read_logs(folders, True), True)
    assert set(table["last"]) == {"2.9", "2.9 ± 0.0"}
    row = table[table.backbone == "gpt2"].iloc[0]
    assert row["paper, best of 40"] == "79.5"
    low, high = results_table.PAPER_HOPPER
    assert abs(100 * (118.69181341220788 - low) / (high - low) - 2.8712880990132525) < 1e-4
    task = dt_pretrained.TASKS["Hopper"]
    assert (task.random_return, task.expert_return) == results_table.D4RL_HOPPER


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


def test_two_runs_of_one_seed_are_refused(tmp_path):
    folders = [finished_run(tmp_path / name, 666, [40.0]) for name in "ab"]
    with pytest.raises(SystemExit, match="same seed"):
        results_table.score_table(results_table.read_logs(folders))


def test_the_figure_shows_every_run(folders):
    log = results_table.read_logs(folders)
    figure = results_table.plot_runs(log, "a title")
    assert [text.get_text() for text in figure.legends[0].texts] == list(map(str, folders[:4]))
    scores, losses = figure.axes[:2]
    for axes, expected in ((scores, [99, 40, 39]), (losses, [0.1, 0.1])):
        assert axes.lines[0].get_ydata() == pytest.approx(expected)
    assert losses.get_ylabel() == "mean squared action error"


def test_scores_and_losses_with_a_column_for_each_backbone(folders):
    scores = results_table.score_table(results_table.read_logs(folders[1:]))
    tables = results_table.page_tables(scores)
    assert results_table.markdown(tables["scores"]).splitlines() == [
        "| env | K | head_std | gpt2 | random-gpt2 |",
        "| --- | --- | --- | --- | --- |",
        "| Hopper-v4 | 20 | - | 44.0 | 7.0 |",
        "| Hopper-v4 | 20 | 0.02 | 9.0 | - |",
        "| Hopper-v4 | 20 | the paper | 86.5 | - |",
    ]
    assert results_table.markdown(tables["losses"]).splitlines()[2:] == [
        "| Hopper-v4 | 20 | 0.100 → 0.100 | 0.100 → - |",
    ]
    # The paper's scores in other environments are on a scale that is not known.
    tables = results_table.page_tables(scores.assign(env="Walker2d-v5"))
    assert "the paper" not in set(tables["scores"].head_std) and len(tables["scores"]) == 2


def test_tables_of_analyses(tmp_path, capsys):
    """Each from a file of few rows, by hand."""
    run = finished_run(tmp_path / "run", 1, [1.0])
    files = {
        "attention": "label,epoch,block,distance\n"
        "a,0,0,1\na,0,0,2\na,0,1,4\na,1,0,9\na,2,0,5\na,2,0,7\na,2,1,7",
        "windows": "label,norm\nb,1\nb,2\nb,9\na,4",
        "pairs": "label,cosine\na,1\nb,-0.5\nb,0.5",
        "sets": "label,set,relative_distance\na,c.weight,1\nb,c.weight,2\nb,c.bias,3\nb,c.bias,",
        "cka": "label,token,kind,cka\na,state,LayerNorm,1\na,return,LayerNorm,0.5\na,state,other,0",
        "information": "label,quantity,shuffled,held_out,training\n"
        "data,I,False,1,2\na,J,False,1,2\na,J,False,2,4\na,J,True,90,90",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.csv").write_text(text)
    results_table.main(results_table.Args((run, tmp_path)))
    shown = capsys.readouterr().out
    for lines in (
        ("| label | block 0 | block 1 |", "| a | 6.00 | 7.00 |"),
        ("| b | 2.00 | -0.50 | 2.00 |", "| a | 4.00 | 1.00 | 1.00 |"),
        ("| label | LayerNorm | other |", "| a | 0.75 | 0.00 |"),
        ("| quantity | data | a |", "| I | 1.00 |  |", "| J |  | 1.50 |"),
    ):
        for line in lines:
            assert line in shown.splitlines(), shown


def test_a_file_is_filled_between_its_marks(folders, tmp_path, capsys):
    readme = tmp_path / "README.md"
    end = "between\n<!-- table: blocks -->\nstays\n<!-- end -->\nafter\n"
    start = "<!-- table: losses -->\n<!-- end -->\n<!-- table: scores -->\nold\n<!-- end -->\n"
    readme.write_text(start + end)
    without_marks = tmp_path / "other.md"
    without_marks.write_text("no table here\n")
    args = results_table.Args(tuple(folders[:1]), readme=readme)
    results_table.main(args)
    results_table.main(args)  # and again, with the same end
    results_table.main(results_table.Args(args.folders, readme=without_marks))
    assert without_marks.read_text() == "no table here\n"
    text = readme.read_text()
    assert "-->\nold\n" not in text and text.count("| gpt2 |") == 2 and text.endswith(end)
    assert "| 39.0 |" in capsys.readouterr().out


def test_backbones_lose_their_folders_but_not_what_they_are(tmp_path):
    mixed = "random with block 3 of "
    whole = finished_run(tmp_path / "a", 1, [1.0], "org/gpt2-medium")
    block = finished_run(tmp_path / "b", 1, [1.0], mixed + "org/gpt2-medium")
    log = results_table.read_logs([whole, block])
    assert log.backbone.unique().tolist() == ["gpt2-medium", mixed + "gpt2-medium"]
