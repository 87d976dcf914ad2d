"""A hardware profile of this machine, fitted to passes of Eagle2-1B; later parts plan with it."""

from megatron_eagle.gpu_day.alone import alone
from megatron_eagle.gpu_day.part import PROFILE, UNKNOWN_GPU, PartResult, Setting, Table
from megatron_eagle.gpu_day.sizes import EAGLE_1B
from megatron_eagle.measuring.calibrate import FITTED, calibrate
from megatron_eagle.planning.hardware import hardware_as_yaml, load_hardware


def run(setting: Setting) -> PartResult:
    """Writes the profile into the day's folder: ``megatron-eagle plan RECIPE --gpu FOLDER/profile.yaml``."""
    start = load_hardware(setting.shipped_profile())
    recipe = EAGLE_1B.recipe(setting.toy).with_kernels_on(setting.platform.device.type)
    with alone(setting.platform):
        found = calibrate(recipe, recipe.stages[0], setting.platform, start)
    assert found is not None  # this process is rank 0
    (setting.folder / PROFILE).write_text(hardware_as_yaml(found), encoding="utf-8")
    before, after = vars(start), vars(found)
    rows = tuple((name, f"{before[name]:.3g}", f"{after[name]:.3g}") for name in FITTED)
    assumed = f"peaks, memory and links: not measured, those of the profile {start.name}"
    unknown = setting.cuda and start.name == UNKNOWN_GPU and "h100" not in setting.device_name.lower()
    return PartResult(
        tables=(Table(f"{PROFILE}: {found.sources['products']}", ("", start.name, "calibrated"), rows),),
        values={name: after[name] for name in FITTED},
        skipped=(assumed + f", for there is none of {setting.device_name}",)
        if unknown
        else (assumed,)
        if setting.cuda
        else (),
    )
