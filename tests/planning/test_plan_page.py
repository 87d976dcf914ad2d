"""``plan --html``: the page says what the plan says, and what lies between two passes is the time that is waited."""

import pytest
from browser import assert_fits

from megatron_eagle.cli import main
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.planning.hardware import load_hardware
from megatron_eagle.planning.page import MEMORY_PARTS, STEP_PARTS, view_stage, write_page
from megatron_eagle.planning.plan import plan_stage
from megatron_eagle.planning.samples import Mix
from megatron_eagle.planning.search import with_layout

H100 = load_hardware("h100")


def planned(layout, gpus=256):
    recipe = load_recipe("eagle2-9b", [])
    variant = with_layout(recipe, recipe.stage("stage1.5"), layout, "selective")
    return plan_stage(variant, variant.stage("stage1.5"), gpus, H100, Mix(), simulated=1)


@pytest.fixture(scope="module")
def plans():
    """One that does not fit, one with interleaved stages that does."""
    spread = {"encoder": "spread", "encoder_chunk": 8, "sequence_parallel": True}
    return planned(Layout(tp=2, pp=4, sequence_parallel=True)), planned(Layout(tp=4, pp=2, vpp=2, **spread))


def test_bars_add_up_to_the_plan(plans):
    view = view_stage(plans[1], plans[::-1])
    memory = view.memory[0]
    held = plans[1].memory[0]
    assert sum(part.width for part in memory.parts) / view.limit == pytest.approx(held.peak / H100.usable_bytes)
    assert [part.title.split(":")[0] for part in memory.parts] == list(MEMORY_PARTS) and memory.good
    assert sum(part.width for part in view.step[0].parts) == pytest.approx(100)
    slowest = max(plan.seconds for plan in plans)
    widths = [sum(part.width for part in row.parts) for row in view.layouts]
    assert widths == pytest.approx([100 * plan.seconds / slowest for plan in plans[::-1]])


def test_lanes_show_the_bubble(plans):
    for plan in plans:
        for number, lane in enumerate(view_stage(plan, ()).lanes):
            assert len(lane.spans) == len(plan.timeline.ends[number])
            busy = 1000 * plan.timeline.busy[number] / plan.pipeline
            assert sum(span.width for span in lane.spans) == pytest.approx(busy)
            ends = [span.left + span.width for span in lane.spans]
            assert all(span.left >= end - 1e-6 for span, end in zip(lane.spans[1:], ends, strict=False))
            assert ("chunk 1" in " ".join(span.title for span in lane.spans)) == bool(plan.layout.vpp)


@pytest.fixture
def page(plans, tmp_path):
    write_page("eagle2-9b", H100, [(plans[0], ()), (plans[1], plans[::-1])], tmp_path / "out" / "plan.html", fp8=False)
    return tmp_path / "out" / "plan.html"


def test_the_page_shows_ranks_schedule_and_layouts(page, plans):
    text = page.read_text()
    assert text.count(">pipeline rank 3<") == 2 and "does not fit" in text and ": fits" in text
    assert text.count("<rect") == sum(len(ends) for plan in plans for ends in plan.timeline.ends)
    assert f"{100 * plans[0].timeline.bubble:.0f} % of it bubble" in text
    assert "1. tp=4 pp=2 vpp=2" in text and "2. tp=2 pp=4" in text and "layout: {tp: 4, pp: 2, vpp: 2" in text
    for part in (*MEMORY_PARTS, *STEP_PARTS):
        assert f"</i>{part}</span>" in text


@pytest.mark.slow
def test_the_page_fits_a_narrow_window(page, tmp_path):
    assert_fits(page, tmp_path)


def test_the_command_writes_it_also_of_what_does_not_fit(tmp_path, capsys):
    out = tmp_path / "plan.html"
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "plan",
                "eagle2-9b",
                "--stage",
                "stage1.5",
                "--gpus",
                "256",
                "--html",
                str(out),
                "layout.tp=2",
                "layout.pp=4",
            ]
        )
    said = capsys.readouterr()
    assert str(out) in said.out and "stage1.5 needs" in said.err and "does not fit" in out.read_text()
    assert stopped.value.code == 2


def test_stages_that_fit_nowhere_are_named(tmp_path, capsys):
    out = tmp_path / "plan.html"
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "eagle2-9b", "--stage", "stage2", "--gpus", "1", "--search", "--html", str(out)])
    said, line = capsys.readouterr(), "stage2 on 1 h100: no layout fits"
    assert stopped.value.code == 2 and said.err == f"megatron-eagle: {line}\n"
    assert f'<p class="bad">{line}</p>' in out.read_text() and "<table>" not in out.read_text()


def test_a_dry_run_has_no_page(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "tiny", "--gpus", "2", "--dry-run", "--html", "x.html"])
    assert "--html shows a plan or a search" in capsys.readouterr().err
