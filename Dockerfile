# megatron-direct on NVIDIA's PyTorch image: torch with CUDA, Apex and Transformer Engine come with it.
#
#     docker build -t megatron-direct .
#     docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/workspace/megatron-direct/runs" \
#         megatron-direct bash launch/anneal_gpt.sh
#
# 25.11 is the image that megatron-core 0.16.1 was built on: a later one needs a later image.
ARG BASE=nvcr.io/nvidia/pytorch:25.11-py3
FROM ${BASE}
ARG CORE=0.16.1

WORKDIR /workspace/megatron-direct
COPY setup.py README.md ./
COPY megatron_direct megatron_direct
COPY launch launch
COPY tools tools

# The image's own torch must stay: pip is told which one that is.
RUN python -c "import torch; print('torch==' + torch.__version__)" > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt "megatron-core==${CORE}" -e ".[mpi]"

ENTRYPOINT []
CMD ["bash"]
