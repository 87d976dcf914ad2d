# megatron-eagle on NVIDIA's PyTorch image, which brings CUDA, NCCL, Transformer Engine, apex and DALI built for each
# other. Torch, triton and numpy are therefore the image's, not setup.py's; every other version here is setup.py's
# (tests/slurm/test_dockerfile.py). docs/slurm.md says how to make an enroot or apptainer image of it.
#
#   docker build --tag megatron-eagle .
ARG BASE=nvcr.io/nvidia/pytorch:25.09-py3
FROM ${BASE}

# Python 3.11 is what the project is tested with; the image's own version runs it too, but is not what the tests saw.
WORKDIR /opt/megatron-eagle

RUN pip install --no-cache-dir \
    annotated-types==0.8.0 \
    jinja2==3.1.6 \
    matplotlib==3.11.2 \
    megatron-energon==7.4.1 \
    pillow==13.0.0 \
    psutil==7.2.2 \
    pydantic==2.14.3 \
    pyyaml==6.0.3 \
    safetensors==0.8.0 \
    sentencepiece==0.2.3 \
    tensorboard==2.21.0 \
    tokenizers==0.23.3 \
    tqdm==4.70.1 \
    transformers==5.23.0 \
 && pip install --no-cache-dir --no-deps megatron-core==0.16.1

COPY . .
# Editable: `megatron-eagle submit` reads its templates from slurm/ of the checkout.
RUN pip install --no-cache-dir --no-deps --ignore-requires-python --editable . \
 && megatron-eagle --version
