"""Packaging of megatron-eagle: what is installed, and which packages it needs.

Versions are pinned in one place, constraints.txt, exactly to what the tests were run with (docs/decisions.md).
tests/install/test_pins.py holds every other mention of a version against it, and these names against the imports.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LINES = (line.partition("#")[0].strip() for line in (HERE / "constraints.txt").read_text(encoding="utf-8").splitlines())
PINS = {name.lower(): version for name, _, version in (line.partition("==") for line in LINES if line)}

TRAINER = [
    "av",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "megatron-core",
    "megatron-energon",
    "numpy",
    "pillow",
    "psutil",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "sentencepiece",
    "simplejpeg",
    "tensorboard",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
]
DOCUMENTS = ["pypdfium2"]
TRITON = "triton"  # has wheels for this platform only, and so have our kernels
DEV = ["hypothesis", "mypy", "pytest", "pytest-timeout", "ruff", "setuptools", "types-pyyaml", "types-tqdm"]


def pinned(name: str, extra: str = "", marker: str = "") -> str:
    """The requirement at the version of constraints.txt."""
    return f"{name}{extra}=={PINS[name]}{marker}"


setup(
    name="megatron-eagle",
    version="0.1.0",
    description="Trains Eagle 2 and Eagle 2.5 vision-language models on Megatron-Core, on a laptop or a cluster",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    packages=[
        *find_packages(include=["megatron_eagle", "megatron_eagle.*"]),
        *(f"eagle_kernels{name}" for name in ("", *(f".{part}" for part in find_packages("kernels/eagle_kernels")))),
        "megatron_eagle.recipes",
        "megatron_eagle.slurm",
    ],
    # Recipes and batch scripts stay at the top, where people look for them (megatron_eagle/config/shipped.py).
    package_dir={
        "eagle_kernels": "kernels/eagle_kernels",
        "megatron_eagle.recipes": "examples",
        "megatron_eagle.slurm": "slurm",
    },
    package_data={
        "megatron_eagle": ["py.typed"],
        "megatron_eagle.demo": ["*.j2"],
        "megatron_eagle.planning": ["profiles/*.yaml"],
        "megatron_eagle.recipes": ["*/recipe.yaml"],
        "megatron_eagle.slurm": ["*.sbatch", "profiles/*.yaml"],
    },
    install_requires=[
        *map(pinned, TRAINER),
        pinned(TRITON, marker='; platform_system == "Linux" and platform_machine == "x86_64"'),
    ],
    extras_require={
        # Transformer Engine builds against the CUDA and cuDNN of the machine; a GPU container brings it.
        "gpu": [pinned("transformer-engine", extra="[pytorch]"), pinned("nvidia-dali-cuda130")],
        # Documents are read when a data set is built; training needs no renderer.
        "documents": list(map(pinned, DOCUMENTS)),
        "dev": list(map(pinned, [*DEV, *DOCUMENTS])),
    },
    entry_points={"console_scripts": ["megatron-eagle=megatron_eagle.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
