"""What is imported is not collected meanwhile, and never looked through again."""

import gc

import pytest

from megatron_eagle.importing import importing


@pytest.mark.parametrize("collecting", [True, False])
def test_what_exists_at_its_end_is_frozen_and_collecting_is_as_it_was(collecting: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    frozen = gc.get_freeze_count()
    try:
        with importing():
            assert not gc.isenabled()
            made = [[] for _ in range(1000)]
        assert gc.isenabled() is collecting and gc.get_freeze_count() >= frozen + len(made)
        assert not any(item is made[0] for item in gc.get_objects(generation=2))
    finally:
        (gc.enable if before else gc.disable)()
