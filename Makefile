# Stillpoint: everything that a person or a host needs to call. 'make' alone tells what there is.

PREFIX ?= /usr/local
DESTDIR ?=
STORE ?= file
ARGS ?=
CARGO ?= $(shell command -v cargo || echo $(HOME)/.cargo/bin/cargo)
RELEASE = $(or $(CARGO_TARGET_DIR),target)/release
UNITS = $(notdir $(wildcard systemd/*))
UNITDIR = $(DESTDIR)$(PREFIX)/lib/systemd/system
SHARE = $(DESTDIR)$(PREFIX)/share
MAINTAINER ?= $(or $(DEBFULLNAME),Stillpoint developers) <$(or $(DEBEMAIL),root@localhost)>
PACKAGE = target/package

.PHONY: help deps build install uninstall deb check test torture demo bench bench-adopt bench-restore doctor
.DEFAULT_GOAL := help

help:
	@echo 'make deps                    install what is missing (Debian 12 or 13)'
	@echo 'make build                   the release build: stillpoint and its QEMU plugin'
	@echo 'make install PREFIX=DIR      install them (default /usr/local; DESTDIR is honoured)'
	@echo 'make deb                     a Debian package of them in target/debian (Debian 12 and 13)'
	@echo 'make doctor                  check what this host can do'
	@echo 'make demo [STORE=hdfs]       checkpoints, a crash and a restore, shown on a real guest'
	@echo 'make bench [ARGS=--json]     pauses and sizes on a 1 GiB guest, by each engine'
	@echo 'make bench-adopt             downtime of an adoption beside that of a live migration'
	@echo 'make bench-restore           how soon a restored guest runs, beside a QEMU that boots'
	@echo 'make torture N=300 [SEED=1]  random command lines: each is refused or restored exactly'
	@echo 'make check                   format, lints, docs, licences and unit tests, in 3 minutes'
	@echo 'make test                    format, lints, build and all tests, with QEMU and HDFS'

deps:
	@scripts/install-deps

build:
	$(CARGO) build --release -p stillpoint -p stillpoint-plugin -p stillpoint-documents

# Builds nothing, so that it may run as another user than the build.
install:
	@test -x "$(RELEASE)/stillpoint" -a -x "$(RELEASE)/stillpoint-documents" || { echo "nothing is built yet: run 'make build' first" >&2; exit 1; }
	install -D -m 755 "$(RELEASE)/stillpoint" "$(DESTDIR)$(PREFIX)/bin/stillpoint"
	install -D -m 755 scripts/stillpoint-qemu "$(DESTDIR)$(PREFIX)/bin/stillpoint-qemu"
	install -D -m 644 "$(RELEASE)/libstillpoint_plugin.so" "$(DESTDIR)$(PREFIX)/lib/stillpoint/libstillpoint_plugin.so"
	install -D -m 755 scripts/libvirt-hook "$(DESTDIR)$(PREFIX)/lib/stillpoint/libvirt-hook"
	install -D -m 755 scripts/proxmox-hook "$(DESTDIR)$(PREFIX)/lib/stillpoint/proxmox-hook"
	umask 022 && "$(RELEASE)/stillpoint-documents" "$(SHARE)"
	install -d "$(UNITDIR)"
	for unit in $(UNITS); do sed 's|/usr/local/|$(PREFIX)/|' systemd/$$unit >"$(UNITDIR)/$$unit" && chmod 644 "$(UNITDIR)/$$unit" || exit 1; done

uninstall:
	rm -f "$(DESTDIR)$(PREFIX)/bin/stillpoint" "$(DESTDIR)$(PREFIX)/bin/stillpoint-qemu"
	for file in libstillpoint_plugin.so libvirt-hook proxmox-hook; do rm -f "$(DESTDIR)$(PREFIX)/lib/stillpoint/$$file"; done
	for unit in $(UNITS); do rm -f "$(UNITDIR)/$$unit"; done
	rm -f "$(SHARE)/man/man1/stillpoint.1" "$(SHARE)"/man/man1/stillpoint-*.1
	rm -f "$(SHARE)/bash-completion/completions/stillpoint" "$(SHARE)/zsh/site-functions/_stillpoint"
	rm -f "$(SHARE)/fish/vendor_completions.d/stillpoint.fish"
	-rmdir "$(DESTDIR)$(PREFIX)/lib/stillpoint"

# What 'make install' puts into /usr. Debian's zsh looks for packages' completions in a directory of its own.
deb: build
	@$(CARGO) deb --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-deb
	rm -rf $(PACKAGE)
	$(MAKE) -s install DESTDIR=$(CURDIR)/$(PACKAGE) PREFIX=/usr
	mv $(PACKAGE)/usr/share/zsh/site-functions $(PACKAGE)/usr/share/zsh/vendor-completions
	strip --strip-debug $(PACKAGE)/usr/bin/stillpoint $(PACKAGE)/usr/lib/stillpoint/libstillpoint_plugin.so
	gzip -9n $(PACKAGE)/usr/share/man/man1/*.1
	$(CARGO) deb --no-build --quiet -p stillpoint --maintainer '$(MAINTAINER)' --output target/debian/

check:
	@scripts/check

test:
	@scripts/test

torture:
	@scripts/torture $(N) $(SEED) $(LINE)

demo:
	@scripts/demo $(STORE)

bench:
	@scripts/bench $(ARGS)

bench-adopt:
	@scripts/bench-adopt $(ARGS)

bench-restore:
	@scripts/bench-restore $(ARGS)

doctor: build
	@$(RELEASE)/stillpoint doctor $(ARGS)
