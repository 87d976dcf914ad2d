"""Packaging of megatron-eagle. Versions are pinned exactly to what the tests were run with (docs/decisions.md)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

TRAINER = [
    "annotated-types==0.8.0",
    "av==18.1.0",
    "jinja2==3.1.6",
    "matplotlib==3.11.2",
    "megatron-core==0.16.1",
    "megatron-energon==7.4.1",
    "numpy==2.4.6",
    "pillow==13.0.0",
    "psutil==7.2.2",
    "pydantic==2.14.3",
    "pyyaml==6.0.3",
    "safetensors==0.8.0",
    "sentencepiece==0.2.3",
    "simplejpeg==1.9.0",
    "tensorboard==2.21.0",
    "tokenizers==0.23.3",
    "torch==2.13.0",
    "tqdm==4.70.1",
    "transformers==5.23.0",
    'triton==3.7.1; platform_system == "Linux" and platform_machine == "x86_64"',
]

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
    ],
    package_dir={"eagle_kernels": "kernels/eagle_kernels"},
    package_data={
        "megatron_eagle": ["py.typed"],
        "megatron_eagle.demo": ["*.j2"],
        "megatron_eagle.planning": ["profiles/*.yaml"],
    },
    install_requires=TRAINER,
    extras_require={
        # Transformer Engine builds against the CUDA and cuDNN of the machine; a GPU container brings it.
        "gpu": ["transformer-engine[pytorch]==2.11.0", "nvidia-dali-cuda130==2.4.0"],
        "dev": [
            "hypothesis==6.170.15",
            "mypy==2.4.1",
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",
            "ruff==0.17.5",
            "types-pyyaml==6.0.12.20261113",
            "types-tqdm==4.70.0.20261106",
        ],
    },
    entry_points={"console_scripts": ["megatron-eagle=megatron_eagle.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
