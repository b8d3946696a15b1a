################################################################################
#
# muenclave
#
################################################################################

# The checkout that holds this tree; of it, only what the guest gets is copied.
MUENCLAVE_SITE = $(BR2_EXTERNAL_MUENCLAVE_PATH)/..
MUENCLAVE_SITE_METHOD = local
MUENCLAVE_FILES = muenclave.py muprotocol.py LICENSE
MUENCLAVE_OVERRIDE_SRCDIR_RSYNC_EXCLUSIONS = \
	$(addprefix --include=/,$(MUENCLAVE_FILES)) --exclude='*'
MUENCLAVE_LICENSE = Apache-2.0
MUENCLAVE_LICENSE_FILES = LICENSE
MUENCLAVE_DEPENDENCIES = python3

MUENCLAVE_BOARD = $(BR2_EXTERNAL_MUENCLAVE_PATH)/board/muenclave
MUENCLAVE_PACKAGES = \
	$(TARGET_DIR)/usr/lib/python$(PYTHON3_VERSION_MAJOR)/site-packages

define MUENCLAVE_INSTALL_TARGET_CMDS
	$(INSTALL) -D -m 0644 $(@D)/muprotocol.py \
		$(TARGET_DIR)/usr/lib/muenclave/muprotocol.py
	$(INSTALL) -D -m 0644 $(@D)/muenclave.py \
		$(TARGET_DIR)/usr/lib/muenclave/muenclave.py
	$(INSTALL) -D -m 0644 $(MUENCLAVE_BOARD)/sitecustomize.py \
		$(MUENCLAVE_PACKAGES)/sitecustomize.py
	$(INSTALL) -d -m 0755 $(TARGET_DIR)/usr/lib/muenclave/extras
endef

# The kernel: first Buildroot merges the fragments and fills in defaults; then this resolves them
# again with everything else off, and adds what belongs to this build.
MUENCLAVE_WANTED = $(LINUX_DIR)/muenclave.config
MUENCLAVE_FRAGMENTS = \
	$(LINUX_KCONFIG_FILE) $(LINUX_KCONFIG_FRAGMENT_FILES)
MUENCLAVE_COMMAND_LINE = \
	$(call qstrip,$(BR2_PACKAGE_MUENCLAVE_EXTRAS)) \
	$(call qstrip,$(BR2_PACKAGE_MUENCLAVE_COMMAND_LINE))

define MUENCLAVE_LINUX_CONFIG_FIXUPS
	$(MUENCLAVE_BOARD)/kernel_config.py wanted \
		--output $(MUENCLAVE_WANTED) \
		--command-line $(MUENCLAVE_COMMAND_LINE) \
		--module-key "$(call qstrip,$(BR2_PACKAGE_MUENCLAVE_MODULE_KEY))" \
		--fragments $(MUENCLAVE_FRAGMENTS)
	$(LINUX_KCONFIG_MAKE) KCONFIG_ALLCONFIG=$(MUENCLAVE_WANTED) allnoconfig
endef

define MUENCLAVE_CHECK_KERNEL
	$(MUENCLAVE_BOARD)/kernel_config.py compare \
		$(MUENCLAVE_WANTED) $(LINUX_DIR)/.config
endef

# The image's facts, for the script that measures it.
define MUENCLAVE_INSTALL_KERNEL_FACTS
	$(INSTALL) -m 0644 $(LINUX_DIR)/.config $(BINARIES_DIR)/kernel.config
	$(INSTALL) -m 0644 $(LINUX_DIR)/include/config/kernel.release \
		$(BINARIES_DIR)/kernel.release
endef

$(eval $(generic-package))
