# megatron-direct on NVIDIA's PyTorch image: torch with CUDA, Apex and Transformer Engine come with it.
#
#     docker build -t megatron-direct .
#     docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data -e GPUS_PER_NODE=8 \
#         megatron-direct bash launch/anneal_gpt.sh --load /data/theta --run-dir /data/runs/mine \
#         --data-path /data/wiki_pool --valid-data-path /data/wiki_valid --test-data-path /data/wiki_test \
#         --lr-wsd-decay-iters 2000
#
# 26.06 is the image that megatron-core 0.19 was built on, 25.11 that of 0.16.1:
#
#     docker build -t megatron-direct:core-0.16 --build-arg BASE=nvcr.io/nvidia/pytorch:25.11-py3 \
#         --build-arg CORE=0.16.1 --build-arg CONSTRAINTS=constraints-cpu.txt .
#
# The user has no special rights. Where mounted folders belong to another one:
# --build-arg USER_ID=$(id -u), or docker run --user.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
# hadolint ignore=DL3006 # the tag is in the argument
FROM ${BASE}

ARG BASE
ARG CORE=0.19.2
ARG CONSTRAINTS=constraints-core-0.19.txt
ARG USER_ID=2000

LABEL org.opencontainers.image.title="megatron-direct" \
      org.opencontainers.image.description="Principled sample selection for the annealing phase of LLM pre-training, on Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}" \
      megatron-core.version="${CORE}"

WORKDIR /workspace/megatron-direct
COPY setup.py pyproject.toml README.md LICENSE constraints-*.txt ./
COPY megatron_direct megatron_direct
COPY launch launch
COPY tools tools

# What the image brings must stay as it is, and what it does not bring has the version that was
# tested. The image's own list of constraints, which pip reads from PIP_CONSTRAINT, would refuse
# megatron-core's requirements.
RUN python tools/image_constraints.py "${CONSTRAINTS}" > constraints.txt \
    && PIP_CONSTRAINT="" pip install --no-cache-dir -c constraints.txt \
        "megatron-core==${CORE}" ".[mpi,data]" \
    && rm -rf build ./*.egg-info

RUN useradd --no-log-init --create-home --non-unique --uid "${USER_ID}" direct \
    && install -d -o direct runs
USER ${USER_ID}

# A container that runs a rank is not asked to meet others.
HEALTHCHECK --interval=30m --timeout=3m --start-period=2m --retries=1 \
    CMD ["env", "-u", "RANK", "-u", "WORLD_SIZE", "megatron-direct", "doctor", "--shared-folder", "/tmp"]

ENTRYPOINT []
CMD ["bash"]
