# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Everything here sets up what it needs first: see ci/setup.

.DEFAULT_GOAL := help
SHELL := /bin/bash

# The Python environment that ci/setup makes; its last line of output is its folder.
ENVIRONMENT = $(shell ci/setup)
IN_ENVIRONMENT = environment="$(ENVIRONMENT)" && [ -n "$$environment" ] && PATH="$$environment/bin:$$PATH"

# Of the host in a box: `kvmi-host` reads them.
export KERNEL ?= 6.1
export CPU ?= amd

.PHONY: help
help: ## Show this
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: demo
demo: ## Live events of a guest's vCPUs, on the host in a box (KERNEL=6.1|6.12); HOST=local: on this machine
	@$(IN_ENVIRONMENT) ci/demo

.PHONY: test
test: ## All tests, the live ones included; results in build/junit.xml
	@$(IN_ENVIRONMENT) ci/test

.PHONY: test-unit
test-unit: ## The unit tests alone
	@$(IN_ENVIRONMENT) pytest -q --numprocesses auto tests/unit

.PHONY: test-hardware
test-hardware: ## The hardware suite alone; KERNEL=6.1|6.12|debug, CPU=amd|intel, PAGING=shadow choose its host, K=expr tests
	@$(IN_ENVIRONMENT) kvmi-host hwtest --report build/hardware-$(CPU)-$(KERNEL) $(if $(K),-k "$(K)") \
		$(if $(PAGING),-- --paging $(PAGING))

.PHONY: test-deploy
test-deploy: ## A stock Debian 12, emulated, is deployed to, upgraded, and given back; K=regex chooses steps, KEEP=1 leaves it up
	@$(IN_ENVIRONMENT) exec ci/deploy

.PHONY: test-fresh
test-fresh: GOAL ?= demo test
test-fresh: ## GOAL="demo test" in a bare Debian 12 that has nothing of ours; what it leaves is in build/fresh
	@$(IN_ENVIRONMENT) ci/fresh $(GOAL)

.PHONY: bench
bench: ## What exits and events cost in instructions of an emulated host, and how fast we answer; figures in build/bench.json
	@$(IN_ENVIRONMENT) kvmi-host bench && python tests/bench/speed.py

# What the hardware suite does shortly, for as long as it is told; SMP=2 for a box with two CPUs.
SMP ?= 1
CAMPAIGN = $(IN_ENVIRONMENT) kvmi-host hwtest --report build/$@-$(CPU)-$(KERNEL) --smp $(SMP) --deadline 86400

.PHONY: fuzz
fuzz: MESSAGES ?= 200000
fuzz: SEED ?= $(shell od -An -N4 -tu4 /dev/urandom)
fuzz: ## Fuzz the kernel part; MESSAGES=200000, SEED=number, K=harmless|anything choose what is sent
	@$(CAMPAIGN) -k "test_fuzz and comes_through $(if $(K),and $(K))" -- --seed $(SEED) --messages $(MESSAGES)

.PHONY: fuzz-parsers
fuzz-parsers: MINUTES ?= 10
fuzz-parsers: ## Fuzz what reads bytes here, messages and handshakes, for MINUTES=10; what is found goes to build/fuzz
	@$(IN_ENVIRONMENT) ci/fuzz $$((60 * $(MINUTES)))

.PHONY: storm
storm: MINUTES ?= 5
storm: VCPUS ?= 8
storm: SEED ?= $(shell od -An -N4 -tu4 /dev/urandom)
storm: ## Events of every kind on VCPUS=8 at once, answered at random, for MINUTES=5
	@$(CAMPAIGN) -k "test_fuzz and storm" -- --seed $(SEED) --storm-seconds $$((60 * $(MINUTES))) --storm-vcpus $(VCPUS)

.PHONY: soak
soak: MINUTES ?= 60
soak: ## Events of every kind without a pause for MINUTES=60: rate, gaps, and what grows
	@$(CAMPAIGN) -k test_soak -- --soak-seconds $$((60 * $(MINUTES)))

.PHONY: nightly
nightly: ## The hardware suite on every host of INVENTORY=ci/lab.toml, fuzzing, MUTANTS=1; report/index.html (docs/nightly.md)
	@$(IN_ENVIRONMENT) exec ci/nightly

.PHONY: mutants
mutants: ## Break the kernel part in one way after the other: the suite has to find it; KERNEL, NAMES='seq- padding' choose
	@$(IN_ENVIRONMENT) kvmi-host mutants $(foreach name,$(NAMES),-k "$(name)")

.PHONY: kvm-selftests
kvm-selftests: ## KVM's own selftests with stock modules and with ours, compared; KERNEL, CPU, T=regex chooses tests
	@$(IN_ENVIRONMENT) kvmi-host selftests $(if $(T),-k "$(T)")

.PHONY: lint
lint: ## ruff, mypy, shellcheck, ansible-lint, reuse (licences), the guide; checkpatch and sparse for the kernel part
	@$(IN_ENVIRONMENT) ci/lint

.PHONY: docs
docs: ## Build the guide, a site that needs no network, in build/site
	@$(IN_ENVIRONMENT) ci/docs

.PHONY: man
man: ## Write the manual pages to build/man
	@$(IN_ENVIRONMENT) python -m kvmi_host.cli.manual . build/man && cp docs/man/*.5 build/man

.PHONY: dkms
dkms: ## Build the Debian package with which a host builds the modules for its kernels by itself
	@$(IN_ENVIRONMENT) kernel/dkms/build

.PHONY: packages
packages: ## What a release of this commit consists of, in dist/: wheel, source, Debian packages, SBOM, checksums
	@$(IN_ENVIRONMENT) ci/release

.PHONY: compile-commands
compile-commands: ## For editors: how each file of the kernel part is compiled (KERNEL), in compile_commands.json
	@kernel/build --commands --series $(KERNEL)

.PHONY: modules
modules: ## Build the KVM modules of KERNEL; prints where they are
	@kernel/build --series $(KERNEL)
