"""The demo, on a handful of problems."""

import json

from em_kernels import tiny_math
from em_kernels.tiny_math import demo


def test_demo_measures_trains_and_draws_and_can_be_run_again(tmp_path, capsys):
    for _ in range(2):
        demo.main(["--out", str(tmp_path), "--problems", "24", "--updates", "2"])
    printed = capsys.readouterr().out
    assert tiny_math.PROMPT in printed and "after 2" in printed and "24 held-out" in printed
    summary = json.loads((tmp_path / "demo.json").read_text())
    entropy = summary["mean_entropy_per_update"]
    assert entropy[1] < entropy[0] and len(summary["accuracy_per_update"]) == 3
    picture = (tmp_path / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert (tmp_path / demo.RUN / "checkpoint-2" / "model.safetensors").is_file()


def test_table_says_where_the_peak_was_even_if_it_is_the_start():
    point = {"value": 0.5, "stderr": 0.1}
    worse = {"value": 0.25, "stderr": 0.1}
    summary = {
        "problems": 4,
        "updates": 1,
        "accuracy": {"greedy": {"before": point, "after": worse}},
        "accuracy_per_update": [point, worse],
        "mean_entropy_per_update": [0.2],
        "sample_seconds": 1.0,
        "loss_seconds": 2.0,
    }
    text = demo.table(summary)
    assert "-0.250" in text and "best accuracy at T = 1: 0.500, after update 0" in text
    assert "training: 3.0 s (1.0 s of it sampling)" in text
