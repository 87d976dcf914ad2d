"""Overrides of the command line: texts are taken as they stand, what is no YAML is said in one line."""

import re
from pathlib import Path

import pytest

from megatron_eagle.cli import main
from megatron_eagle.config.recipe import Recipe, load_recipe
from megatron_eagle.errors import UserError

RECIPE = """\
name: my
model: {preset: tiny}
tokenizer: {kind: sentencepiece, path: t.model}
reading: {system: ""}
stages:
  - {name: s1, trainable: [connector], steps: 4, pack_length: 512, batch: 2, learning_rate: 1e-3, blend: [{path: a}]}
  - {name: s1.5, trainable: [connector], steps: 4, pack_length: 512, batch: 2, learning_rate: 1e-3, blend: [{path: a}]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "my.yaml").write_text(RECIPE)
    return tmp_path / "my.yaml"


def at(recipe: Recipe, *path: str) -> object:
    value: object = recipe
    for key in path:
        value = getattr(value, key)
    return value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reading.system={"], "override 'reading.system={': not YAML: "),
        (["reading.system=@foo"], "override 'reading.system=@foo': not YAML: "),
        (["reading.video.frame={number:.2f"], "not YAML: line 1, column 12"),
        (["stages.s1.blend=[{path: a"], "override 'stages.s1.blend=[{path: a': not YAML: "),
        (["reading.system=%x"], "quotes inside the argument make it a text"),
        (["reading.system='open"], "not YAML: "),
        (["model.initial_weights=*a"], "found undefined alias 'a'"),
        (["layout.tp=`"], "override 'layout.tp=`': not YAML: "),
        (["layout={tp: 1, tp: 2}"], "override 'layout={tp: 1, tp: 2}': tp is given twice"),
        (["reading.system=\n{"], r"override 'reading.system=\n{': not YAML: "),
        (["reading.system=\udcff"], "not UTF-8"),
        (["stages="], "override 'stages=': a list is wanted, there is nothing behind the '='"),
        (["stages=", "stages.s1.steps=4"], "override 'stages=': a list is wanted"),
        (["stages=null", "stages.s1.steps=4"], "override 'stages.s1.steps=4': there are no stages to change"),
        (["stages=5", "stages.s1.steps=4"], "override 'stages.s1.steps=4': 's1' is below a single value"),
        (["stages.s1.steps="], "override 'stages.s1.steps=': a whole number is wanted"),
        (["stages.s1.learning_rate= "], "a number is wanted"),
        (["stages.s1.async_save="], "true or false is wanted"),
        (["layout="], "a mapping is wanted"),
        (["stages.s1.blend.0.weight=" + "9" * 5000], "4300 digits"),
        (["stages.s2.steps=4"], "no entry 's2' among 2 (s1, s1.5)"),
        (["stages.s155.steps=4"], "no entry 's155' among 2 (s1, s1.5); did you mean s1.5?"),
        (["stages.\u00b2.steps=4"], "no entry '\u00b2' among 2"),
        (["layout..tp=2"], "is not of the form key.key=value"),
        (["stages.s1.steps=010"], "stages.s1.steps: a whole number of at least 1 is wanted (got '010', a leading zero"),
        (["stages.s1.5.steps=1:30"], "stages.s1.5.steps: a whole number of at least 1 is wanted (got '1:30'"),
        (["stages.s1.steps=yes"], "(got 'yes', a flag or a text)"),
        (["stages.s1.steps=true"], "(got true)"),
        (["stages.s1.learning_rate=.nan"], "a finite number above 0 is wanted (got nan)"),
        (["stages.s1.learning_rte=1"], "stages.s1.learning_rte: no such key; did you mean learning_rate?"),
        (["steps=3"], "steps: no such key; there is stages.NAME.steps"),
        (["layout.learning_rat=3"], "layout.learning_rat: no such key; there is stages.NAME.learning_rate"),
        (["reading.wieght=3"], "reading.wieght: no such key; there is stages.NAME.blend.0.weight"),
        (["model.language.hidden_sze=3"], "model.language.hidden_sze: no such key; did you mean hidden_size?"),
        (["model.encoders=[{kind: siglip, patch: 3}]"], "model.encoders.0.patch: no such key"),
        (["model.encoders=[{kind: sigip}]"], "did you mean siglip?"),
        (["model.preset=tine"], "model.preset: preset 'tine' does not exist; "),
        (["stages.s1.decay=cosin"], "(got 'cosin'); did you mean cosine?"),
        (["stages.s1.trainable=[visoin]"], "(got 'visoin'); did you mean vision?"),
        (["stages.s1.part_learning_rates={conector: 1}"], "stages.s1.part_learning_rates.conector: one of vision, "),
        ([f"layout.key{n}_of_many_wrong_ones={n}" for n in range(40)], "; and 3"),
        (["seed=1", "layout.tp=2", "seed=2"], "override 'seed=2': it would undo 'seed=1', which is given too"),
        (["seed=1", "seed=1"], "override 'seed=1': it would undo 'seed=1'"),
        (["stages.s1.steps=3", "stages.0.steps=4"], "'stages.0.steps=4': it would undo 'stages.s1.steps=3'"),
        (["stages.s1.layout.tp=2", "stages.s1.layout.tp=1"], "it would undo 'stages.s1.layout.tp=2'"),
        (["precision=fp4", "seed=-1", "layout.tp=0"], "; precision: one of fp32, bf16, fp8 is wanted"),
    ],
)
def test_wrong_overrides_end_in_one_line(recipe: Path, overrides: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["recipe", str(recipe), *overrides])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said, said
    assert said.count("\n") == 1 and len(said.replace(str(recipe), "")) < 400


SYSTEM, FRAME = ("reading", "system"), ("reading", "video", "frame")


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        (SYSTEM, "", ""),
        (SYSTEM, '""', ""),
        (SYSTEM, "'{'", "{"),
        (SYSTEM, '"a: b\\n"', "a: b\n"),
        (SYSTEM, "a # no comment", "a # no comment"),
        (SYSTEM, "key: value", "key: value"),
        (SYSTEM, "[a]", "[a]"),
        (SYSTEM, "010", "010"),
        (SYSTEM, "1e3", "1e3"),
        (SYSTEM, "yes", "yes"),
        (SYSTEM, "null", "null"),
        (SYSTEM, " two  spaces ", " two  spaces "),
        (SYSTEM, "It's {so} @ 5 %", "It's {so} @ 5 %"),
        (FRAME, "Frame {number}: ", "Frame {number}: "),
        (FRAME, "Frame {number} sample at {time:.2f} s: ", "Frame {number} sample at {time:.2f} s: "),
        (FRAME, "{number}: {time:.1f} ", None),
        (FRAME, '"{number}: {time:.1f} "', "{number}: {time:.1f} "),
        (("reading", "video", "header"), "Video {ordinal}: {seconds:.2f}", "Video {ordinal}: {seconds:.2f}"),
        (("name",), "5", "5"),
        (("model", "initial_weights"), "12", "12"),
        (("model", "initial_weights"), "", None),
        (("log", "wandb_project"), "null", None),
        (("log", "wandb_project"), "on", "on"),
    ],
)
def test_texts_are_taken_as_they_stand(recipe: Path, path: tuple[str, ...], text: str, value: str | None) -> None:
    override = f"{'.'.join(path)}={text}"
    if value is None and path == FRAME:  # it begins with a sign of YAML's and is none
        with pytest.raises(UserError, match=re.escape("quotes inside the argument")):
            load_recipe(recipe, [override])
    else:
        assert at(load_recipe(recipe, [override]), *path) == value


def test_numbers_and_flags_are_read_as_in_a_file(recipe: Path) -> None:
    changed = ["stages.s1.learning_rate=1e-4", "stages.s1.steps=1_000", "stages.s1.async_save=off", "seed=0x10"]
    read = load_recipe(recipe, [*changed, "stages.s1.layout=", "stages.s1.gpus=", "stages.s1.batch=4.0"])
    stage = read.stages[0]
    assert (stage.learning_rate, stage.steps, stage.async_save, read.seed, stage.batch) == (1e-4, 1000, False, 16, 4)
    assert stage.layout is None and stage.gpus is None


def test_overrides_may_go_into_one_another(recipe: Path) -> None:
    given = ["layout={cp: 2}", "layout.tp=2", "stages.s1.layout.tp=1", "stages.s1.steps=3", "stages.s1.5.steps=3"]
    read = load_recipe(recipe, given)
    assert (read.layout.cp, read.layout.tp, read.stages[0].layout.tp, read.stages[0].layout.cp) == (2, 2, 1, 2)


def test_an_override_changes_one_place_of_an_alias(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("blend: [{path: a}]}", "blend: &b [{path: a}]}", 1).replace("[{path: a}]}", "*b}"))
    recipe.write_text(recipe.read_text().replace("&b *b", "&b [{path: a}]"))
    read = load_recipe(recipe, ["stages.s1.blend.0.weight=3"])
    assert [stage.blend[0].weight for stage in read.stages] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seed: 1\nseed: 2", "my.yaml: seed is given twice, in lines 8 and 9"),
        ("layout: {tp: 1, tp: 2}", "layout.tp is given twice, in lines 8 and 8"),
        ("seed: 1\nstages: []", "stages is given twice, in lines 5 and 9"),
        ("seed: 010", "seed: a whole number of at least 0 is wanted (got '010'"),
        ("seed: 1:30", "(got '1:30', which some read as a number to the base of 60)"),
        ("seed: yes", "(got 'yes', a flag or a text)"),
        ("seed: .inf", "(got inf)"),
        ("optimizer: {beta1: 1}", "optimizer.beta1: a finite number of at least 0 and below 1 is wanted (got 1)"),
        ("optimizer: {eps: .nan}", "optimizer.eps: a finite number above 0 is wanted (got nan)"),
        ("log: {tensorboard: 1}", "log.tensorboard: true or false is wanted (got 1)"),
        ("log: {wandb_project: 12}", "log.wandb_project: a text is wanted (got 12): put it in quotes"),
        ("---\nseed: 1", "expected a single document in the stream but found another document"),
        ("layout:\n\ttp: 1", "(indent with spaces)"),
        ("1: 2", "line 8: the key '1' is no text"),
    ],
)
def test_files_that_do_not_mean_what_they_say(recipe: Path, line: str, words: str) -> None:
    recipe.write_text(f"{RECIPE}{line}\n")
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        load_recipe(recipe)
    assert "\n" not in str(refused.value)


def test_profiles_are_read_by_the_same_loader(tmp_path: Path, capsys) -> None:
    from megatron_eagle.cluster.profile import load_profile
    from megatron_eagle.planning.hardware import load_hardware, shipped_hardware

    (tmp_path / "c.yaml").write_text("name: c\ntasks_per_node: 2\nstop_secnds: 3\ntime_limit: 12:00:00\n")
    with pytest.raises(UserError, match=r"c\.yaml: stop_secnds: no such key; did you mean stop_seconds\?"):
        load_profile(str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_text("name: c\ntasks_per_node: 2\ntime_limit: 12:00:00\nenvironment: {A: on}\n")
    profile = load_profile(str(tmp_path / "c.yaml"))
    assert profile.time_limit == "12:00:00" and profile.environment == {"A": "on"}
    text = shipped_hardware()["h100"].read_text()
    (tmp_path / "h.yaml").write_text(f"{text}\nname: twice\n")
    with pytest.raises(UserError, match="name is given twice, in lines"):
        load_hardware(str(tmp_path / "h.yaml"))
    (tmp_path / "h.yaml").write_text(re.sub(r"^link_share: .*$", "link_share: .nan", text, flags=re.MULTILINE))
    with pytest.raises(UserError, match=r"link_share: .* above 0 and at most 1 is wanted \(got nan\)"):
        load_hardware(str(tmp_path / "h.yaml"))
