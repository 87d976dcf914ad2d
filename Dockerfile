# megatron-eagle on NVIDIA's PyTorch image, which brings CUDA, NCCL, Transformer Engine, apex and DALI built for each
# other. What is built for the image's CUDA is therefore the image's, not ours; every other version here is
# that of constraints/ (tests/slurm/test_dockerfile.py). docs/slurm.md says how to make an enroot or apptainer image of it.
#
#   docker build --tag megatron-eagle .
#
# 26.06 is the image whose PyTorch is the tests', 2.13; it has transformer-engine==2.16.0 and Python 3.12, and so the
# stack with megatron-core==0.19.2.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}

WORKDIR /opt/megatron-eagle

# The image holds pip to its own version of every package it contains (PIP_CONSTRAINT), also of those that setup.py
# pins to another one. Held from here on is only what is built for the image's CUDA, and what that was built against.
RUN python -m pip list --format=freeze \
  | grep -iE '^(torch|torchvision|triton|pytorch-triton|numpy|apex|flash[-_]attn|transformer[-_]engine.*|nvidia-dali.*)==' \
  > /etc/pip/built-for-this-image.txt && cat /etc/pip/built-for-this-image.txt
ENV PIP_CONSTRAINT=/etc/pip/built-for-this-image.txt

RUN pip install --no-cache-dir \
    av==18.1.0 \
    jinja2==3.1.6 \
    liger-kernel==0.8.5 \
    markupsafe==3.0.4 \
    matplotlib==3.11.2 \
    megatron-energon==7.4.1 \
    multi-storage-client==1.3.1 \
    pillow==13.0.0 \
    psutil==7.2.2 \
    pyarrow==26.0.1 \
    pydantic==2.14.3 \
    pyyaml==6.0.3 \
    safetensors==0.8.0 \
    sentencepiece==0.2.3 \
    shtab==1.13.0 \
    simplejpeg==1.9.0 \
    tensorboard==2.21.0 \
    tokenizers==0.23.3 \
    tqdm==4.70.1 \
    transformers==5.23.0 \
 && pip install --no-cache-dir --no-deps megatron-core==0.19.2

COPY . .
# setup.py's packages are the library, the kernels, the recipes and the batch scripts; all are looked for, and so is the
# image's Transformer Engine (importing it would want a GPU).
RUN pip install --no-cache-dir --no-deps . \
 && cd / && megatron-eagle --version && python -c "import eagle_kernels" \
 && megatron-eagle submit eagle2-9b --cluster h100 --dry-run >/dev/null \
 && python -c "import importlib.metadata as m; v = m.version('transformer-engine'); assert v.startswith('2.16.'), v"
