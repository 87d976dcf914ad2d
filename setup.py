"""Packaging of megatron-eagle: what is installed, and which packages it needs at least.

The lower ends are the oldest versions the tests were run with, the exact versions of the tested environments are in
constraints/ (docs/decisions.md says why there are two). tests/install/test_pins.py holds the three against each other,
against every other mention of a version, and these names against the imports.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# An upper end stands where this project leans on what a package does not promise (megatron_eagle/compat).
TRAINER = [
    "av>=18.1",
    "jinja2>=3.1",
    "markupsafe>=3.0",
    "matplotlib>=3.11",
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core==0.19.2; python_version >= '3.12'",
    "megatron-energon==7.4.1",
    "multi-storage-client>=1.3,<2",
    "numpy>=2.4",
    "pillow>=12.3",
    "psutil>=7.2",
    "pyarrow>=26.0",
    "pydantic>=2.14",
    "pyyaml>=6.0.3",
    "safetensors>=0.8",
    "sentencepiece>=0.2.2",
    "shtab>=1.13",
    "simplejpeg>=1.9",
    "tensorboard>=2.21",
    "tokenizers>=0.23.2",
    "torch>=2.11,<2.14",
    "tqdm>=4.70",
    "transformers>=5.17,<6",
    # Triton has wheels for this platform only, and so have our kernels.
    "liger-kernel>=0.8.5,<0.9; platform_system == 'Linux' and platform_machine == 'x86_64'",
    "triton>=3.6,<3.8; platform_system == 'Linux' and platform_machine == 'x86_64'",
]
# Transformer Engine builds against the CUDA and cuDNN of the machine; a GPU container brings it.
GPU = [
    "nvidia-dali-cuda130>=2.4",
    "transformer-engine[pytorch]>=2.9,<2.12; python_version < '3.12'",
    "transformer-engine[pytorch]>=2.16; python_version >= '3.12'",
]
# Documents are read when a data set is built; training needs no renderer.
DOCUMENTS = ["pypdfium2>=5.15"]
# Curation on more than one machine.
RAY = ["ray>=2.60,<3"]
# Only two operators of curation need them: "subset" and "language".
CURATE = ["faiss-cpu>=1.15", "py3langid>=0.4"]
# Models that are asked over HTTP: operators that augment or verify, and judges.
ASKING = ["openai>=3.57,<4"]
# `verify --lora` holds adapters against it; training needs none of it.
LORA = ["peft>=0.21"]
# Base weights in NF4 under LoRA (`lora.base`).
QUANTISED = ["bitsandbytes>=0.50.2"]
# Gauges of a run for node exporter to read (megatron_eagle/training/prometheus.py).
PROMETHEUS = ["prometheus-client>=0.26"]
# Data sets in S3 and what speaks its protocol; the client's other extras are for other stores (docs/data.md).
S3 = ["multi-storage-client[boto3]>=1.3,<2"]
TESTS = [
    "jsonschema",  # recipes against the schema for editors
    "hypothesis",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "setuptools",
]
# The endpoint's; with the page's, whose Gradio takes no Pillow of 13 (docs/install.md), the extra "serve".
ENDPOINT = ["python-multipart>=0.0.34", "starlette>=1.10", "uvicorn>=0.54"]
PAGE = ["fastapi>=0.165", "gradio>=6.31,<7"]
# The documentation as a site: make docs has it in a folder of its own.
DOCS = ["mkdocs-material>=9.8,<10"]
DEV = [*TESTS, "mypy", "ruff", "types-pyyaml", "types-tqdm"]


setup(
    name="megatron-eagle",
    version="0.1.0",
    description="Trains Eagle 2 and Eagle 2.5 vision-language models on Megatron-Core, on a laptop or a cluster",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.11,<3.14",
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
        "megatron_eagle.curation": ["*.j2"],
        "megatron_eagle.data.reports": ["*.j2"],
        "megatron_eagle.demo": ["*.j2"],
        "megatron_eagle.evaluation.benchmarks": ["*.j2"],
        "megatron_eagle.measuring": ["*.j2"],
        "megatron_eagle.pages": ["*.j2"],
        "megatron_eagle.planning": ["profiles/*.yaml", "*.j2"],
        "megatron_eagle.recipes": [
            "*/recipe.yaml",
            "finetune/*/recipe.yaml",
            "finetune/README.md",
            "finetune/rules.yaml",
            "curation/*.yaml",
        ],
        "megatron_eagle.runs": ["*.j2"],
        "megatron_eagle.slurm": ["*.sbatch", "*.bash", "profiles/*.yaml"],
    },
    install_requires=TRAINER,
    extras_require={
        "gpu": GPU,
        "documents": DOCUMENTS,
        "curate": CURATE,
        "ray": RAY,
        "s3": S3,
        "endpoint": ASKING,
        "lora": LORA,
        "quantised": QUANTISED,
        "prometheus": PROMETHEUS,
        "serve": [*ENDPOINT, *PAGE],
        "docs": DOCS,
        "dev": [*DEV, *DOCUMENTS, *CURATE, *ASKING, *LORA, *PROMETHEUS, *ENDPOINT],
    },
    entry_points={
        "console_scripts": ["megatron-eagle=megatron_eagle.__main__:run"],
        # vLLM has an environment of its own, where this package is installed without what it requires (docs/vllm.md).
        "vllm.general_plugins": ["megatron_eagle=megatron_eagle.serving.vllm:register"],
        "lmms_eval.models": ["megatron_eagle=megatron_eagle.serving.lmms:manifest"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
