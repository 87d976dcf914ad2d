"""Folders and files that somebody else may have made: which code is run, and which answers are gone on with."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_eagle.cli import main
from megatron_eagle.conversion.carried_code import carried_code
from megatron_eagle.errors import UserError
from megatron_eagle.serving import model_folder
from megatron_eagle.serving.bulk import Counts, answer_file
from megatron_eagle.serving.conversation import Finished, Message, Options
from megatron_eagle.serving.loading import check_code
from megatron_eagle.serving.model_folder import exported_folder, model_digest
from megatron_eagle.serving.vllm import check_encoders

PLUGIN = Path(__file__).parents[1] / "plugin"
AUTO = {
    "AutoConfig": "configuration_eagle.Eagle2ChatConfig",
    "AutoTokenizer": [None, "processing_eagle.EagleProcessor"],
}


def write_folder(folder: Path, kinds: Sequence[str], auto: dict[str, Any]) -> Path:
    """An export's code and config, without weights."""
    folder.mkdir(parents=True)
    for name, content in carried_code({"stripes"} & set(kinds)).items():
        (folder / name).write_bytes(content)
    encoders = [{"kind": kind} for kind in kinds]
    (folder / "config.json").write_text(json.dumps({"auto_map": auto, "megatron_eagle": {"encoders": encoders}}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "export", ["siglip", "convnext"], AUTO)


def test_an_export_as_it_was_written_is_run(folder: Path) -> None:
    check_code(folder, trust=False)


def test_an_export_with_an_encoder_of_another_package_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGIN))
    made = write_folder(tmp_path / "export", ["siglip", "stripes"], AUTO)
    assert b'KINDS["stripes"]' in (made / "encoders_eagle.py").read_bytes()
    check_code(made, trust=False)
    with (made / "stripes_eagle.py").open("a") as file:
        file.write("#")
    with pytest.raises(UserError, match="stripes_eagle.py is not the code"):
        check_code(made, trust=False)


def test_an_encoder_that_is_not_installed_is_named(tmp_path: Path) -> None:
    made = write_folder(tmp_path / "export", ["siglip", "zebra"], AUTO)
    with pytest.raises(UserError, match=r"has an encoder whose code is not known here: encoder kind .*zebra.*"):
        check_code(made, trust=False)


@pytest.mark.parametrize("name", ["more.py", "sub/evil.py", "custom_generate/generate.py", "sub/modeling_eagle.py"])
def test_a_file_of_code_that_no_export_has_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes((folder / "modeling_eagle.py").read_bytes())
    with pytest.raises(UserError, match="megatron-eagle (exports|does not export).*--trust-code"):
        check_code(folder, trust=False)
    check_code(folder, trust=True)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "pointed", ["sub/evil.C", "/other/dir--mod.C", "some/repo--mod.C", "evil.C", ".C", "torch.hub.C"]
)
def test_settings_that_point_to_other_code_are_refused(folder: Path, file: str, pointed: str) -> None:
    (folder / file).write_text(json.dumps({"auto_map": {"AutoConfig": AUTO["AutoConfig"], "AutoX": [None, pointed]}}))
    with pytest.raises(UserError, match=f"{file}: auto_map points to .*--trust-code"):
        check_code(folder, trust=False)


def test_code_beside_the_folder_is_not_run(folder: Path) -> None:
    """By transformers itself: what check_code stops would be run."""
    from transformers import AutoConfig

    from megatron_eagle.serving.loading import load_answerer

    ran, evil = folder.parent / "ran", folder.parent / "evil"
    evil.mkdir()
    (evil / "mod.py").write_text(
        f"from transformers import PretrainedConfig\nopen({str(ran)!r}, 'w')\nclass C(PretrainedConfig):\n"
        "    model_type = 'c'\n"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "c", "auto_map": {"AutoConfig": f"{evil}--mod.C"}}))
    with pytest.raises(UserError, match="auto_map points to"):
        load_answerer(folder)
    assert not ran.exists()
    AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    assert ran.exists()


def test_an_adapter_of_another_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/other"}))
    with pytest.raises(UserError, match="adapter_config.json makes transformers run code"):
        check_code(folder, trust=False)


class Parrot:
    """Answers every question with its words, unless told to refuse them."""

    def __init__(self) -> None:
        self.refused: set[str] = set()

    def prepare(self, messages: Sequence[Message], options: Options) -> Any:
        from megatron_eagle.serving.answerer import Prompt

        words = str(messages[-1].content[-1])
        if words in self.refused:
            raise UserError("not today")
        return Prompt(words, None, ())  # type: ignore[arg-type]

    def answer_all(self, prompts: Sequence[Any], options: Options) -> list[Any]:
        return [SimpleNamespace(text=prompt.tokens, end=Finished("stop", 1, 1)) for prompt in prompts]


def answered(parrot: Parrot, questions: Path, answers: Path) -> Counts:
    return answer_file(parrot, questions, answers, Options(), model="m", batch=2, system=None)  # type: ignore[arg-type]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"id": f"q{n}", "question": f"What {n}?"}) + "\n" for n in range(4)))
    return file


FOREIGN = {
    "a text without an end": b"Dear diary,\ntoday",
    "one line without an end": b"Dear diary",
    "a file of questions": b'{"id": "q0", "question": "a"}\n{"id": "q1", "ques',
    "one question": b'{"id": "q0", "question": "a"}',
    "pictures": b"\x89PNG\r\n\x1a\n\x00\x00",
    "other keys": b'{"id": ["q0"], "asked": "x", "answer": ""}\n',
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_that_holds_no_answers_stays_as_it_is(case: str, questions: Path, tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_bytes(FOREIGN[case])
    with pytest.raises(UserError, match="is no answer; give another file"):
        answered(Parrot(), questions, file)
    assert file.read_bytes() == FOREIGN[case]


def test_answers_of_another_model_keep_their_torn_line(questions: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    whole = b'{"id": "q0", "asked": "other", "answer": "a", "complete": true}\n{"id": "q1", "as'
    file.write_bytes(whole)
    with pytest.raises(UserError, match="as it was asked of another model"):
        answered(Parrot(), questions, file)
    assert file.read_bytes() == whole


def test_the_questions_are_not_overwritten(questions: Path) -> None:
    whole = questions.read_bytes()
    link = questions.with_name("link")
    link.symlink_to(questions)
    for file in (questions, link):
        with pytest.raises(UserError, match="holds the questions"):
            answered(Parrot(), questions, file)
    assert questions.read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 5, 30, 1000])
def test_a_line_torn_at_any_place_is_answered_again(cut: int, questions: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    answered(Parrot(), questions, file)
    whole = file.read_text()
    *first, last = whole.splitlines(keepends=True)
    file.write_text("".join(first) + last.rstrip("\n")[:cut])
    assert answered(Parrot(), questions, file).known == (4 if cut > len(last) else 3)
    assert file.read_text() == whole


def test_a_question_that_failed_is_tried_again(questions: Path, tmp_path: Path) -> None:
    file, parrot = tmp_path / "a.jsonl", Parrot()
    parrot.refused = {"What 1?", "What 3?"}
    assert answered(parrot, questions, file) == Counts(4, 2, 2, 0)
    parrot.refused = {"What 3?"}
    assert answered(parrot, questions, file) == Counts(4, 3, 1, 2)
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["id"] for entry in entries] == ["q0", "q2", "q1", "q3"]
    questions.write_text(questions.read_text().replace("What 3?", "What three?"))
    assert answered(parrot, questions, file) == Counts(4, 4, 0, 3)


def test_a_model_is_known_by_what_it_holds(folder: Path, tmp_path: Path) -> None:
    before = model_digest(folder)
    moved = Path(os.rename(folder, tmp_path / "moved") or tmp_path / "moved")
    assert model_digest(moved) == before
    (moved / "model.safetensors").write_bytes(b"1")
    assert (first := model_digest(moved)) != before
    (moved / "model.safetensors").write_bytes(b"2")
    assert model_digest(moved) != first
    proof = {"target_sha256": {"model.safetensors": "ab"}, "made": "today"}
    (moved / "proof.json").write_text(json.dumps(proof))
    proven = model_digest(moved)
    (moved / "proof.json").write_text(json.dumps({**proof, "made": "tomorrow"}))
    assert model_digest(moved) == proven
    (moved / "proof.json").write_text(json.dumps({"target_sha256": {"model.safetensors": "cd"}}))
    assert model_digest(moved) != proven


def test_answers_of_retrained_weights_are_not_mixed(
    questions: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_eagle.cli.ask.open_answerer", lambda *_, **__: (Parrot(), folder))
    command = ["ask", str(folder), "--questions", str(questions), "--answers", str(folder.parent / "a.jsonl")]
    (folder / "proof.json").write_text(json.dumps({"target_sha256": {"model.safetensors": "ab"}}))
    with pytest.raises(SystemExit):
        main(command)
    assert "4 answered" in capsys.readouterr().out
    (folder / "proof.json").write_text(json.dumps({"target_sha256": {"model.safetensors": "cd"}}))
    with pytest.raises(SystemExit):
        main(command)
    assert "as it was asked of another model" in capsys.readouterr().err


def test_a_run_that_cannot_be_written_to_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "stage" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    exports = tmp_path / "run" / "exports"
    exports.write_text("a file, as root may write to any folder")
    with pytest.raises(UserError, match="cannot be exported to .*convert megatron-to-hf .* FOLDER' and name FOLDER"):
        exported_folder(checkpoint, lambda line: None)
    exports.unlink()
    monkeypatch.setattr(model_folder, "_export", lambda checkpoint, out, tokenizer: out.mkdir())
    made = exported_folder(checkpoint, lambda line: None)
    (exports / f"{made.name}.lock").unlink()
    (exports / f"{made.name}.lock").mkdir()  # cannot be opened, and need not be
    assert exported_folder(checkpoint, lambda line: None) == made


def test_one_s_own_questions_have_no_limits_but_the_model_s() -> None:
    from megatron_eagle.serving.limits import UNLIMITED, check_count

    check_count("image", 10**6, UNLIMITED.images)
    UNLIMITED.check_tiles(10**6)
    UNLIMITED.check_request([], Options(max_new_tokens=10**6))


def test_the_vllm_plug_in_names_encoders_that_it_has_not() -> None:
    check_encoders(["siglip"], ["siglip", "convnext"])
    with pytest.raises(ValueError, match="the encoders stripes, which the vLLM plug-in does not have; it has siglip"):
        check_encoders(["siglip", "stripes"], ["siglip", "convnext"])
