# The two commands: `make anneal` and `make test`. Everything they need is installed into .venv.

# The first of these Pythons that runs. One that is found need not: pyenv puts names on the path of
# versions that are not the chosen one.
ifndef PYTHON
PYTHON := $(shell for python in python3.12 python3.13 python3.11 python3.10; do \
	$$python -c "" 2> /dev/null && echo $$python && break; done)
endif
# The last megatron-core of the version of a checkout of Megatron-LM; else the newest that the Python
# can have.
ifndef CORE
ifdef MEGATRON_LM_PATH
CORE := $(filter 0.$(shell sed -n 's/^MINOR = //p' \
	"$(MEGATRON_LM_PATH)/megatron/core/package_info.py" 2> /dev/null).%,0.16.1 0.17.1 0.18.2 0.19.2)
endif
ifeq ($(CORE),)
CORE := $(shell $(PYTHON) -c \
	'import sys; print("0.19.2" if sys.version_info >= (3, 12) else "0.16.1")')
endif
endif
# What was tested together.
CONSTRAINTS := $(if $(filter 0.16.%,$(CORE)),constraints-cpu.txt,constraints-core-0.19.txt)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Beside it: one for each megatron-core, and Python, that the tests were asked to run with.
CORE_VENV := .venvs/core-$(CORE)-$(notdir $(PYTHON))
BRIDGE_VENV := .venvs/bridge
# What megatron-bridge imports and runs on a CPU.
BRIDGE_IMPORTS := "transformers<=5.12.1" omegaconf hydra-core pyyaml rich tensorboard datasets \
	accelerate peft six regex einops wandb

BUILD := build
TEXT := $(BUILD)/text/.done
DATA := $(BUILD)/data
EMBEDDED := $(DATA)/embedded
DOMAINS := docstrings source licenses
THETA := $(BUILD)/theta
RUN := runs/embedded
CLOZE := $(BUILD)/cloze

# The embedded run's environment, for launch/anneal_gpt.sh.
export CHECKPOINT_PATH ?= $(THETA)
export RUN_DIR ?= $(RUN)
export DATA_PATH ?= $(DOMAINS:%=$(EMBEDDED)_%_pool)
export VALID_DATA_PATH ?= $(DOMAINS:%=$(EMBEDDED)_%_valid)
export TEST_DATA_PATH ?= $(DOMAINS:%=$(EMBEDDED)_%_test)

# What has a GPU in its name runs on the machine's; all else on the CPU, where two ranks cannot be in
# each other's way, unless GPUS says which (GPUS=0,1).
FOR_GPU := $(filter %-gpu,$(MAKECMDGOALS))
ifeq ($(FOR_GPU),)
export CUDA_VISIBLE_DEVICES := $(GPUS)
endif

# Two ranks, one a core, and sizes that end in five to twelve minutes on them. The annealing sees
# 0.43 times the tokens of the pool.
export GPUS_PER_NODE ?= 2
TEXT_FLAGS := --max-files 180
PRETRAIN_FLAGS := --train-iters 200
SELECT_FLAGS := --curvature gauss-newton --num-curvature-samples 32 --num-eigenpairs 12 \
	--lanczos-tol 0.01
ANNEAL_FLAGS := $(SELECT_FLAGS) --lr-wsd-decay-iters 75

# The smallest of the study: one setting, the arms that matter most, three seeds.
COMPARE_FLAGS := --sizes small --settings corrupted --num-seeds 3 --arms random perplexity-middle \
	gradient-dot gradient-cosine flat-energy direct

# What needs root, and programs that pip does not install, has targets of its own.
QUICK := "not slow and not slurm and not nodes"

.PHONY: anneal data theta clean lint \
	compare evaluate how-many megatron-lm-checkout study study-gpu study-packages \
	test test-agreement test-checkpoints test-faults test-fuzz test-gpu test-image \
	test-lm-eval test-megatron test-megatron-bridge test-megatron-lm test-nodes test-slow test-slurm \
	bench-curvature bench-data bench-estimates bench-gpu bench-peers bench-scale \
	bench-select bench-sketch bench-solver

anneal: $(READY) data theta
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 bash launch/anneal_gpt.sh $(ANNEAL_FLAGS) $(FLAGS)

# The checkpoint and, where `make anneal` has been, the annealed arms.
evaluate: $(READY) theta $(CLOZE)/.done
	for checkpoint in $(THETA) $(wildcard $(RUN)/anneal/*/checkpoints); do \
		name=$${checkpoint%/checkpoints}; name=$${name##*/}; echo "$$name:"; \
		OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(GPUS_PER_NODE) \
			-m megatron_direct evaluate --load $$checkpoint \
			--tokenizer-model $(DATA)/tokenizer.model \
			--tasks $(DOMAINS:%=$(CLOZE)/embedded_%_test.jsonl) \
			--output $(BUILD)/evaluation/$$name.json $(FLAGS) || exit 1; \
	done

data: $(DATA)/.done
theta: $(THETA)/.done

# Two processes, each with its own pool of ranks. The tests of a file stay in one of them, since they
# share what was trained for the first; files start in the order of tests/conftest.py. Where there
# are more cores: TEST_PROCESSES=8.
TEST_PROCESSES ?= 2
PYTEST := -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m $(QUICK) $(TESTS)

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow

# Damaged files through every reader: by random changes, then a while for each by atheris, which
# looks for changes that reach new code.
FUZZ_FILES ?= 100000
FUZZ_SECONDS ?= 20
test-fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/campaign.py --files $(FUZZ_FILES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) atheris
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/guided.py --seconds $(FUZZ_SECONDS)

# A Slurm of two virtual nodes, from Debian's packages slurmctld, slurmd, slurm-client and munge; two
# network namespaces. Both as root.
test-slurm: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm --durations=0 tests/launch

test-nodes: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nodes --durations=0 tests/launch

# Dockerfile and Kubernetes example by their rules; the Dockerfile's own steps, in an environment
# that stands for the image, without a GPU.
test-image: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[cluster]"
	$(BIN)/python -m pytest tests/launch/test_pytorchjob.py tests/tools/test_try_dockerfile.py
	$(BIN)/python tools/try_dockerfile.py --folder $(BUILD)/image \
		--build-arg CORE=$(CORE) --build-arg CONSTRAINTS=$(CONSTRAINTS) $(FLAGS)

# lm-evaluation-harness on local tasks, without a network but for its installation, which may need
# other versions of some packages than the constraints have.
test-lm-eval: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[eval]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/commands/test_lm_eval.py

# Kills, full disks, lost ranks (docs/faults.md); resumes, and prints a table. About FAULT_MINUTES.
FAULT_MINUTES ?= 25
test-faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults --minutes $(FAULT_MINUTES) $(FLAGS)

# With any megatron-core that is supported: make test-megatron CORE=0.18.2 PYTHON=python3.12
test-megatron: $(CORE_VENV)/.ready
	OMP_NUM_THREADS=1 $(CORE_VENV)/bin/python $(PYTEST) -m $(QUICK) $(TESTS)

# Megatron-LM's own loop, tools and dataset tests, from a checkout of any supported version:
# make test-megatron-lm MEGATRON_LM_PATH=../Megatron-LM PYTHON=python3.12
test-megatron-lm: megatron-lm-checkout $(CORE_VENV)/.ready
	$(CORE_VENV)/bin/pip install --quiet --disable-pip-version-check \
		-c $(CORE_VENV)/constraints.txt -e ".[megatron-lm]"
	MEGATRON_LM_PATH=$(abspath $(MEGATRON_LM_PATH)) OMP_NUM_THREADS=1 \
		$(CORE_VENV)/bin/python -m pytest $(if $(TESTS),$(TESTS),tests/plugins)

megatron-lm-checkout:
	@test -f "$(MEGATRON_LM_PATH)/pretrain_gpt.py" || \
		(echo 'MEGATRON_LM_PATH="$(MEGATRON_LM_PATH)" is not a checkout of Megatron-LM'; false)

# Megatron-Bridge, which needs Python 3.12, without the packages that need CUDA:
# make test-megatron-bridge PYTHON=python3.12
test-megatron-bridge: $(BRIDGE_VENV)/.ready
	$(BRIDGE_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		megatron-bridge==0.6.2
	$(BRIDGE_VENV)/bin/pip install --quiet --disable-pip-version-check $(BRIDGE_IMPORTS)
	OMP_NUM_THREADS=1 $(BRIDGE_VENV)/bin/python -m pytest \
		tests/plugins/test_megatron_bridge.py tests/plugins/test_megatron_bridge_checkpoints.py

# Between all versions that test-megatron has installed: what one has saved, the others train on.
test-checkpoints:
	$(firstword $(wildcard .venvs/*))/bin/python tests/checkpoint_versions.py $(wildcard .venvs/*)

# What they compute from one checkpoint: .venv has to be of the earliest version.
test-agreement: $(READY)
	$(BIN)/python tests/version_agreement.py $(VENV) $(wildcard .venvs/*)

compare: $(READY)
	$(BIN)/python benchmarks/study.py --folder runs/compare --ranks $(GPUS_PER_NODE) \
		$(COMPARE_FLAGS) $(FLAGS)

study: $(READY)
	mkdir -p $(BUILD)
	$(BIN)/python benchmarks/study.py --results $(BUILD)/results-study.md $(FLAGS)

# Text of Python packages, which are downloaded, and the comparison on it. STUDY_TEXT names a folder
# in which tools/pypi_text.py has been, where there is no network.
STUDY_TEXT ?= $(BUILD)/package-text

study-packages: $(READY) $(STUDY_TEXT)/corpus.json
	$(BIN)/python benchmarks/package_study.py --text $(STUDY_TEXT) --ranks $(GPUS_PER_NODE) \
		--results $(BUILD)/results-packages.md $(FLAGS)

how-many: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/how_many.py $(FLAGS)

# Style and types.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench-solver: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/solver/bench.py

bench-curvature: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/curvature.py
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 benchmarks/curvature.py \
		--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \
		--micro-batch-size 1 --num-samples 4 --rounds 3

bench-sketch: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sketch/bench.py
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 \
		benchmarks/sketch/bench.py ranks

# Beside per-sample gradients of other libraries, in an environment of their own, without what they
# would replace of torch's.
PEERS := bergson==2.5.1 dattri==0.3.0
PEERS_IMPORT := transformers==5.24.0 datasets==5.2.0 accelerate==1.15.0 peft==0.21.2 jaxtyping \
	ml_dtypes natsort petname pyyaml simple-parsing tqdm
bench-peers: $(BUILD)/peers/.ready
	$(BUILD)/peers/bin/pip install --quiet --disable-pip-version-check $(PEERS_IMPORT)
	$(BUILD)/peers/bin/pip install --quiet --disable-pip-version-check --no-deps $(PEERS)
	OMP_NUM_THREADS=1 $(BUILD)/peers/bin/python benchmarks/sketch/peers.py

bench-select: $(READY) data theta
	$(BIN)/python benchmarks/select_again.py --ranks $(GPUS_PER_NODE) -- --load $(THETA) \
		--data-path $(DATA_PATH) --valid-data-path $(VALID_DATA_PATH) \
		$(SELECT_FLAGS)

# Pools of which only the index is there: 2 GB on the disk. The solve takes some minutes.
bench-scale: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 benchmarks/scale.py plan \
		--documents 1e8 --prefixes 1000
	for ranks in 1 4; do OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone \
		--nproc-per-node $$ranks benchmarks/scale.py solve --samples 2e5 --sketch-size 1024 \
		|| exit 1; done

bench-estimates: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/estimates.py

bench-data: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/data.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/data_preprocessing.py

# On a machine with a GPU, whose own python3 has torch for it. What else is needed comes from the
# wheels in the folder $(WHEELS), if one is given, without a network; GPU_PYTHON names another
# interpreter.
GPU_PYTHON ?= python3
WHEELS ?=
PACKAGES := $(BUILD)/packages
WITH_PACKAGES := PYTHONPATH=$(CURDIR):$(abspath $(PACKAGES)):$$PYTHONPATH

# The files of tests/mcore that have such tests: the others import more than a GPU's machine need have.
GPU_TESTS := tests/gpu tests/gradients tests/mcore/test_fused_kernels.py \
	tests/mcore/test_transformer_engine.py
test-gpu: $(PACKAGES)/.done
	$(WITH_PACKAGES) $(GPU_PYTHON) -m pytest -m gpu -p no:cacheprovider --durations=0 \
		$(GPU_TESTS) $(FLAGS)

bench-gpu: $(PACKAGES)/.done
	$(WITH_PACKAGES) $(GPU_PYTHON) benchmarks/gpu.py --output $(BUILD)/gpu.json \
		--results benchmarks/RESULTS.md $(FLAGS)

# On one GPU; it begins no further seed of a setting after eight minutes, and the same command
# carries on.
study-gpu: $(PACKAGES)/.done $(STUDY_TEXT)/corpus.json
	$(WITH_PACKAGES) $(GPU_PYTHON) benchmarks/package_study.py --scale gpu --text $(STUDY_TEXT) \
		--seconds 480 --at-once 4 --results $(BUILD)/results-gpu.md $(FLAGS)

# Without dependencies: those that are missing are in the folder, and torch must stay as it is.
$(PACKAGES)/.done: $(if $(WHEELS),$(wildcard $(WHEELS)/*.whl))
	mkdir -p $(@D)
	$(if $(WHEELS),$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --upgrade \
		--disable-pip-version-check --target $(@D) $(WHEELS)/*.whl)
	touch $@

# Any megatron-core into a virtual environment. Constraints name one, which is not always the one.
%/.ready: setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $*
	grep -v '^megatron-core==' $(CONSTRAINTS) > $*/constraints.txt
	$*/bin/pip install --quiet --disable-pip-version-check -c $*/constraints.txt torch==2.13.0
	$*/bin/pip install --quiet --disable-pip-version-check -c $*/constraints.txt \
		megatron-core==$(CORE) -e ".[dev]"
	touch $@

# pip is all that it needs: for a GPU, that of its Python.
$(BUILD)/package-text/corpus.json: $(if $(FOR_GPU),,$(READY)) tools/pypi_text.py \
		tools/pypi_packages.txt
	$(if $(FOR_GPU),$(GPU_PYTHON),$(BIN)/python) tools/pypi_text.py --output-dir $(@D)

$(TEXT): $(READY) tools/embedded_text.py
	$(BIN)/python tools/embedded_text.py --output-dir $(@D) $(TEXT_FLAGS)
	touch $@

# A checkpoint that was trained on other data is of no more use.
$(DATA)/.done: $(TEXT) tools/preprocess_selection.py
	rm -rf $(THETA)
	$(BIN)/python tools/preprocess_selection.py \
		--input $(DOMAINS:%=$(BUILD)/text/%.jsonl) --group-key file --split 86,7,7 \
		--tokenizer-model $(DATA)/tokenizer.model --train-tokenizer --vocab-size 2048 \
		--append-eod --corrupt-fraction 0.25 --output-prefix $(EMBEDDED) --workers 2
	touch $@

$(THETA)/.done: $(DATA)/.done
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(GPUS_PER_NODE) \
		-m megatron_direct pretrain --data-path $(DATA_PATH) --save $(THETA) $(PRETRAIN_FLAGS)
	touch $@

$(CLOZE)/.done: $(DATA)/.done tools/embedded_cloze.py
	$(BIN)/python tools/embedded_cloze.py --data-path $(DOMAINS:%=$(EMBEDDED)_%_test) \
		--tokenizer-model $(DATA)/tokenizer.model --output-dir $(@D)
	touch $@

clean:
	rm -rf $(BUILD) $(RUN)
