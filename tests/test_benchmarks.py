"""`eval.py` rewardbench, reasoning, alpacaeval: figures beside those of others, and the commands without a sampler."""
import json
from pathlib import Path

import pytest

from eval import REWARDBENCH, benchmark_figures, main
from test_eval import fails
from tiny_run import write_lines

# ---- against what others publish or compute ----


def test_the_subsets_weights_and_section_scores_of_rewardbench_are_those_of_its_package():
    official = json.loads((Path(__file__).parent / "rewardbench_official.json").read_text())
    assert {section: list(part) for section, part in REWARDBENCH.items()} == official["mapping"]
    assert {subset: weight for part in REWARDBENCH.values() for subset, weight in part.items()} == official["weights"]
    figures = benchmark_figures(*zip(*official["pairs"]))
    for section, score in official["sections"].items():
        assert figures[section]["section"]["value"] == pytest.approx(score, abs=5e-5)  # figures have four digits
        for subset in official["mapping"][section]:
            assert figures[section][subset]["value"] == pytest.approx(official["subsets"][subset], abs=5e-5)
    plain = sum(official["sections"].values()) / 4
    assert figures["RewardBench"]["mean of the sections"]["value"] == pytest.approx(plain, abs=5e-5)


def judge(prompt, _):
    """Likes 'good' in any order, and 'tie' as much as anything; says nothing of 'odd' ones."""
    if "> odd" in prompt:
        return "cannot say"
    if "> tie" in prompt:
        return "<scores>5, 5</scores>"
    return "<scores>9, 2</scores>" if prompt.index("> good") < prompt.index("> bad") else "<scores>2, 9</scores>"


def test_rewardbench_judges_in_both_orders_and_reports_subsets_sections_and_their_mean(tmp_path, answering):
    answering(judge)
    good = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    bad, tie, odd = good | {"chosen": "bad", "rejected": "good"}, good | {"rejected": "tie"}, good | {"chosen": "odd"}
    equal = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}  # is no pair
    shown = [(good, "hep-go"), (good, "hep-go"), (tie, "math-prm"), (bad, "donotanswer"), (good, "x"), (odd, "x")]
    source = write_lines(tmp_path / "pairs.jsonl", equal, *(pair | {"subset": subset} for pair, subset in shown))
    main(["rewardbench", "--model", "m", "--data", source, "--json", str(tmp_path / "out.json")])
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]

    def value(section, name):
        return figures[section][name]["value"]

    assert value("Reasoning", "hep-go: single order") == 1 and value("Reasoning", "math-prm: single order") == 0.5
    assert value("Reasoning", "section: single order") == pytest.approx((984 * 0.5 + 164) / (984 + 164), abs=1e-4)
    assert value("Reasoning", "section: ties as 0") == pytest.approx(164 / (984 + 164), abs=1e-4)
    assert value("other", "x: single order") == 0.75 and value("other", "x: ties as 0") == 0.5
    assert value("other", "x: format") == 0.5
    assert value("other", "x: order consistency") == 1  # of the one that was read
    assert value("Safety", "section: single order") == 0 and value("other", "x: first-position preference") == 0
    assert value("Reasoning", "hep-go: longer wins") == 1
    assert figures["Reasoning"]["hep-go: single order"]["count"] == 2
    assert value("RewardBench", "mean of the sections: single order") == pytest.approx(
        (value("Reasoning", "section: single order") + 0.75 + 0) / 3, abs=1e-4)


def test_reasoning_measures_each_set_and_their_average(tmp_path, answering):
    answering(lambda prompt, i: "so 4" if i < 3 else "so 5")
    row = {"question": "2 + 2?"}
    sets = [write_lines(tmp_path / f"{answer}.jsonl", row | {"answer": answer}, row | {"answer": answer})
            for answer in ("4", "5", "6")]
    main(["reasoning", "--model", "m", "--data", *sets, "--samples", "4", "--json", str(tmp_path / "out.json")])
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    parts = [f"reasoning, {part}" for part in ("4", "5", "6", "average")]
    found = {name: [figures[part][name]["value"] for part in parts] for name in figures[parts[-1]]}
    assert found["solved, greedy"] == pytest.approx([1, 0, 0, 1 / 3], abs=1e-4)
    assert found["solved"] == pytest.approx([0.75, 0.25, 0, 1 / 3], abs=1e-4)
    assert found["cut off"] == [0] * 4
    assert figures[parts[0]]["solved"]["count"] == 1  # a repeated question is no independent trial


def test_alpacaeval_writes_the_fields_that_the_package_reads(tmp_path, answering, capsys):
    asked = [{"instruction": text, "dataset": "helpful_base"} for text in ("Hi?", "Why?", "Hi?")]
    (tmp_path / "set.json").write_text(json.dumps(asked))
    outputs = tmp_path / "model_outputs.json"
    answering(lambda prompt, _: f"to {prompt}")
    main(["alpacaeval", "--model", "m", "--data", str(tmp_path / "set.json"), "--outputs", str(outputs)])
    assert json.loads(outputs.read_text()) == [
        {"instruction": text, "output": f"to {text}", "generator": "m"} for text in ("Hi?", "Why?", "Hi?")]
    assert "1 to an instruction that stood in --data before" in capsys.readouterr().out


def test_what_is_refused_names_the_remedy(tmp_path, capsys, measuring):
    good = tmp_path / "good.json"
    good.write_text(json.dumps([{"instruction": "q", "output": "good"}]))
    (tmp_path / "bad.json").write_text('[{"output": "q"}]')
    ties = write_lines(tmp_path / "ties.jsonl", {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]})
    before = sorted(tmp_path.iterdir())
    for words, arguments in [
            (["--data", "pairs"], ["rewardbench", "--model", "m", "--data", ties]),
            (["--data"], ["reasoning", "--model", "m"]),
            (["bad.json:1", "no field"], ["alpacaeval", "--model", "m", "--data", tmp_path / "bad.json"]),
            (["--outputs", "name a file"], ["alpacaeval", "--model", "m", "--data", good, "--outputs", tmp_path])]:
        err = fails(arguments, capsys)
        assert all(word in err for word in words), (words, err)
    assert sorted(tmp_path.iterdir()) == before
