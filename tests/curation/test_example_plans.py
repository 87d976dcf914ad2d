"""The worked plans of examples/curation on small stand-ins: random embedders, a model on loopback, a film."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from encoder_models import write_sentences, write_torchscript
from endpoint_server import KEY, Act, asked_text, endpoint_server
from project import ROOT
from test_clips import coloured

from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.output import Summary
from megatron_eagle.curation.plan import load_plan
from megatron_eagle.demo.dataset import generate

EXAMPLES = ROOT / "examples" / "curation"
TABLE = "| Year | Cars |\n| --- | --- |\n| 2019 | {} |\n| 2020 | {} |"


def said(body: dict[str, Any], before: int) -> Act:
    """A model that answers each of the plans' prompts in its form."""
    words = asked_text(body)
    forms = {
        '"steps"': {"steps": "I look at the picture and count what there is, one by one.", "answer": "7"},
        '"context"': {"question": "What colour is it?", "answer": "blue", "context": "the square moves"},
        '"questions"': {"questions": [{"question": "What comes last?", "answer": "The green part."}]},
    }
    for key, form in forms.items():
        if key in words:
            return Act(json.dumps(form))
    return Act(f"A picture of {' '.join(f'thing{number}' for number in range(25))}.")


def write_sources(data: Path) -> None:
    """Pictures of everything, and charts whose tables are asked for."""
    for seed, name in enumerate(("general", "charts", "synthetic-charts")):
        path = generate(data / name, split="train", samples=12, seed=seed)
        if name != "general":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            for number, record in enumerate(one for one in records if "image" in one):
                marker = "<image>\n" * (1 if isinstance(record["image"], str) else len(record["image"]))
                asked = {"from": "human", "value": f"{marker}Turn the chart into a table."}
                record["conversations"] = [asked, {"from": "gpt", "value": TABLE.format(number + 20, number + 7)}]
            path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run(name: str, out: str, **targets: int) -> Summary:
    """The plan, in this folder; the small stand-ins do not have as much to select from."""
    raw = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    for operator in raw["operators"]:
        if "targets" in operator:
            assert operator["targets"].keys() == targets.keys()
            operator["targets"] = targets
    Path(f"{name}.yaml").write_text(yaml.safe_dump(raw))
    return curate(load_plan(Path(f"{name}.yaml")), Path(out))


def endpoint(url: str) -> None:
    """The example's file, with the test's own address."""
    raw = yaml.safe_load((EXAMPLES / "endpoint.yaml").read_text())
    Path("key").write_text(KEY)
    Path("endpoint.yaml").write_text(yaml.safe_dump({**raw, "url": url, "key_file": "key"}))


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: str(file.stem))
def test_every_plan_can_be_read(file: Path) -> None:
    if file.stem != "endpoint":
        assert load_plan(file).steps


@pytest.mark.slow
def test_eagle_2s_two_stages_run_one_after_the_other(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("faiss")
    write_sources(tmp_path / "data")
    (tmp_path / "models").mkdir()
    write_torchscript(tmp_path / "models" / "sscd.pt")
    write_sentences(tmp_path / "models" / "all-mpnet-base-v2")
    monkeypatch.chdir(tmp_path)
    first = run("eagle2-stage1.5", "stage1.5")
    assert first.total("read") == 36 and first.total("used") >= 24
    assert any("similarity" in note for note in first.sources[1].notes), first.sources[1].notes
    with endpoint_server(said) as server:
        endpoint(server.url)
        second = run("eagle2-stage2", "stage2", **{"charts": 5, "synthetic-charts": 6})
    assert [one.used for one in second.sources[1:]] == [5, 6]
    assert second.sources[0].used == first.sources[0].used
    reasons = " ".join(key for source in second.sources for key in source.reasons)
    assert "asked of a table" in reasons and "describe" in reasons


@pytest.mark.slow
def test_eagle_2_5s_films_get_questions_of_both_kinds(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("openai")
    films = tmp_path / "data" / "films"
    films.mkdir(parents=True)
    coloured(films / "a.mp4", [("blue", 12), ("green", 11)])
    talk = [{"from": "human", "value": "<video>\nWhat is shown?"}, {"from": "gpt", "value": "A square."}]
    chapters = [{"start": 0, "end": 12, "title": "Blue"}, {"start": 12, "title": "Green"}]
    record = {"id": "a", "video": "a.mp4", "conversations": talk, "metadata": {"chapters": chapters}}
    (films / "samples.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.chdir(tmp_path)
    with endpoint_server(said) as server:
        endpoint(server.url)
        summary = run("eagle2.5-video", "videos")
    assert summary.total("used") == 1
    (line,) = (tmp_path / "videos" / "kept" / "films" / "samples.jsonl").read_text().splitlines()
    asked = [turn["value"] for turn in json.loads(line)["conversations"] if turn["from"] == "user"]
    assert any("seconds" in one for one in asked) and "What comes last?" in asked
